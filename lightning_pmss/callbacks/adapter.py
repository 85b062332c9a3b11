"""
Adapter callback
^^^^^^^^^^^^^^^^

Fine-tunes the model of any LightningModule with an adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from lightning_pmss.callbacks.averaging import average_the_trained, refuse_averages, refuse_copies
from lightning_pmss.callbacks.checks import (
    agree_on_indices,
    agree_on_weights,
    check_bases,
    check_optimizers,
    look_for_fresh,
    refuse_infinite,
    refuse_merged,
    say_what_was_converted,
    wake,
    warn,
    warn_about_batch_norm,
)
from lightning_pmss.callbacks.ending import Ending
from lightning_pmss.callbacks.frozen import FrozenWatch
from lightning_pmss.callbacks.gradients import GradientCheck
from lightning_pmss.callbacks.hyperparameters import log_hyperparameters, own_options
from lightning_pmss.callbacks.launched import catch_in_launched, convert_like, follow_launchers
from lightning_pmss.callbacks.nonfinite import ON_NONFINITE, NonFiniteCheck, NonFiniteError
from lightning_pmss.callbacks.places import check_before_conversion, check_before_training, local_folder
from lightning_pmss.callbacks.randomness import StepRandomness, begin_epoch
from lightning_pmss.callbacks.results import merge_beside, remove_beside
from lightning_pmss.callbacks.sharpness import forget_passes, refuse_deepspeed, run_passes
from lightning_pmss.callbacks.stopping import GracefulStop
from lightning_pmss.callbacks.stored import check_stored
from lightning_pmss.callbacks.throughput import StepClock, log_u_norms
from lightning_pmss.callbacks.window import AccumulatedGradients
from lightning_pmss.checkpoints.about import describe, full_names
from lightning_pmss.checkpoints.contents import CheckpointSeam, record_fingerprints
from lightning_pmss.checkpoints.restoring import announce
from lightning_pmss.conversion.convert import adapted_layers, convert
from lightning_pmss.conversion.converted import is_converted
from lightning_pmss.conversion.report import ConversionReport
from lightning_pmss.distributed.sharding import Engine, prepare_strategy, refuse_quantised, refuse_untried
from lightning_pmss.layers.parts import is_sharded
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.modules.resuming import count_epoch, restore_loaders, warn_about_loaders

MERGE_ON_SAVE = ("end", "checkpoint", None)


class AdapterCallback(L.Callback):
    """Convert the targeted linear layers, train only the adapter, keep checkpoints small, and merge on save.

    The model is converted in ``setup`` when its layers exist, or right after ``configure_model`` where the LightningModule
    builds them there. Checkpoints contain the trained tensors and resume exactly. The end of ``fit`` writes the adapter to
    ``<output_dir>/adapter`` and the merged model to ``<output_dir>/merged``.

    Supports a single device, DDP, FSDP1 (`FSDPStrategy`), FSDP2 (`ModelParallelStrategy`) and DeepSpeed ZeRO-2 and
    ZeRO-3. Under FSDP2 the LightningModule calls `lightning_pmss.model_built(self)` in ``configure_model`` between building
    and ``fully_shard``. Unsupported setups are refused before any work.

    Args:
        config: The method and its options, such as ``LoRAConfig(rank=16)``.
        output_dir: Folder of adapter and merged model; default: the run's log directory. Earlier results of this library in
            it are replaced.
        merge_on_save: ``end``: write the merged model when ``fit`` ends; ``checkpoint``: also beside each checkpoint, as
            ``<checkpoint's name>-merged``; None: never.
        on_nonfinite: Reaction to a NaN or infinite loss or gradient: ``stop`` the training before the optimizer step, or
            ``skip`` that step and continue.
        log_throughput: Log seconds per step and, also in the progress bar, tokens per second and peak memory.
        log_u_norm: Log the Frobenius norm of each layer's stored update (of PMSS: ``s U``).

    Raises:
        ValueError: The options contradict one another or do not fit the model, which stays unchanged.
        MisconfigurationException: A trained tensor is in no optimizer, others train, or the strategy is not supported.

    Example::

        >>> from lightning_pmss import AdapterCallback, LoRAConfig
        >>> trainer = L.Trainer(callbacks=[AdapterCallback(LoRAConfig(target_modules=["q_proj", "v_proj"], rank=8))])

    """

    def __init__(
        self,
        config: AdapterConfig,
        output_dir: str | Path | None = None,
        merge_on_save: str | None = "end",
        on_nonfinite: Literal["stop", "skip"] = "stop",
        log_throughput: bool = True,
        log_u_norm: bool = False,
    ) -> None:
        self.config = config
        self.output_dir = None if output_dir is None else local_folder(output_dir, "adapter and merged model")
        self.merge_on_save, self.on_nonfinite = merge_on_save, on_nonfinite
        self.log_throughput, self.log_u_norm = log_throughput, log_u_norm
        for name, allowed in {"merge_on_save": MERGE_ON_SAVE, "on_nonfinite": ON_NONFINITE}.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}={value!r} is not known; choose one of {list(allowed)}.")
        self.report: ConversionReport | None = None
        self._engine: Engine = "plain"
        self._advice: list[str] = []
        self._seam: CheckpointSeam | None = None
        self._gradients: GradientCheck | None = None
        self._finite: NonFiniteCheck | None = None
        self._randomness = StepRandomness()
        self._resume: Mapping[str, Any] | None = None
        self._clock = StepClock()
        self._stop = GracefulStop(self.config.label())
        self._ending: Ending | None = None
        self._accumulated, self._figures = AccumulatedGradients(), dict[str, float]()  # figures of a loaded checkpoint
        follow_launchers()

    # -- conversion ---------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the output folders, then convert, now or right after ``configure_model``."""
        catch_in_launched(trainer)
        self._engine = prepare_strategy(trainer, pl_module)
        refuse_averages(trainer, self._engine)
        if stage == "fit":
            refuse_deepspeed(trainer, pl_module)
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._figures.clear()
            check_before_conversion(trainer, self.output_folder(trainer), self.merge_on_save)
        if not is_converted(pl_module) and is_overridden("configure_model", pl_module):
            original = pl_module.configure_model

            @functools.wraps(original)
            def configure_model() -> None:
                # Remove the patch first: it must not survive in a pickle or a copy, nor run twice.
                del pl_module.configure_model
                original()
                self._attach(trainer, pl_module)

            pl_module.configure_model = configure_model  # type: ignore[method-assign]
        else:
            self._attach(trainer, pl_module)

    def on_model_built(self, trainer: L.Trainer, pl_module: L.LightningModule, everywhere: bool = True) -> None:
        """Convert the model before it is sharded; `lightning_pmss.model_built` calls this inside ``configure_model``."""
        if not is_converted(pl_module):
            refuse_quantised(self._engine, pl_module)
            if everywhere and not is_sharded(pl_module):
                agree_on_weights(trainer, pl_module, self._engine)
            low = torch.float16 if str(trainer.precision).startswith("16") else None
            self.report = convert(pl_module, self.config, compute_dtype=low)
            refuse_untried(self._engine, pl_module)
            if everywhere:
                agree_on_indices(trainer, pl_module)
            if self._engine != "plain":
                record_fingerprints(pl_module)
            say_what_was_converted(self.report, str(trainer.precision))

    def _attach(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_model_built(trainer, pl_module)
        self.report = convert(pl_module, self.config)  # refuses an earlier conversion with another config
        self._advice = look_for_fresh(pl_module, self.report, self._engine)
        pl_module.strict_loading = False
        if self._seam is not None:
            self._seam.remove()
        beside = self.merge_on_save == "checkpoint"
        self._seam = CheckpointSeam(
            trainer,
            pl_module,
            functools.partial(describe, full=full_names(pl_module)),
            announce,
            after_save=functools.partial(merge_beside, trainer, pl_module) if beside else None,
            after_remove=functools.partial(remove_beside, trainer) if beside else None,
            check_loaded=functools.partial(check_stored, self.state_key, pl_module),
            before_load=functools.partial(average_the_trained, trainer, pl_module),
            at_end=self._write_results,
        )
        refuse_copies(pl_module)

    # -- checks at the start ------------------------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that exactly the adapter and ``also_train`` are going to be trained."""
        layers = adapted_layers(pl_module)
        refuse_merged(layers)
        warn(self._advice)
        wake(pl_module)
        also_train = self.report.also_train if self.report else []
        check_bases(trainer, pl_module)
        refuse_infinite(pl_module, also_train, self._engine)
        average_the_trained(trainer, pl_module)
        record_fingerprints(pl_module)
        check_optimizers(trainer, pl_module, also_train)
        run_passes(trainer, pl_module)
        warn_about_batch_norm(pl_module, also_train)
        log_hyperparameters(trainer, pl_module, self.report, own_options(self))
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder, merge = self.output_folder(trainer), self.merge_on_save
            check_before_training(trainer, pl_module, folder, merge)
            self._ending = Ending(
                trainer,
                pl_module,
                folder,
                merge=merge,
                stop=self._stop,
                earlier=self._figures,
                label=self.config.label(),
            )
        begin = None if self._ending is None else self._ending.begin_step
        self._finite = NonFiniteCheck(self.on_nonfinite, trainer, pl_module, layers, self._engine, begin)
        odd = not self._finite.names_layers
        self._gradients = GradientCheck(layers, infinities_are_normal=odd, sharded=self._engine != "plain")

    # -- training -----------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample the frozen weights, restore the positions of loaders, and install signal handlers."""
        refuse_copies(pl_module)
        log_hyperparameters(trainer, pl_module, self.report, own_options(self), again=True)
        restore_loaders(trainer)
        if self._resume is not None:
            warn_about_loaders(trainer)
        self._accumulated.give_back(pl_module)
        self._stop.watch(trainer)
        if self._ending is not None:
            self._ending.watch = FrozenWatch(adapted_layers(pl_module)) if self._engine == "plain" else None
            self._ending.make_up_for_merged()

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the global random state on resume, so that a shuffling loader yields the order of an uninterrupted run."""
        begin_epoch(trainer, self._resume)
        self._resume = None

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the random state of training steps and start the clock."""
        count_epoch(trainer)
        self._resume = None
        if self._finite is not None:
            self._finite.before_batch()
        self._randomness.enter()
        self._clock.start()

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Any) -> None:
        """Record whether the loss is finite, and that gradients are incomplete until the batch ends."""
        self._accumulated.in_batch = True
        if self._finite is not None:
            self._finite.backward(loss)

    @override
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check after the first backward passes that every layer's adapter has a finite gradient."""
        where = f"batch {trainer.fit_loop.epoch_loop.batch_idx} in epoch {trainer.current_epoch}"
        if self._gradients is not None and self._gradients.check(where):
            self._gradients = None

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Restore the random state outside of steps; log time, throughput and norms."""
        self._randomness.leave()
        if self._ending is not None and not trainer.fit_loop.epoch_loop._should_accumulate():
            self._ending.trained, self._ending.torn = True, False
        self._accumulated.after_batch(trainer, pl_module)
        self._stop.after_batch(trainer, pl_module)
        if self.log_throughput:
            self._clock.log(trainer, pl_module, batch)
        if self.log_u_norm:
            log_u_norms(trainer, pl_module)

    # -- results ------------------------------------------------------------------------------------------------------

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Check the gradients before they are clipped."""
        if self._finite is not None:
            self._finite.before_clipping(optimizer)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop before a validation if a stop is requested."""
        self._stop.before_validation(trainer)

    @override
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop inside a validation if a stop is requested."""
        self._stop.in_validation(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the former signal handlers."""
        self._stop.release()

    def _write_results(self) -> None:
        """Write the results after every ``on_train_end``, where averaging callbacks set weights, and before teardown."""
        if self._ending is not None:
            self._ending.finish()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save a checkpoint and the adapter as trained so far."""
        self._stop.agreed = self._stop.agreed or isinstance(exception, NonFiniteError)  # raised on all ranks
        if self._ending is not None:
            self._ending.stopped(exception)
            self._ending = None

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove hooks and signal handlers, and write nothing from here on."""
        forget_passes(trainer)
        self._stop.release()
        if self._finite is not None:
            self._finite.close()
            self._finite = None
        if self._ending is not None:
            self._ending.look_for_late_changes()
            self._ending.disarm()
            self._ending = None

    def before_results(self, trainer: L.Trainer, state: Mapping[str, Any]) -> None:
        """Convert the module of the launching process, which loads the state dict of the trained module next."""
        self.report = convert_like(trainer, state, self.config)

    def output_folder(self, trainer: L.Trainer) -> Path:
        """Folder of the results: ``output_dir``, else the log directory; call it on all ranks."""
        return self.output_dir or local_folder(trainer.log_dir or trainer.default_root_dir, "adapter and merged model")

    # -- state --------------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """Random states of all ranks, so that dropout resumes exactly; metrics for the model card; accumulated gradients."""
        state: dict[str, Any] = {"random_states": self._randomness.states_of_ranks()}
        if (ending := self._ending) is not None:
            state["figures"] = ending.figures()
            state["accumulated"] = self._accumulated.state(ending.trainer, ending.module)
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._figures.update(state_dict.get("figures", {}))
        self._accumulated.load(state_dict.get("accumulated", {}))
        self._resume = self._randomness.load_of_ranks(state_dict["random_states"])
