"""What a Lightning checkpoint of a converted model holds, and how it comes back, under every strategy.

A checkpoint holds what is trained (V, indices, ``also_train``), the model's buffers, and Lightning's own optimizer, loop and
callback state; the frozen weights stay where they came from. The filter sits on the strategy's own methods: callback
hooks are skipped for ``save_weights_only=True``, and a hook on the module's state dict would change what users see.

    single device, DDP    one file; `save_checkpoint` filters the state dict, `load_model_state_dict` checks it
    FSDP1, FSDP2          file or folder; while the strategy saves or loads, the module shows only what is trained
    ZeRO-2, ZeRO-3        folder; the engine leaves out frozen parameters (``exclude_frozen_parameters``)

A file or folder is written under another name and put in place when it is complete, so that a killed run leaves the last one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_pmss.checkpoint_io import local_path, use_atomic_files
from lightning_pmss.conversion import conversion_of, pmss_layers
from lightning_pmss.disk import clean_leftovers, relink, remove, replace, sync_tree, temporary_sibling
from lightning_pmss.fingerprint import fingerprint, same_base
from lightning_pmss.gathering import gathered, load_trained_state, trained_state
from lightning_pmss.guard import refuse_disabled
from lightning_pmss.indices import index_tensors
from lightning_pmss.messages import some
from lightning_pmss.module_states import holding, make_whole, module_states
from lightning_pmss.ranks import together
from lightning_pmss.sharding import Engine, engine_of
from lightning_pmss.whole import is_sharded, whole_shape

METADATA = "pmss"
SIDECAR = "pmss.json"
FORMAT_VERSION = 1
# What V means; a checkpoint with other values than the run's must not be loaded. Shapes tell the rest.
_MEANING = ("coordinates", "scale")


def trained_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Keys of ``module.state_dict()`` that a checkpoint keeps (all but frozen parameters), with their whole shapes.

    Call it before a strategy wraps the module: names and shapes are then the plain ones.
    """
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    live = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    live |= index_tensors(module)
    return {k: whole_shape(live[k]) for k in module.state_dict() if k in live and k not in frozen}


def record_fingerprints(module: nn.Module) -> None:
    """Take the fingerprints of the base while its weights can be reached; a collective where they are kept in parts."""
    for layer in pmss_layers(module).values():
        if layer.fingerprint is None and not layer.weight.is_meta:
            layer.fingerprint = fingerprint(*layer.slices())


def check(
    module: nn.Module,
    trained: Mapping[str, tuple[int, ...]],
    known: set[str],
    stored: Mapping[str, tuple[int, ...]],
    made: Mapping[str, Any],
) -> None:
    """Refuse a checkpoint that does not fit the converted module, before anything is loaded.

    Args:
        module: The converted module.
        trained: Keys and shapes that it needs, from `trained_shapes`.
        known: All keys of its state dict.
        stored: Keys and shapes that the checkpoint holds.
        made: The checkpoint's metadata.

    Raises:
        ValueError: It lacks trained tensors, holds foreign ones, has other shapes, or another meaning.
    """
    if not any(key in stored for key in trained if key.endswith("core.weight")):
        raise ValueError(
            "the checkpoint holds no PMSS adapter (no `*.core.weight` key); it was made without PMSSCallback. To start"
            " from its weights, load them into the model before the Trainer runs, and drop ckpt_path."
        )
    problems = []
    if missing := sorted(set(trained) - set(stored)):
        problems.append(f"lacks {some(missing)}")
    if foreign := sorted(set(stored) - known):
        problems.append(f"holds {some(foreign)}, which this model does not have")
    shapes = [k for k in sorted(set(stored) & set(trained)) if tuple(stored[k]) != trained[k]]
    if shapes:
        k = shapes[0]
        problems.append(f"holds `{k}` of shape {tuple(stored[k])} where this run has {trained[k]} ({len(shapes)} such)")
    config = conversion_of(module).config.to_dict()  # type: ignore[union-attr]
    for field in _MEANING:
        if field in made.get("config", {}) and made["config"][field] != config[field]:
            problems.append(f"was made with {field}={made['config'][field]!r}, this run has {config[field]!r}")
    if problems:
        raise ValueError(
            f"the checkpoint does not fit this run: it {'; it '.join(problems)}. Use the options of the run that made it."
        )


