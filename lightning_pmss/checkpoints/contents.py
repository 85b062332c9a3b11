"""Save and load Lightning checkpoints of a converted model, under every strategy.

A checkpoint contains the trained tensors (V, ``also_train``), indices, the model's buffers, and Lightning's optimizer, loop and
callback states, but no frozen weights. Wrapped methods of the strategy filter it: Lightning skips callback hooks for
``save_weights_only=True``, and a hook on the module's state dict would change it for users.

    single device, DDP    one file; `save_checkpoint` filters the state dict, `load_model_state_dict` checks it
    FSDP1, FSDP2          file or folder; while the strategy saves or loads, the module's state dict has only trained tensors
    ZeRO-2, ZeRO-3        folder; the engine leaves out frozen parameters (``exclude_frozen_parameters``)

A file or folder is written under another name and renamed when complete, so that a killed run keeps its last checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_pmss.checkpoints.checks import (
    Record,
    check,
    check_state,
    refuse_nonfinite,
    refuse_strangers,
    same_print,
)
from lightning_pmss.checkpoints.module_states import holding, make_whole, module_states
from lightning_pmss.checkpoints.plugin import local_path, refuse_other_folders, use_atomic_files
from lightning_pmss.checkpoints.reading import (
    DAMAGED,
    SIDECAR,
    check_content,
    describe_files,
    read_checkpoint,
    read_sidecar,
    refuse_changed_parts,
    refuse_flipped_bits,
    refusing_damage,
)
from lightning_pmss.checkpoints.record import METADATA, CheckpointRecord, read_record
from lightning_pmss.checkpoints.training_state import check_progress, check_training_state, loading_optimizers
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.conversion.converted import frozen_but_fresh
from lightning_pmss.distributed.gathering import gathered, load_trained_state, trained_state
from lightning_pmss.distributed.optimizer_names import finding_states
from lightning_pmss.distributed.ranks import together
from lightning_pmss.distributed.sharding import Engine, engine_of
from lightning_pmss.layers.expert_layer import one_by_one
from lightning_pmss.layers.fingerprint import fingerprint
from lightning_pmss.layers.indices import index_tensors
from lightning_pmss.layers.parts import clean_name, clean_state, fill, is_sharded, whole_shape
from lightning_pmss.store import not_finite, refuse_unreadable
from lightning_pmss.store.disk import beside, put, relink, sync_tree

_LOOPS = {
    TrainerFn.FITTING: "fit_loop",
    TrainerFn.VALIDATING: "validate_loop",
    TrainerFn.TESTING: "test_loop",
    TrainerFn.PREDICTING: "predict_loop",
}


def trained_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Whole shapes of the tensors that a checkpoint contains, by clean name in ``module.state_dict()``.

    These are trained parameters, buffers, indices, and frozen parameters that the base's files lack. A tensor with several
    names (tied, or of a module that is also a child in compiled form) has its first. Call it before a strategy wraps the
    module, when names and shapes are the plain ones.
    """
    kept = frozen_but_fresh(module)
    live: dict[str, Tensor] = {
        clean_name(n): p for n, p in module.named_parameters() if p.requires_grad or clean_name(n) in kept
    }
    live |= {clean_name(n): b for n, b in module.named_buffers()} | index_tensors(module)
    first = {id(tensor): name for name, tensor in reversed(live.items())}
    return {k: whole_shape(live[k]) for k in clean_state(module) if k in live and first[id(live[k])] == k}


def record_fingerprints(module: nn.Module) -> None:
    """Compute missing fingerprints of the base, unless its weights are on the meta device; a collective if sharded."""
    lacking = {n: x for n, x in adapted_layers(module).items() if x.fingerprint is None and not x.weight.is_meta}
    for _, layer in one_by_one(lacking.items()):
        layer.fingerprint = fingerprint(*layer.reads())


