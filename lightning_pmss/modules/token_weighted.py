"""Weigh each response token of an optimizer step equally: the gradient is that of one large batch.

Lightning averages the means of the batches that it accumulates, and every strategy the means of the ranks. So a token of a
batch with few response tokens would weigh more than one of a batch with many. Here the sum of a batch's losses is divided by
the number of response tokens of the whole step, on all ranks. The number must be known before the step's first backward pass,
since DeepSpeed clips and steps in one go. So all batches of a step are fetched before the first of them is trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loops.fetchers import _DataFetcher, _PrefetchDataFetcher
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_pmss.evaluation.likelihood import IGNORED
from lightning_pmss.layers.parts import clean_name, is_sharded
from lightning_pmss.modules.resuming import restore_loaders
from lightning_pmss.optimizers import SharpnessAware

CHECKPOINT_KEY = "accumulation"


class TokenWeighted(L.LightningModule):
    """A LightningModule whose optimizer steps minimise the mean over the response tokens of all their batches and ranks.

    ``training_step`` returns ``self.step_loss(total, tokens)`` of the *sum* of its batch's token losses, and their number.
    The last, short window of an epoch, a changed ``accumulate_grad_batches`` and batches without any response token are exact.
    A checkpoint from the middle of a window contains the gradients so far (one device and DDP; elsewhere a resumed run warns
    that they are lost, and its first step is the exact mean over the batches that are left).

    Overridden hooks call ``super()``: ``on_train_start``, ``on_train_epoch_start``, ``on_save_checkpoint`` and
    ``on_load_checkpoint``.
    """

    step_part: Tensor
    """The last batch's part of its step's loss: summed over the step's batches and averaged over the ranks, it is the mean per
    response token of the step."""

    _window: _Window | None = None
    _begun = 0  # the batch of this epoch whose training step began last, from 1
    _stored: Mapping[str, Any] | None = None  # of the checkpoint that training goes on from

    def response_tokens(self, batch: Any) -> int:
        """Number of tokens with a loss in a batch, as the loader gives it."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())  # nothing comes before the first one

    def step_loss(self, total: Tensor, tokens: Tensor) -> Tensor:
        """Make the result of ``training_step``.

        Args:
            total: Sum of the losses of the batch's tokens, a scalar.
            tokens: Their number, an int64 scalar.

        Returns:
            A scalar: its value is the batch's own mean, its gradient the batch's part of the step's.

        Raises:
            RuntimeError: The number of the step's tokens is unknown, or the batch differs from the counted one.
        """
        mean = total / tokens.clamp(min=1)
        self.step_part = mean.detach()
        if not self._accumulates():
            return mean
        accumulate, ranks = self.trainer.accumulate_grad_batches, self.trainer.world_size
        ready, window = self._progress().ready, self._window
        if window is None or not window.done < ready <= window.done + len(window.batches):
            raise RuntimeError(
                f"{type(self).__name__} does not know the number of response tokens of this optimizer step. Where your class"
                " has `on_train_start` or `on_train_epoch_start`, call `super()` in it; `training_step` must take a batch."
            )
        if window.accumulate == accumulate and not window.tokens:
            self._count(window)
        found, counted = int(tokens), window.tokens[ready - window.done - 1] if window.tokens else None
        if window.accumulate != accumulate or counted != found:
            what = (
                f"accumulate_grad_batches was changed from {window.accumulate} to {accumulate} inside an optimizer step; change"
                " it at the start of an epoch, as GradientAccumulationScheduler does"
                if window.accumulate != accumulate
                else f"batch {ready - 1} has {found} response tokens in `training_step` and had {counted} in the loader; count"
                f" them in `{type(self).__name__}.response_tokens` so that both agree, or change labels in the collator"
            )
            raise RuntimeError(f"The loss cannot be weighted by tokens: {what}.")
        self._begun = ready
        part = total * (ranks / max(1, window.total))
        self.step_part = part.detach()
        # Lightning divides by `accumulate`. The shown and logged loss stays a mean that is comparable between batches.
        return mean.detach() + (part - self.step_part) * accumulate

    def on_train_start(self) -> None:
        """Look ahead from the first batch on, at the place of the checkpoint."""
        restore_loaders(self.trainer)
        self._look_ahead()

    def on_train_epoch_start(self) -> None:
        """Look ahead with a loader that was made anew, or an accumulation that begins in this epoch."""
        self._look_ahead()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the gradients of a window that is not at its end, and the place of loaders that are ahead of training."""
        window = self._window
        done = 0 if window is None or self._trainer is None else self._progress().processed - window.done
        loop: Any = None if self._trainer is None else self.trainer.fit_loop
        if loop is not None and isinstance(loop._data_fetcher, WindowFetcher):
            loop._data_fetcher.correct(checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", []))
        if window is not None and 0 < done < len(window.tokens) and "optimizer_states" in checkpoint:
            whole = self._begun <= self._progress().processed  # else a backward pass may have been stopped half way
            checkpoint[CHECKPOINT_KEY] = {
                "epoch": self.trainer.current_epoch,
                "ready": window.done + done,
                "accumulate": window.accumulate,
                "ranks": self.trainer.world_size,
                "tokens": window.before + sum(window.over_ranks[:done]),
                "divisor": window.total,
                "gradients": gradients_so_far(self.trainer, self) if whole else {},
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the gradients of a checkpoint for the next batch of the resumed run; `load_from_checkpoint` resumes none."""
        self._stored = None if self._trainer is None else checkpoint.get(CHECKPOINT_KEY)

    # -- one step -----------------------------------------------------------------------------------------------------

    def _accumulates(self) -> bool:
        """Whether a step has more than the batch of one rank."""
        return self._trainer is not None and self.trainer.accumulate_grad_batches * self.trainer.world_size > 1

    def _progress(self) -> Any:
        return self.trainer.fit_loop.epoch_loop.batch_progress.current

    def _look_ahead(self) -> None:
        loop: Any = self.trainer.fit_loop
        if not self._accumulates():
            return
        if type(loop._data_fetcher) is _PrefetchDataFetcher:
            self._window = None  # of an earlier fit
            loop._data_fetcher = WindowFetcher(self.trainer, loop._data_fetcher, self._begin)
        if isinstance(self.trainer.strategy, DeepSpeedStrategy) and self.trainer.accumulate_grad_batches > 1:
            step_with_lightning(self.trainer.strategy)

    def _begin(self, batches: list[Any]) -> None:
        """Store the batches until the optimizer's step."""
        self._window = _Window(self._progress().ready, self.trainer.accumulate_grad_batches, batches)

    def _count(self, window: _Window) -> None:
        """Count the window's tokens; the same call on every rank."""
        window.tokens = [self.response_tokens(batch) for batch in window.batches]
        # The same length on all ranks, also if data without a length ends early on some.
        counts = torch.zeros(window.accumulate, dtype=torch.int64)
        counts[: len(window.tokens)] = torch.tensor(window.tokens)
        strategy = self.trainer.strategy
        window.over_ranks = strategy.reduce(counts.to(strategy.root_device), reduce_op="sum").tolist()
        if inside := window.done % window.accumulate:
            self._go_on(window, inside)
        self._stored = None

    def _go_on(self, window: _Window, inside: int) -> None:
        """Begin in the middle of a window, at the place of the checkpoint."""
        stored = self._stored or {}
        here = {"epoch": self.trainer.current_epoch, "ready": window.done, "accumulate": window.accumulate}
        here["ranks"] = self.trainer.world_size
        if not stored.get("gradients") or any(stored[key] != value for key, value in here.items()):
            rank_zero_warn(
                f"Resuming inside an optimizer step: the gradients of its first {inside} of {window.accumulate} batches are not"
                f" in the checkpoint, so this step is the mean over the {len(window.tokens)} that are left. Checkpoints keep"
                " them on one device and under DDP, for the same accumulate_grad_batches and number of devices, if the"
                " optimizer needs no batch twice (SAM and BSAM do); elsewhere"
                " make checkpoints between steps (val_check_interval: a multiple of accumulate_grad_batches)."
            )
            return
        window.before = int(stored["tokens"])
        parameters = {clean_name(name): parameter for name, parameter in self.named_parameters()}
        for name, gradient in stored["gradients"].items():
            where = parameters[clean_name(name)]
            # A loader that cannot resume gives other batches than those that the first ones were weighted with.
            where.grad = gradient.to(where.device) * (stored["divisor"] / max(1, window.total))


