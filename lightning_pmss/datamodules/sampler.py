"""Samplers by length and by rank, and a loader that resumes exactly.

* `LengthGroupedSampler`: shuffled batches of similar length, one order per ``(seed, epoch)``.
* `ResumableDataLoader`: continues in the middle of an epoch with exactly the next batch.
* `ShardSampler`: every evaluation example on one rank only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler, SequentialSampler
from typing_extensions import override

T_co = TypeVar("T_co", covariant=True)

# Batches sorted together. More: less padding; fewer: more random batches. 50 is what length-grouped samplers use.
_GROUP_BATCHES = 50


@runtime_checkable
class SkippingSampler(Protocol):
    """A sampler that can start its next iteration later, without drawing the skipped part."""

    skip: int


def _generator(seed: int, epoch: int) -> torch.Generator:
    """A generator for one epoch. Mixing, unlike ``seed + epoch``, keeps (0, 1) and (1, 0) apart."""
    mixed = (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + 1) % (1 << 63)
    return torch.Generator().manual_seed(mixed)


class LengthGroupedSampler(DistributedSampler[int]):
    """Shuffled indices in which each batch of each rank contains examples of similar length.

    The order is a pure function of ``(lengths, batch_size, seed, epoch, num_replicas)``; the global random state plays
    no part. Being a `DistributedSampler`, Lightning leaves it in place, also under DDP, and
    calls `set_epoch` before each epoch.

    All indices are shuffled, cut into chunks of some batches, sorted by length inside each chunk, cut into global
    batches (``batch_size`` per rank), and the global batches are shuffled. A smaller last batch stays last.
    Every rank gets equally many indices: where they do not divide, the first ones of the epoch's order are repeated,
    as `DistributedSampler` does.

    Args:
        lengths: Length of each example, in tokens.
        batch_size: Examples per batch and rank.
        seed: Seed of the order.
        num_replicas: Number of ranks that share the data. Needs no process group.
        rank: Rank of this process among them.

    Example::

        >>> sampler = LengthGroupedSampler([5, 1, 4, 2], batch_size=2, seed=0)
        >>> sorted(sampler)
        [0, 1, 2, 3]
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int = 0, num_replicas: int = 1, rank: int = 0
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}; give an integer of at least 1.")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"`rank` is {rank} of `num_replicas` {num_replicas}; give 0 <= rank < num_replicas.")
        super().__init__(
            cast("Dataset[Any]", range(len(lengths))), num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed
        )
        self.batch_size = batch_size
        self.lengths = torch.as_tensor(lengths, dtype=torch.int64)
        self.skip = 0
        """Indices that the next iteration leaves out at its start; used once."""

    def order(self, epoch: int) -> list[int]:
        """Return this rank's indices of ``epoch``."""
        generator = _generator(self.seed, epoch)
        indices = torch.randperm(len(self.lengths), generator=generator)
        if len(indices):
            indices = indices.repeat(-(-self.total_size // len(indices)))[: self.total_size]
        batch = self.batch_size * self.num_replicas
        # A small data set would otherwise be one sorted chunk, with the same examples together in every epoch.
        chunk = batch * max(1, min(_GROUP_BATCHES, len(indices) // (4 * batch)))
        grouped = [part[self.lengths[part].argsort(descending=True, stable=True)] for part in indices.split(chunk)]
        batches = list(torch.cat(grouped).split(batch)) if grouped else []
        full = len(indices) // batch
        shuffled = [batches[i] for i in torch.randperm(full, generator=generator).tolist()] + batches[full:]
        return [index for part in shuffled for index in part[self.rank :: self.num_replicas].tolist()]

    @override
    def __iter__(self) -> Iterator[int]:
        skip, self.skip = self.skip, 0
        return iter(self.order(self.epoch)[skip:])


class ShardSampler(DistributedSampler[int]):
    """Rank ``r`` of ``n`` takes the examples at the places ``r, r + n, ...`` of an order: none twice, none left out.

    Stock Lightning pads an evaluation set with repeated examples, which makes distributed scores wrong by a little.
    Ranks may then differ by one example, hence by one batch. Under strategies that gather weights in every forward pass
    (FSDP, ZeRO-3) a rank with a batch more would wait for ever: with ``fill`` a rank that has one example less gets a
    filler, the index ``size``, which `WithFillers` turns into an example that is computed and not scored. A rank without
    any example always gets one: Lightning stops at a loader of length zero.

    Args:
        size: Number of examples.
        num_replicas: Number of ranks that share the data. Needs no process group.
        rank: Rank of this process among them.
        fill: Give every rank equally many indices.
        lengths: Of the examples; they then come longest first, so that a batch, and the batches of all ranks, have similar
            lengths, and a batch too large for memory fails at once. Null: in their own order.
    """

    def __init__(
        self,
        size: int,
        num_replicas: int = 1,
        rank: int = 0,
        fill: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> None:
        super().__init__(cast("Dataset[Any]", range(size)), num_replicas=num_replicas, rank=rank, shuffle=False)
        order = range(size) if lengths is None else sorted(range(size), key=lambda index: -lengths[index])
        self.indices = [*order[rank::num_replicas]]
        if (fill or not self.indices) and len(self.indices) < -(-size // num_replicas):
            self.indices.append(size)

    @override
    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    @override
    def __len__(self) -> int:
        return len(self.indices)


class WithFillers(Dataset[Any]):
    """Rows by index; beyond the end the first row again, under the ``id`` -1 that says not to score it."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @override
    def __getitem__(self, index: int) -> Any:
        return self.rows[index] if index < len(self.rows) else {**self.rows[0], "id": -1}


class ResumableDataLoader(DataLoader[T_co]):
    """A loader that Lightning saves in its checkpoints and that resumes with exactly the next batch.

    The fit loop stores `state_dict` and hands it back on ``fit(ckpt_path=...)``. Three things differ from a
    plain loader:

    * **It counts the batches that training has consumed**, not those that worker processes have prefetched.
    * **Its iterator starts at the first batch asked for.** Lightning creates iterators before it sets the sampler's
      epoch; a plain loader with workers would by then have fetched batches of the wrong epoch.
    * **It never draws from the global random state** (a plain loader does, for its workers' seeds), so that a
      resumed run has the random numbers, of dropout for example, of an uninterrupted run.

    Args:
        dataset: The data set.
        sampler: A sampler whose order depends on ``set_epoch`` alone (`LengthGroupedSampler`, a
            `DistributedSampler`), or a sequential one.
        progress: Returns the running epoch and how many of its batches have been trained on, or ``None`` outside of
            training; for Lightning `TrainerProgress`. Without it, the sampler's epoch and the batches fetched
            are used. That differs for a checkpoint written in the middle of a step, say by an exception (the batch
            was fetched and has yet to be trained on), and after a resume with ``max_steps`` from a checkpoint of an
            epoch's end (Lightning 2.6 then gives the sampler an epoch that is one too high).
        seed: Seed of the worker processes.
        **kwargs: As for `DataLoader`.

    Raises:
        TypeError: If the order of ``sampler`` cannot be repeated.
    """

    def __init__(
        self,
        dataset: Dataset[T_co],
        sampler: Any = None,
        progress: Callable[[], tuple[int, int] | None] | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("shuffle") or isinstance(sampler, RandomSampler) or kwargs.get("batch_sampler") is not None:
            raise TypeError(
                "`ResumableDataLoader` needs a sampler whose order can be repeated; got `shuffle`, a `RandomSampler` or"
                " a `batch_sampler`. Give `sampler=LengthGroupedSampler(...)` or a `DistributedSampler`."
            )
        if sampler is not None and not isinstance(sampler, (DistributedSampler, SequentialSampler)):
            raise TypeError(
                f"`ResumableDataLoader` cannot repeat the order of a `{type(sampler).__name__}`. Give"
                " `sampler=LengthGroupedSampler(...)` or another `DistributedSampler`."
            )
        kwargs["generator"] = torch.Generator()
        super().__init__(dataset, sampler=sampler, **kwargs)
        self.progress = progress
        self.seed = seed
        self._pending: dict[str, Any] | None = None
        self._running: _Position | None = None

    @property
    def epoch(self) -> int:
        """The epoch that training is in, else the one that the sampler is set to (0 for a sequential one)."""
        now = self.progress() if self.progress is not None else None
        return int(getattr(self.sampler, "epoch", 0)) if now is None else now[0]

    @property
    def follows_training(self) -> bool:
        """Whether `state_dict` counts batches that were trained on, however many were fetched."""
        return self.progress is not None

    def _order_key(self) -> dict[str, int]:
        """Everything that determines the order of an epoch besides the epoch itself."""
        return {
            "examples": len(cast(Sized, self.dataset)),
            "batch_size": self.batch_size or 0,
            "num_replicas": int(getattr(self.sampler, "num_replicas", 1)),
            "sampler_seed": int(getattr(self.sampler, "seed", 0)),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the batches consumed of it, and everything that the order depends on. Equal on all ranks."""
        position = self._running
        if position is None:
            # Called before the first batch: the loaded state, not applied yet, is still current.
            if self._pending is not None and self._pending["epoch"] == self.epoch:
                return dict(self._pending)
            return {"epoch": self.epoch, "batches": 0, **self._order_key()}
        now = self.progress() if self.progress is not None else None
        batches = position.fetched if now is None else min(position.fetched, now[1])
        return {"epoch": position.epoch, "batches": batches, **self._order_key()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Store the place to continue from; it is applied when the first batch of that epoch is asked for.

        Args:
            state: Result of `state_dict`.
        """
        missing = {"epoch", "batches", *self._order_key()} - state.keys()
        if missing:
            raise ValueError(
                f"The checkpoint's loader state lacks {sorted(missing)}: it is not from a `ResumableDataLoader`."
                " Resume with the loader that the checkpoint was made with."
            )
        self._pending = dict(state)
        self._running = None

    def _take_start(self, epoch: int) -> int:
        """Return how many batches of ``epoch``, which begins now, were consumed before."""
        state, self._pending = self._pending, None
        if state is None or state["epoch"] != epoch:
            return 0
        changed = {key: (state[key], now) for key, now in self._order_key().items() if state[key] != now}
        if changed and state["batches"]:
            told = ", ".join(f"{key} was {old}, is {now}" for key, (old, now) in changed.items())
            raise RuntimeError(
                f"Cannot resume in the middle of epoch {epoch}: the order of the training examples changed"
                f" ({told}). Resume with the settings of the checkpoint, or from one made at the end of an epoch."
            )
        return int(state["batches"])

    @override
    def __iter__(self) -> Any:
        self._running = None
        return _LazyIterator(self)

    def _start(self) -> tuple[Iterator[T_co], _Position]:
        epoch = self.epoch
        if isinstance(self.sampler, DistributedSampler):
            self.sampler.set_epoch(epoch)
        start = self._take_start(epoch)
        position = _Position(epoch, start)
        cast(torch.Generator, self.generator).manual_seed(_generator(self.seed, epoch).initial_seed())
        if start and isinstance(self.sampler, SkippingSampler):
            self.sampler.skip = start * cast(int, self.batch_size)
            iterator: Iterator[T_co] = super().__iter__()
        else:
            iterator = itertools.islice(super().__iter__(), start, None)
        self._running = position
        return iterator, position


class TrainerProgress:
    """The training progress of a Lightning trainer, for `ResumableDataLoader`.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self.trainer = trainer

    def __call__(self) -> tuple[int, int]:
        """Return the epoch and how many of its batches have been trained on."""
        batches = cast(Any, self.trainer.fit_loop.epoch_loop.batch_progress.current)
        return self.trainer.current_epoch, int(batches.processed)


class _Position:
    """Progress of an iteration."""

    def __init__(self, epoch: int, fetched: int) -> None:
        self.epoch = epoch
        self.fetched = fetched


class _LazyIterator(Iterator[T_co]):
    """Iterator over a `ResumableDataLoader` that starts workers when its first batch is asked for."""

    def __init__(self, loader: ResumableDataLoader[T_co]) -> None:
        self._loader = loader
        self._iterator: Iterator[T_co] | None = None
        self._position: _Position | None = None

    def __next__(self) -> T_co:
        if self._iterator is None or self._position is None:
            self._iterator, self._position = self._loader._start()
        batch = next(self._iterator)
        self._position.fetched += 1
        return batch
