"""What a Lightning checkpoint of a converted model holds, and how it comes back.

A checkpoint holds what is trained (V, indices, ``also_train``), the model's buffers, and Lightning's own optimizer, loop and
callback state; the frozen weights stay where they came from. The filter sits on the strategy's public ``save_checkpoint``
and ``load_model_state_dict``: callback hooks are skipped for ``save_weights_only=True``, and a hook on the module's state
dict would change what users see. Other strategies plug in here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from lightning_pmss.conversion import conversion_of, pmss_layers
from lightning_pmss.fingerprint import fingerprint, same_base
from lightning_pmss.messages import some

METADATA = "pmss"
FORMAT_VERSION = 1
# What V means; a checkpoint with other values than the run's must not be loaded. Shapes tell the rest.
_MEANING = ("coordinates", "scale")


def trained_keys(module: nn.Module) -> set[str]:
    """Keys of ``module.state_dict()`` that a checkpoint keeps: everything but frozen parameters."""
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return set(module.state_dict()) - frozen


def metadata(module: nn.Module) -> dict[str, Any]:
    """Plain values that make a checkpoint say what its V means and which base it belongs to."""
    report = conversion_of(module)
    assert report is not None
    prints = {n: fingerprint(layer.weight_rows(), layer.weight_columns()) for n, layer in pmss_layers(module).items()}
    return {"format_version": FORMAT_VERSION, "config": report.config.to_dict(), "fingerprints": prints}


def check(module: nn.Module, checkpoint: Mapping[str, Any], *, compare_base: bool = True) -> None:
    """Refuse a checkpoint that does not fit the converted module, before anything is loaded.

    Args:
        module: The converted module.
        checkpoint: A Lightning checkpoint.
        compare_base: Whether to compare the base's fingerprints too.

    Raises:
        ValueError: It lacks trained tensors, holds foreign ones, has other shapes, or another meaning or base.
    """
    state: Mapping[str, Tensor] = checkpoint["state_dict"]
    own = module.state_dict()
    trained = trained_keys(module)
    if not any(key in state for key in trained if key.endswith("core.weight")):
        raise ValueError(
            "the checkpoint holds no PMSS adapter (no `*.core.weight` key); it was made without PMSSCallback. To start"
            " from its weights, load them into the model before the Trainer runs, and drop ckpt_path."
        )
    problems = []
    if missing := sorted(trained - set(state)):
        problems.append(f"lacks {some(missing)}")
    if foreign := sorted(set(state) - set(own)):
        problems.append(f"holds {some(foreign)}, which this model does not have")
    shapes = [k for k in sorted(set(state) & set(own)) if state[k].shape != own[k].shape]
    if shapes:
        k = shapes[0]
        problems.append(
            f"holds `{k}` of shape {tuple(state[k].shape)} where this run has {tuple(own[k].shape)} ({len(shapes)} such)"
        )
    made: Mapping[str, Any] = checkpoint.get(METADATA, {})
    config = conversion_of(module).config.to_dict()  # type: ignore[union-attr]
    for field in _MEANING:
        if field in made.get("config", {}) and made["config"][field] != config[field]:
            problems.append(f"was made with {field}={made['config'][field]!r}, this run has {config[field]!r}")
    if problems:
        raise ValueError(
            f"the checkpoint does not fit this run: it {'; it '.join(problems)}. Use the options of the run that made it."
        )
    strangers = []
    for prefix, layer in _named(module) if compare_base else ():
        record = made.get("fingerprints", {}).get(prefix[0])
        if record is not None:
            w = layer.base_weight()
            rows, cols = (state[f"{prefix[1]}{what}"].to(w.device) for what in ("rows", "cols"))
            if not same_base(record, w[rows], w[:, cols]):
                strangers.append(prefix[0])
    if strangers:
        raise ValueError(
            f"the checkpoint belongs to another base model: the rows and columns of {some(strangers)} differ from those it"
            " was trained on. Load the weights that the run started from."
        )


class CheckpointSeam:
    """Puts the filter on one strategy object, and takes it off again.

    Args:
        strategy: The Trainer's strategy.
        module: The converted LightningModule.
        after_save: Called on every rank with the checkpoint's path after each save.
        after_remove: The same after ModelCheckpoint removed one.
    """

    def __init__(
        self,
        strategy: Strategy,
        module: L.LightningModule,
        after_save: Callable[[Path], None] | None = None,
        after_remove: Callable[[Path], None] | None = None,
    ) -> None:
        self.strategy = strategy
        save, load, remove = strategy.save_checkpoint, strategy.load_model_state_dict, strategy.remove_checkpoint
        described: dict[
            str, Any
        ] = {}  # hashing the slices takes time, and they only change when a checkpoint is loaded

        def save_checkpoint(checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
            keep = trained_keys(module)
            kept = {k: v for k, v in checkpoint["state_dict"].items() if k in keep}
            described.update({} if described else metadata(module))
            save(checkpoint | {"state_dict": kept, METADATA: dict(described)}, filepath, storage_options)
            if after_save is not None:
                after_save(Path(filepath))

        def load_model_state_dict(checkpoint: Mapping[str, Any], strict: bool = True) -> None:
            # Under DDP rank 0's weights are sent to all ranks, but only after this: those of the others do not count yet.
            check(module, checkpoint, compare_base=strategy.is_global_zero)
            described.clear()
            load(checkpoint, strict=False)  # `check` was strict both ways about everything that counts

        def remove_checkpoint(filepath: Any) -> None:
            remove(filepath)
            if after_remove is not None:
                after_remove(Path(filepath))

        self._patched = {f.__name__: f for f in (save_checkpoint, load_model_state_dict, remove_checkpoint)}
        for name, function in self._patched.items():
            setattr(strategy, name, function)

    def remove(self) -> None:
        for name, function in self._patched.items():
            if self.strategy.__dict__.get(name) is function:
                delattr(self.strategy, name)


def _named(module: nn.Module) -> list[tuple[tuple[str, str], Any]]:
    """((canonical name, prefix in ``module.state_dict()``), layer) of the converted layers."""
    full = {id(m): f"{n}." if n else "" for n, m in module.named_modules()}
    return [((name, full[id(layer)]), layer) for name, layer in pmss_layers(module).items()]