class CheckpointSeam:
    """Wrap the checkpoint methods of one strategy object; `remove` restores them.

    Args:
        trainer: Trainer with the strategy, which has not wrapped the module yet (or shards it without wrappers).
        module: The converted LightningModule.
        describe: Makes the checkpoint's `METADATA` entry; called on every rank with the module and `trained_shapes`.
        announce: Called with each checkpoint before it is written, and the module; may add entries.
        after_save: Called on every rank with the checkpoint's path after each save.
        after_remove: Called on every rank with the path of each removed checkpoint.
        check_loaded: Called with each checkpoint that was read, and its name for messages, before anything of it is used
            (folders: after the engine has loaded it); raises ValueError.
        before_load: Called before the weights of a checkpoint are loaded, after ``configure_model``.
        at_end: Called on every rank at the end of training, after the ``on_train_end`` of all callbacks and the module.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        describe: Callable[[nn.Module, Mapping[str, tuple[int, ...]]], dict[str, Any]],
        announce: Callable[[dict[str, Any], L.LightningModule], None],
        after_save: Callable[[Path], None] | None = None,
        after_remove: Callable[[Path], None] | None = None,
        check_loaded: Callable[[Mapping[str, Any], str], None] | None = None,
        before_load: Callable[[], None] | None = None,
        at_end: Callable[[], None] | None = None,
    ) -> None:
        self.trainer, self.module = trainer, module
        self.trained, self.known = trained_shapes(module), set(clean_state(module))
        self._masks = not_finite({clean_name(n): b for n, b in module.named_buffers() if not b.is_meta})
        if engine_of(trainer.strategy) in ("fsdp1", "zero"):  # these engines save no frozen parameters
            self.trained = {k: shape for k, shape in self.trained.items() if k not in frozen_but_fresh(module)}
        self.strategy = trainer.strategy
        self.engine: Engine = engine_of(self.strategy)
        self.describe, self.announce, self.after_save, self.after_remove = describe, announce, after_save, after_remove
        self.check_loaded, self.before_load, self.at_end = check_loaded, before_load, at_end
        self._source = "the checkpoint"  # name of the one being loaded, for messages
        self._newest: Path | None = None  # file or folder saved last
        use_atomic_files(self.strategy)
        self._metadata: dict[str, Any] = {}  # cached: hashing takes time, and changes only after loading
        self._inner = {name: getattr(self.strategy, name) for name in self._methods()}
        self._patched = {name: getattr(self, f"_{name}") for name in self._inner}
        for name, function in self._patched.items():
            setattr(self.strategy, name, function)

    def remove(self) -> None:
        for name, function in self._patched.items():
            if self.strategy.__dict__.get(name) is function:
                delattr(self.strategy, name)

    def _methods(self) -> list[str]:
        common = ["save_checkpoint", "remove_checkpoint", "on_train_end"]
        if self.engine == "plain":
            return [*common, "load_checkpoint", "load_model_state_dict", "load_optimizer_state_dict"]
        return [*common, "load_checkpoint"] + (["lightning_module_state_dict"] if self.engine != "zero" else [])

    # -- saving ---------------------------------------------------------------------------------------------------

    def _lightning_module_state_dict(self) -> dict[str, Any]:
        with self._only_trained():
            state: dict[str, Any] = self._inner["lightning_module_state_dict"]()
        return {clean_name(k): v for k, v in state.items() if clean_name(k) in self.trained}

    def _save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        states = module_states(checkpoint, self.trained, self.known)
        states = {name: {k: v for k, v in state.items() if k in self.trained} for name, state in states.items()}
        refuse_nonfinite(self.module, states if self.engine == "plain" else {}, filepath, self._masks)
        if self.engine == "plain":
            states = {name: self._short_indices(state) for name, state in states.items()}
        checkpoint = checkpoint | states | {METADATA: self._describe()}
        self.announce(checkpoint, self.module)
        where = self.strategy.broadcast(filepath)
        path = local_path(where)
        if path is None:
            self._inner["save_checkpoint"](checkpoint, where, storage_options)
            return
        # Before it writes one file, FSDP removes a folder of that name, the last good checkpoint of a run with shards.
        if self._writes_folders() or (self.engine != "plain" and path.is_dir()):
            self._save_beside(checkpoint, path, storage_options)
        else:
            together(self.strategy, lambda: self._inner["save_checkpoint"](checkpoint, path, storage_options))
        self._newest = path
        if self.after_save is not None:
            with holding(self.module, states["state_dict"] if self.engine == "plain" else {}):
                self.after_save(path)

    def _short_indices(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Convert indices to int32: as int64 they would be 1.6 % of U at rank 256. Loading copies them into int64."""
        short = index_tensors(self.module)
        return {k: v.to(torch.int32) if k in short else v for k, v in state.items()}

    def _save_beside(self, checkpoint: dict[str, Any], path: Path, storage_options: Any) -> None:
        """Let the strategy write a hidden sibling, on all ranks, which then replaces the last checkpoint."""
        folder, first = self._writes_folders(), self.strategy.is_global_zero

        def begin() -> Path:
            if not first:
                return path
            refuse_other_folders(path)
            new = stack.enter_context(beside(path))
            if folder:
                new.mkdir()
            return new

        def put_in_place() -> None:
            if folder:
                about = checkpoint[METADATA] | {"tensors": {k: list(v) for k, v in self.trained.items()}}
                about["files"] = describe_files(writing)
                (writing / SIDECAR).write_text(json.dumps(about), encoding="utf-8")
                sync_tree(writing)
            put(writing, path)

        with ExitStack() as stack:
            writing = Path(self.strategy.broadcast(together(self.strategy, begin)))
            with self._only_trained() if self.engine == "zero" else nullcontext():
                together(self.strategy, lambda: self._inner["save_checkpoint"](checkpoint, writing, storage_options))
            together(self.strategy, lambda: put_in_place() if first else None)

    def _writes_folders(self) -> bool:
        sharded = getattr(self.strategy, "_state_dict_type", None) == "sharded"  # FSDP1
        return self.engine == "zero" or sharded or bool(getattr(self.strategy, "_save_distributed_checkpoint", False))

    def _describe(self) -> dict[str, Any]:
        """The checkpoint's `METADATA` entry, as plain values."""
        if not self._metadata:
            self._metadata = self.describe(self.module, self.trained)
        return dict(self._metadata)

    def _remove_checkpoint(self, filepath: Any) -> None:
        path = local_path(filepath)
        if path is not None and self.strategy.is_global_zero:
            self._keep_last_link(path)
        try:
            self._inner["remove_checkpoint"](filepath)
        except OSError as error:  # the training continues, and the old checkpoint stays
            rank_zero_warn(f"The old checkpoint {filepath} could not be removed: {error}")
        if path is not None and self.after_remove is not None:
            self.after_remove(path)

    def _keep_last_link(self, removed: Path) -> None:
        """Move the link of ModelCheckpoint(save_last="link") before its target is removed; a kill in between would lose it."""
        for callback in self.trainer.checkpoint_callbacks:
            link = Path(getattr(callback, "last_model_path", ""))
            if link.is_symlink() and self._newest not in (None, removed) and link.resolve() == removed.resolve():
                relink(link, self._newest)  # type: ignore[arg-type]

    def _on_train_end(self) -> None:
        self._inner["on_train_end"]()
        if self.at_end is not None:
            self.at_end()

    # -- loading --------------------------------------------------------------------------------------------------

    def _load_model_state_dict(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        if self.before_load is not None:
            self.before_load()
        state = {clean_name(key): value for key, value in checkpoint["state_dict"].items()}
        made = read_record(checkpoint.get(METADATA), self._source)
        stored = {k: tuple(v.shape) for k, v in state.items()}
        check(self.module, self.trained, self.known, stored, made, self._source)
        # DDP broadcasts rank 0's weights only after this, so the other ranks' weights may still differ.
        if self.strategy.is_global_zero:
            check_state(self.module, made, state, self._source)
        self._metadata = {}
        # `check` has compared all trained tensors.
        make_whole(checkpoint, self.module, self.trained, self.known)
        self._inner["load_model_state_dict"](checkpoint, strict=False)

    def _load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        with loading_optimizers(self.strategy.optimizers, checkpoint, self._source):
            self._inner["load_optimizer_state_dict"](checkpoint)

    def _load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return (
            self._load_whole(checkpoint_path, weights_only)
            if self.engine == "plain"
            else self._load_parts(checkpoint_path, weights_only)
        )

    def _load_whole(self, checkpoint_path: Any, weights_only: bool | None) -> dict[str, Any]:
        """Read a checkpoint file; Lightning loads the model from it later."""
        self._source, path = f"the checkpoint {checkpoint_path}", local_path(checkpoint_path)
        if path is not None and path.is_dir():
            raise ValueError(
                f"{self._source} is a folder, as FSDP and DeepSpeed write them. Resume with the strategy that wrote it, or"
                " write its adapter by `python -m lightning_pmss extract` and load that."
            )
        if path is not None:
            refuse_unreadable(path)
        with refusing_damage(checkpoint_path):
            loaded: dict[str, Any] = self._inner["load_checkpoint"](checkpoint_path, weights_only)
        check_content(loaded, self._source)
        if path is not None:
            refuse_flipped_bits(path)
        read_record(loaded.get(METADATA), self._source)
        stage = self.trainer.state.fn or TrainerFn.FITTING
        if stage is TrainerFn.FITTING:
            check_training_state(loaded, self._source)
        loop: Any = getattr(self.trainer, name := _LOOPS[stage])
        check_progress(loaded, name, loop.state_dict(), self._source)
        if self.check_loaded is not None:
            self.check_loaded(loaded, self._source)
        return loaded

    def _load_parts(self, checkpoint_path: Any, weights_only: bool | None) -> dict[str, Any]:
        """Load a file or folder of an engine, together with the model."""
        path = Path(self.strategy.broadcast(checkpoint_path))
        stage = self.trainer.state.fn or TrainerFn.FITTING
        if (
            isinstance(self.strategy, DeepSpeedStrategy)
            and self.strategy.zero_stage_3
            and stage is not TrainerFn.FITTING
        ):
            raise MisconfigurationException(
                f"DeepSpeed cannot load a ZeRO-3 checkpoint for `{stage.value}`. Evaluate right after `fit` in the same process"
                " (without ckpt_path), or the adapter or merged folder of the run on one device or under DDP."
            )
        where = f"the checkpoint {path}"
        stored, made = read_description(path, where)
        if isinstance(made, CheckpointRecord) and made.files is not None:
            parts = made.files
            together(self.strategy, lambda: refuse_changed_parts(path, parts) if self.strategy.is_global_zero else None)
        check(self.module, self.trained, self.known, stored, made, where)
        before = {
            n: {part: index.clone() for part, index in layer.indices().items()}
            for n, layer in adapted_layers(self.module).items()
        }
        self._metadata = {}
        fitting = stage is TrainerFn.FITTING
        with finding_states(self.engine, self.module, path, fitting=fitting), self._only_trained():
            loaded: dict[str, Any] = self._inner["load_checkpoint"](path, weights_only)
        if path.is_file():
            self._load_by_clean_names(path)
        self._follow_indices(before)
        record_fingerprints(self.module)
        here: dict[str, Any] = {n: x.fingerprint for n, x in adapted_layers(self.module).items()}
        refuse_strangers([n for n in here if not same_print(here[n], made.prints[n])], where)
        if self.check_loaded is not None:
            self.check_loaded(loaded, where)
        return loaded

    def _load_by_clean_names(self, path: Path) -> None:
        """Load the tensors of a single file that Lightning skips, such as indices: it matches full names of parameters."""
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
        state = {clean_name(key): value for key, value in state.items()}
        places: dict[str, Tensor] = dict(index_tensors(self.module))
        if self.engine == "fsdp2":
            places |= {clean_name(name): p for name, p in self.module.named_parameters()}
        for name in self.trained:
            if name in places:
                fill(places[name], state[name])

    def _follow_indices(self, before: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Derive the frozen tensors of layers again whose indices the checkpoint changed.

        The selection may differ between machines.
        """
        root: Any = self.strategy.model
        moved = {
            name: layer
            for name, layer in adapted_layers(self.module).items()
            if any(not torch.equal(before[name][part].to(now.device), now) for part, now in layer.indices().items())
        }
        for name, layer in one_by_one(moved.items()):
            with gathered(root, layer, write=True):
                layer.rederive(name)
                layer.fingerprint = fingerprint(*layer.reads())

    @contextmanager
    def _only_trained(self) -> Iterator[None]:
        """Limit the state dict of the strategy's module to trained tensors inside the ``with`` block."""
        root: Any = self.module if self.engine == "zero" else self.strategy.model
        if self.engine == "plain" or (self.engine != "zero" and not is_sharded(root)):
            yield
            return
        root.state_dict = lambda *args, **kwargs: trained_state(root, self.trained)
        root.load_state_dict = lambda state, *args, **kwargs: load_trained_state(root, state)
        try:
            yield
        finally:
            del root.state_dict, root.load_state_dict


def read_description(path: Path, where: str) -> tuple[dict[str, tuple[int, ...]], Record]:
    """(shapes by key, metadata) of a checkpoint file or folder; reads no tensors of a folder."""
    if path.is_dir():
        about = read_record(read_sidecar(path), where)
        if about.tensors is None:
            raise ValueError(f"{where} is damaged: {SIDECAR} has no `tensors`. {DAMAGED}")
        return {clean_name(k): tuple(v) for k, v in about.tensors.items()}, about
    content = read_checkpoint(path)
    return {clean_name(k): tuple(v.shape) for k, v in content["state_dict"].items()}, read_record(
        content.get(METADATA), where
    )
