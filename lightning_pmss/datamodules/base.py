"""Splits, length limits, loaders and packing of tokenised examples, whatever the examples are made of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_pmss.datamodules.packing import PackedCollator, PackingReport, pack_rows
from lightning_pmss.datamodules.sampler import (
    LengthGroupedSampler,
    ResumableDataLoader,
    ShardSampler,
    TrainerProgress,
    WithFillers,
)
from lightning_pmss.datamodules.splits import hold_out, in_proportion, shuffled

if TYPE_CHECKING:
    from datasets import Dataset

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class TokenisedDataModule(L.LightningDataModule):
    """Base of data modules whose examples are tokenised once; a subclass provides the tokens and makes the batches.

    A subclass checks its arguments before it calls this ``__init__``. Its `_encode` returns a split with the columns ``id``,
    ``group``, ``length`` and ``prompt_length``, and its `_collator` makes batches of such rows.

    Args:
        tokenizer: Folder or hub id of the model's tokenizer.
        batch_size: Examples per training batch and device.
        eval_batch_size: Examples per evaluation batch and device; ``batch_size`` if null.
        max_length: Longest training example in tokens.
        train_limit: Train on that many examples (chosen by ``seed``); on all if null.
        val_limit: Validate on that many examples, the first ones; on all if null.
        test_limit: Test on that many examples, the first ones; on all if null.
        val_size: Examples held out from the training rows (chosen by ``seed``) where the data has no validation set.
        seed: Seed of the split and of the order of training.
        num_workers: Worker processes per loader.
        cache_dir: Folder for tokenised data; the one of ``datasets`` if null.
        too_long: Treatment of examples longer than ``max_length``, such as "drop" or "error".
        packing: Train on rows of several examples, at most ``max_length`` tokens together, that do not see each other;
            ``batch_size`` is then a number of rows. ``packing_report`` reports the padding saved.
        ignore_columns: Columns of the data that may be filled though nothing reads them.
        split_seed: Seed of what is held out; ``seed`` if null. With one ``split_seed``, runs of different ``seed`` train on
            different examples, in different orders, and validate on the same ones.
        train_limit_by: Keep the shares of the kinds of examples among the ``train_limit`` chosen ones.
    """

    def __init__(
        self,
        tokenizer: str,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int = 512,
        train_limit: int | None = None,
        val_limit: int | None = None,
        test_limit: int | None = None,
        val_size: int | float = 200,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
        too_long: str = "drop",
        packing: bool = False,
        ignore_columns: str | Sequence[str] = (),
        split_seed: int | None = None,
        train_limit_by: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.max_length = max_length
        self.limits: dict[Split, int | None] = {"train": train_limit, "val": val_limit, "test": test_limit}
        self.val_size = val_size
        self.seed = seed
        self.num_workers = num_workers
        self.cache_dir = cache_dir
        self.too_long = too_long
        self.packing = packing
        self.ignore_columns = (ignore_columns,) if isinstance(ignore_columns, str) else tuple(ignore_columns)
        self.split_seed = seed if split_seed is None else split_seed
        self.train_limit_by = train_limit_by
        self.tokenizer_name = tokenizer
        self.data: dict[Split, Dataset] = {}
        """The tokenised splits that :meth:`setup` has made."""
        self.dropped = 0
        """Training examples left out because they are longer than ``max_length``."""
        self.available = 0
        """Training examples that ``train_limit`` chooses from."""
        self.kinds: dict[str, int] = {}
        """The kinds of the training examples, and how many of each are trained on, where ``train_limit_by`` is given."""
        self.cut: dict[Split, int] = {}
        """Examples per split that are cut to ``max_length``, where ``too_long`` says so."""
        self.packing_report: PackingReport | None = None
        """What packing saves, once there is a training loader."""
        self._kind_of: Sequence[str | None] = ()  # a training row's kind by its id, where the data has kinds
        self._prepared: dict[tuple[Split, tuple[int, ...] | None], Dataset | None] = {}

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """The tokenizer, loaded at first use."""

    @property
    def uses_chat_template(self) -> bool:
        """Whether the training texts are rendered by the tokenizer's chat template, which a merged model then needs."""
        return False

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end the training texts; a merged model stops at them too."""
        return frozenset()

    @abstractmethod
    def _make(self, split: Split, ids: Sequence[int] | None) -> Dataset | None:
        """Return a split as tokens: all rows for its own use or only ``ids`` for evaluation; ``None`` if there is none."""

    @abstractmethod
    def _collator(self, evaluation: bool = False) -> Any:
        """Return the function that makes a batch of rows."""

    def _place(self, number: int) -> str:
        """Return where the training row of that ``id`` is, for messages."""
        return f"row {number}"

    def _forget_texts(self) -> None:
        """Drop what `_make` keeps between splits."""

    def _held_size(self, rows: int) -> int:
        """Return how many of ``rows`` training rows to hold out for validation."""
        return int(self.val_size)

    def _evaluated_rows(self, held: list[int]) -> Dataset | None:
        """Return held-out rows as evaluation reads them, ``None`` if that is as training does."""
        return None

    def _fitting(self, train: Dataset, order: list[int]) -> list[int]:
        """Return the rows of ``order`` to train on, those that ``max_length`` admits."""
        lengths = train["length"][:]
        return [index for index in order if lengths[index] <= self.max_length]

    def _encode(self, split: Split, ids: Sequence[int] | None = None) -> Dataset | None:
        """Return what `_make` returns, or what `prepare_data` on this process has made already."""
        key = (split, None if ids is None else tuple(ids))
        return self._prepared.pop(key) if key in self._prepared else self._make(split, ids)

    @override
    def prepare_data(self) -> None:
        """Load, check and tokenise everything once per node, into the cache that all ranks then read."""
        self._prepared.clear()
        made: dict[Any, Dataset | None] = {(split, None): self._encode(split) for split in SPLITS}
        train = made["train", None]
        if train is not None and made["val", None] is None:
            held = hold_out(train["group"][:], self._held_size(len(train)), self.split_seed)[1]
            made["train", tuple(held)] = self._evaluated_rows(held)
        self._prepared = made  # `setup` on this process would read and hash all texts once more
        self._forget_texts()

    @override
    def setup(self, stage: str | None = None) -> None:
        """Make the splits that ``stage`` needs."""
        if stage in ("fit", "validate", None) and "train" not in self.data:
            self._setup_fit()
        if stage in ("test", "predict", None) and "test" not in self.data:
            test = self._encode("test")
            if test is None:
                raise ValueError(f"`{type(self).__name__}` has no test examples; give it data with a test split.")
            self.data["test"] = self._evaluated(test, "test")
        self._forget_texts()

    def _setup_fit(self) -> None:
        train, val = self._encode("train"), self._encode("val")
        if not train:
            raise ValueError(f"`{type(self).__name__}` has no training examples; give it data with a training split.")
        size = 0 if val is not None else self._held_size(len(train))
        order, held = hold_out(train["group"][:], size, self.split_seed)
        if val is None:
            if not order:
                raise ValueError(
                    f"`val_size` is {self.val_size}, but there are only {len(train)} training rows to hold it out from"
                    " (whole passages, where rows share one); give a smaller --data.val_size, or 0 to train without"
                    " validation."
                )
            val = self._evaluated_rows(held) or train.select(held)
        lengths = train["length"][:]
        fitting = self._fitting(train, order)
        self.dropped = len(order) - len(fitting)
        if self.dropped and self.too_long == "error":
            first = min(index for index in order if lengths[index] > self.max_length)
            place = self._place(int(train["id"][first]))
            raise ValueError(
                f"{self.dropped} of {len(order)} training examples are longer than max_length {self.max_length} tokens,"
                f" {place} the first with {lengths[first]}; raise --data.max_length to {max(lengths)}"
                " or give --data.too_long drop."
            )
        if not fitting:
            raise ValueError(
                f"All {len(order)} training examples are longer than max_length {self.max_length} (the shortest has"
                f" {min(lengths)} tokens, the longest {max(lengths)}); raise --data.max_length."
            )
        if self.dropped:
            rank_zero_warn(
                f"{self.dropped} of {len(order)} training examples are longer than max_length {self.max_length} tokens"
                f" and are left out (the longest has {max(lengths)}). Raise --data.max_length to train on them."
            )
        self.available = len(fitting)
        self.data["train"] = train.select(sorted(self._chosen(train, fitting)))
        self.data["val"] = self._evaluated(val, "val")

    def _chosen(self, train: Dataset, fitting: list[int]) -> list[int]:
        """Return the rows to train on; those of a smaller ``train_limit`` are among those of a larger one."""
        if self.split_seed != self.seed:
            fitting = shuffled(fitting, self.seed)
        if self.train_limit_by is None:
            return fitting[: self.limits["train"]]
        ids = train["id"][:]
        kinds = {row: self._kind_of[ids[row]] if ids[row] < len(self._kind_of) else None for row in fitting}
        if without := [row for row, kind in kinds.items() if kind is None]:
            raise ValueError(
                f"--data.train_limit_by {self.train_limit_by}: {self._place(ids[min(without)])} has no kind; leave the option"
                " out to choose at random."
            )
        chosen = in_proportion(fitting, list(kinds.values()), self.seed)[: self.limits["train"]]
        self.kinds = dict.fromkeys(sorted({str(kind) for kind in kinds.values()}), 0)
        for row in chosen:
            self.kinds[str(kinds[row])] += 1
        return chosen

    @property
    def has_kinds(self) -> bool:
        """Whether the training examples are of different kinds, as far as the data says; known after :meth:`setup`."""
        return None not in self._kind_of and len(set(self._kind_of)) > 1

    def _evaluated(self, data: Dataset, split: Split) -> Dataset:
        """Return the part of an evaluation set that ``split`` is limited to; prompts that are too long are reported."""
        limit = self.limits[split]
        data = data if limit is None else data.select(range(min(limit, len(data))))
        if len(data):
            self._check_prompts(data, split)
        return data

    def _check_prompts(self, data: Dataset, split: Split) -> None:
        """Refuse or report evaluation prompts that are too long."""
        lengths = data["prompt_length"][:]
        long = [length for length in lengths if length > self.max_length]
        if long and self.too_long == "error":
            raise ValueError(
                f"{len(long)} of {len(data)} prompts of the {split} set are longer than max_length {self.max_length}"
                f" tokens; raise --data.max_length to {max(long)} or give --data.too_long drop (which leaves evaluation"
                " prompts whole)."
            )
        context = self.tokenizer.model_max_length
        beyond = sum(length > context for length in lengths)
        if beyond:
            rank_zero_warn(
                f"{beyond} of {len(data)} prompts of the {split} set are longer than the {context} tokens that the"
                f" model takes; their answers will be poor. {self._shorter(context)}"
            )

    def _shorter(self, context: int) -> str:
        """Return what to type for prompts of at most ``context`` tokens."""
        return "Give shorter ones."

    def _replicas(self) -> dict[str, int]:
        """The number of ranks that share the data, and this one's number."""
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return dict(kwargs) if kwargs else {"num_replicas": 1, "rank": 0}

    @override
    def train_dataloader(self) -> ResumableDataLoader[Any]:
        rows: Any = self.data["train"]
        lengths = [min(length, self.max_length) for length in rows["length"][:]]
        collator = self._collator()
        if self.packing:
            packed = pack_rows(rows, lengths, self.max_length, self.batch_size, self.seed, **self._replicas())
            rows, sampler, self.packing_report = packed
            collator = PackedCollator(collator)
            rank_zero_info(str(self.packing_report))
        else:
            sampler = LengthGroupedSampler(lengths, self.batch_size, self.seed, **self._replicas())
        return ResumableDataLoader(
            cast("torch.utils.data.Dataset[Any]", rows),
            sampler=sampler,
            progress=TrainerProgress(self.trainer) if self.trainer is not None else None,
            seed=self.seed,
            batch_size=self.batch_size,
            collate_fn=collator,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def _eval_dataloader(self, split: Split, by_length: bool = True) -> DataLoader[Any]:
        data = self.data[split]
        # Sorted by length, a limited number of batches would be the longest examples: no fair sample. Of the Trainer's
        # limits the float 1.0 is all batches, the integer 1 one batch.
        limit = getattr(self.trainer, f"limit_{split}_batches", 1.0)  # without a Trainer: all
        whole = isinstance(limit, float) and limit == 1.0
        lengths = data["prompt_length"][:] if by_length and whole else None
        return DataLoader(
            WithFillers(data),
            sampler=ShardSampler(len(data), **self._replicas(), fill=self._in_step(), lengths=lengths),
            batch_size=self.eval_batch_size,
            collate_fn=self._collator(evaluation=True),
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed),  # else each validation would move the global state
        )

    def _in_step(self) -> bool:
        """Whether the ranks must do equally many batches, because each forward pass is a collective."""
        return self.trainer is not None and isinstance(
            self.trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)
        )

    @override
    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._eval_dataloader("val") if len(self.data["val"]) else []

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self._eval_dataloader("test")

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        return self._eval_dataloader("test", by_length=False)  # `predict` returns results in the order of the loader