def check_base(module: nn.Module, made: Mapping[str, Any], indices: Callable[[str, Any], tuple[Any, Any]]) -> None:
    """Refuse a checkpoint of another base.

    Args:
        module: The converted module, whose weights are whole here or can be gathered.
        made: The checkpoint's metadata.
        indices: ``(canonical name, layer) -> (rows, cols)`` of the checkpoint.

    Raises:
        ValueError: The rows and columns of some layers differ from those that the fingerprints were taken of.
    """
    strangers = []
    for name, layer in pmss_layers(module).items():
        if (record := made.get("fingerprints", {}).get(name)) is not None:
            rows, cols = indices(name, layer)
            w = layer.base_weight()
            if not same_base(record, w[rows.to(w.device)], w[:, cols.to(w.device)]):
                strangers.append(name)
    _refuse_strangers(strangers)


def _refuse_strangers(strangers: list[str]) -> None:
    if strangers:
        raise ValueError(
            f"the checkpoint belongs to another base model: the rows and columns of {some(strangers)} differ from those it"
            " was trained on. Load the weights that the run started from."
        )


class CheckpointSeam:
    """Puts our part on one strategy object, and takes it off again.

    Args:
        trainer: Its strategy is the one; it has not wrapped the module yet (or shards it without wrappers).
        module: The converted LightningModule.
        after_save: Called on every rank with the checkpoint's path after each save.
        after_remove: The same after ModelCheckpoint removed one.
        before_load: Called before the weights of a checkpoint are loaded, when the module has its layers.
        at_end: Called on every rank when a training has ended and all callbacks' and the module's ``on_train_end`` are done.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        after_save: Callable[[Path], None] | None = None,
        after_remove: Callable[[Path], None] | None = None,
        before_load: Callable[[], None] | None = None,
        at_end: Callable[[], None] | None = None,
    ) -> None:
        self.trainer, self.module = trainer, module
        self.trained, self.known = trained_shapes(module), set(module.state_dict())
        self.strategy = trainer.strategy
        self.engine: Engine = engine_of(self.strategy)
        self.after_save, self.after_remove = after_save, after_remove
        self.before_load, self.at_end = before_load, at_end
        self._newest: Path | None = None  # the file or folder that was saved last
        use_atomic_files(self.strategy)
        self._metadata: dict[str, Any] = {}  # hashing the slices takes time, and they only change when one is loaded
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
            return [*common, "load_model_state_dict"]
        return [*common, "load_checkpoint"] + (["lightning_module_state_dict"] if self.engine != "zero" else [])

    # -- saving ---------------------------------------------------------------------------------------------------

    def _lightning_module_state_dict(self) -> dict[str, Any]:
        with self._only_trained():
            state: dict[str, Any] = self._inner["lightning_module_state_dict"]()
        return {k: v for k, v in state.items() if k in self.trained}

    def _save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        refuse_disabled(pmss_layers(self.module).values(), "saved")
        states = module_states(checkpoint, self.trained, self.known) | {"state_dict": checkpoint["state_dict"]}
        states = {name: {k: v for k, v in state.items() if k in self.trained} for name, state in states.items()}
        if self.engine == "plain":
            states = {name: self._short_indices(state) for name, state in states.items()}
        checkpoint = checkpoint | states | {METADATA: self._describe()}
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
        """Rows and columns as int32: in int64 they are 1.6 % of what rank 256 trains. Loading copies them into int64."""
        short = index_tensors(self.module)
        return {k: v.to(torch.int32) if k in short else v for k, v in state.items()}

    def _save_beside(self, checkpoint: dict[str, Any], path: Path, storage_options: Any) -> None:
        """Let the strategy write a hidden sibling, on all ranks, and put it in the place of the last checkpoint."""
        folder, first = self._writes_folders(), self.strategy.is_global_zero

        def begin() -> tuple[Path, int | None]:
            if not first:
                return path, None
            path.parent.mkdir(parents=True, exist_ok=True)
            clean_leftovers(path)
            return temporary_sibling(path, folder=folder)

        def put_in_place() -> None:
            if folder:
                about = checkpoint[METADATA] | {"tensors": {k: list(v) for k, v in self.trained.items()}}
                (writing / SIDECAR).write_text(json.dumps(about), encoding="utf-8")
                sync_tree(writing)
            replace(writing, path)

        writing, lock = together(self.strategy, begin)
        try:
            writing = Path(self.strategy.broadcast(writing))
            together(self.strategy, lambda: self._inner["save_checkpoint"](checkpoint, writing, storage_options))
            together(self.strategy, lambda: put_in_place() if first else None)
        except BaseException:
            if first:
                remove(writing)
            raise
        finally:
            if lock is not None:
                os.close(lock)

    def _writes_folders(self) -> bool:
        sharded = getattr(self.strategy, "_state_dict_type", None) == "sharded"  # FSDP1
        return self.engine == "zero" or sharded or bool(getattr(self.strategy, "_save_distributed_checkpoint", False))

    def _describe(self) -> dict[str, Any]:
        """Plain values that make a checkpoint say what its V means and which base it belongs to."""
        if not self._metadata:
            report = conversion_of(self.module)
            assert report is not None
            prints = {
                n: dict(layer.fingerprint or fingerprint(*layer.slices()))
                for n, layer in pmss_layers(self.module).items()
            }
            self._metadata = {
                "format_version": FORMAT_VERSION,
                "config": report.config.to_dict(),
                "fingerprints": prints,
            }
        return dict(self._metadata)

    def _remove_checkpoint(self, filepath: Any) -> None:
        path = local_path(filepath)
        if path is not None and self.strategy.is_global_zero:
            self._keep_last_link(path)
        try:
            self._inner["remove_checkpoint"](filepath)
        except OSError as error:  # the training goes on with an old checkpoint too many
            rank_zero_warn(f"The old checkpoint {filepath} could not be removed: {error}")
        if path is not None and self.after_remove is not None:
            self.after_remove(path)

    def _keep_last_link(self, removed: Path) -> None:
        """ModelCheckpoint(save_last="link") moves its link only after what it points to is gone; a kill between loses it."""
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
        state, made = checkpoint["state_dict"], checkpoint.get(METADATA, {})
        check(self.module, self.trained, self.known, {k: tuple(v.shape) for k, v in state.items()}, made)
        # Under DDP rank 0's weights are sent to all ranks, but only after this: those of the others do not count yet.
        if self.strategy.is_global_zero:
            prefixes = {id(m): f"{n}." if n else "" for n, m in self.module.named_modules()}
            check_base(
                self.module, made, lambda _, x: (state[f"{prefixes[id(x)]}rows"], state[f"{prefixes[id(x)]}cols"])
            )
        self._metadata = {}
        # `check` was strict about everything that counts.
        self._inner["load_model_state_dict"](checkpoint, strict=False)
        make_whole(checkpoint, self.module, self.trained, self.known)

    def _load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
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
        stored, made = _read_description(path)
        check(self.module, self.trained, self.known, stored, made)
        before = {n: (layer.rows.clone(), layer.cols.clone()) for n, layer in pmss_layers(self.module).items()}
        self._metadata = {}
        with self._only_trained():
            loaded: dict[str, Any] = self._inner["load_checkpoint"](path, weights_only)
        if path.is_file():  # of which Lightning loads what it finds among parameters and buffers
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
            for key, indices in index_tensors(self.module).items():
                indices.copy_(state[key])
        self._follow_indices(before)
        here = self._describe()["fingerprints"]
        there = made.get("fingerprints", {})
        _refuse_strangers([n for n in here if n in there and not _same(here[n], there[n])])
        return loaded

    def _follow_indices(self, before: Mapping[str, tuple[Any, Any]]) -> None:
        """Where other hardware had selected otherwise than the run that is resumed, its indices count."""
        root: Any = self.strategy.model
        for name, layer in pmss_layers(self.module).items():
            pair = zip(before[name], (layer.rows, layer.cols), strict=True)
            if any(not torch.equal(a.to(b.device), b) for a, b in pair):
                with gathered(root, layer, write=True):
                    layer.refresh_frame(name)
                    layer.fingerprint = fingerprint(*layer.slices())

    @contextmanager
    def _only_trained(self) -> Iterator[None]:
        """While a strategy saves or loads, its module shows only what is trained."""
        root: Any = self.strategy.model
        if self.engine not in ("fsdp1", "fsdp2") or not is_sharded(root):
            yield
            return
        root.state_dict = lambda *args, **kwargs: trained_state(root, self.trained)
        root.load_state_dict = lambda state, *args, **kwargs: load_trained_state(root, state)
        try:
            yield
        finally:
            del root.state_dict, root.load_state_dict


def _same(here: Mapping[str, str], there: Mapping[str, str]) -> bool:
    """Whether two fingerprints agree in the coarser of their dtypes."""
    names = {here["dtype"], there["dtype"]}
    narrow = names - {"float32"} or names
    return any(here[n] == there[n] for n in narrow)


def _read_description(path: Path) -> tuple[dict[str, tuple[int, ...]], Mapping[str, Any]]:
    """(keys and shapes, metadata) of a checkpoint file or folder, without reading its tensors."""
    if path.is_dir():
        if not (path / SIDECAR).is_file():
            raise ValueError(f"{path} was made without PMSSCallback (it has no {SIDECAR}) or is not complete.")
        about: dict[str, Any] = json.loads((path / SIDECAR).read_text(encoding="utf-8"))
        return {k: tuple(v) for k, v in about["tensors"].items()}, about
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return {k: tuple(v.shape) for k, v in content["state_dict"].items()}, content.get(METADATA, {})