def gradients_so_far(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Tensor]:
    """The accumulated gradients of the trained parameters, on the CPU; a collective under DDP.

    Under DDP they are averaged over the ranks, as the step would do anyway. Engines that shard gradients or keep them in
    buffers of their own (FSDP, DeepSpeed) give none, nor does an optimizer that needs the batches of these gradients again.
    """
    again = any(isinstance(optimizer, SharpnessAware) for optimizer in trainer.optimizers)
    if again or is_sharded(module) or isinstance(trainer.strategy, DeepSpeedStrategy):
        return {}
    trained = {clean_name(name): p for name, p in module.named_parameters() if p.requires_grad}
    if trainer.world_size == 1:
        return {name: p.grad.detach().cpu() for name, p in trained.items() if p.grad is not None}
    values = {n: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for n, p in trained.items()}
    return {name: trainer.strategy.reduce(value, reduce_op="mean").cpu() for name, value in values.items()}


@dataclass
class _Window:
    """The batches until an optimizer step.

    Attributes:
        done: Batches of the epoch that were trained on before.
        accumulate: ``accumulate_grad_batches`` when it began.
        batches: The batches, as the loader gave them.
        tokens: Response tokens of each batch on this rank, once they are counted.
        over_ranks: The same, summed over the ranks.
        before: Tokens of the earlier batches whose gradients a checkpoint contained.
    """

    done: int
    accumulate: int
    batches: list[Any]
    tokens: list[int] = field(default_factory=list)
    over_ranks: list[int] = field(default_factory=list)
    before: int = 0

    @property
    def total(self) -> int:
        return self.before + sum(self.over_ranks)


class WindowFetcher(_PrefetchDataFetcher):
    """Lightning's fetcher of batches, extended to fetch all batches of an optimizer step before it gives the first.

    Args:
        trainer: Its fit loop uses the fetcher.
        started: The replaced fetcher.
        announce: Called with the batches of each step.
    """

    def __init__(self, trainer: L.Trainer, started: _DataFetcher, announce: Callable[[list[Any]], None]) -> None:
        super().__init__()
        self.__dict__.update(started.__dict__)
        self.trainer, self.announce = trainer, announce
        self._left, self._ended = 0, self.done
        # States of the loaders that have one: after the batch that was given last, and after each one in `batches`.
        self._states = [self.combined_loader._state_dicts()] * (1 + len(self.batches))

    def __iter__(self) -> WindowFetcher:
        _DataFetcher.__iter__(self)  # which resets; nothing is fetched before the first batch is asked for
        self._states = [self.combined_loader._state_dicts()]
        return self

    def __next__(self) -> Any:
        if not self._left:
            self._fetch()
        self._left -= 1
        batch = self.batches.pop(0)
        del self._states[0]
        self.done = self._ended and not self.batches
        return batch

    def _fetch(self) -> None:
        accumulate = self.trainer.accumulate_grad_batches
        wanted = accumulate - self.trainer.fit_loop.epoch_loop.batch_progress.current.ready % accumulate
        # Without a known length, only fetching one more shows that a batch is the last.
        beyond = 1 if self.length is None else 0
        while len(self.batches) < wanted + beyond and not self._ended:
            try:
                self.batches.append(super(_PrefetchDataFetcher, self).__next__())
            except StopIteration:
                self.done = True
            else:
                self._states.append(self.combined_loader._state_dicts())
            self._ended = self.done
        window = self.batches[:wanted]
        if not window:
            raise StopIteration
        self._left = len(window)
        self.announce([batch for batch, _, _ in window])

    def correct(self, states: list[Any]) -> None:
        """Set ``states`` of the loaders to the place behind the batch given last, not the one fetched last.

        A loader with ``follows_training`` counts the trained batches.
        """
        stateful = [loader for loader in self.combined_loader.flattened if hasattr(loader, "load_state_dict")]
        for place, loader in enumerate(stateful):
            if self.batches and not getattr(loader, "follows_training", False):
                states[place] = self._states[0][place]

    def reset(self) -> None:
        super().reset()
        self._left, self._ended = 0, self.done
        self._states = [[]]


class _StepsWithLightning(DeepSpeedStrategy):
    """Steps where Lightning does: DeepSpeed's own count of batches runs on over the end of an epoch, where Lightning's begins
    anew, and divides the loss by the number of batches a second time.
    """

    @property
    def handles_gradient_accumulation(self) -> bool:
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        yield  # the engine knows by `set_gradient_accumulation_boundary`

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        trainer = self.lightning_module.trainer  # type: ignore[union-attr]
        self.model.set_gradient_accumulation_boundary(not trainer.fit_loop._should_accumulate())  # type: ignore[union-attr, operator]
        return super().training_step(*args, **kwargs)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)


def step_with_lightning(strategy: DeepSpeedStrategy) -> None:
    """Let Lightning decide, for this strategy object, after which batches DeepSpeed steps."""
    if not isinstance(strategy, _StepsWithLightning):
        kind = type(strategy)
        strategy.__class__ = type(kind.__name__, (_StepsWithLightning, kind), {})
