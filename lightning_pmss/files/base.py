"""Find the base of a model: its name, its folder on this machine, its commit on the model hub."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import NamedTuple

from torch import nn

from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.conversion.roots import adapted_root
from lightning_pmss.files.hub_cache import Snapshot, snapshot_at, snapshot_of, snapshots
from lightning_pmss.layers.adapted import AdaptedLinear
from lightning_pmss.layers.fingerprint import fingerprint, same_base
from lightning_pmss.store.shards import open_shards

_COMPARED = 3  # layers compared to distinguish two snapshots of one repository


class Base(NamedTuple):
    """Origin of a base.

    Attributes:
        name: Id on the hub, or path; None if it was not recorded.
        folder: Folder of its files, possibly in the hub's cache; None if there is none.
        revision: Commit on the hub.
    """

    name: str | None = None
    folder: Path | None = None
    revision: str | None = None


def base_of(model: nn.Module) -> Base:
    """Find the base of the Hugging Face model in ``model``, from its config and the hub's cache."""
    config = getattr(adapted_root(model)[0], "config", None)
    name = getattr(config, "_name_or_path", None)
    if not isinstance(name, str) or not name:
        return Base()
    recorded = getattr(config, "_commit_hash", None)  # set by our loader, and by transformers before its version 5
    folder = Path(name).expanduser()
    if folder.is_dir():
        snapshot = snapshot_at(folder)
        return Base(name, folder, recorded) if snapshot is None else Base(snapshot.name, folder, snapshot.commit)
    found = snapshot_of(name, recorded) if recorded is not None else _loaded(name, model)
    return Base(name, None, recorded) if found is None else Base(name, found.folder, found.commit)


def _loaded(name: str, model: nn.Module) -> Snapshot | None:
    """Find the snapshot that a model was loaded from, by its weights: without a commit, the config has only the id."""
    candidates = snapshots(name)
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    layers = dict(islice(adapted_layers(model).items(), _COMPARED))
    return next((snapshot for snapshot in candidates if _has_weights(snapshot.folder, layers)), None)


def _has_weights(folder: Path, layers: dict[str, AdaptedLinear]) -> bool:
    """Whether a folder's weights are those of the layers."""
    if not layers:
        return False
    try:
        with open_shards(folder) as reader:
            for name, layer in layers.items():
                own = f".{name}.weight"  # either name may have the model's base prefix
                key = next((k for k in reader.matrices if f".{k}".endswith(own) or own.endswith(f".{k}")), None)
                if key is None or reader.matrices[key].shape != tuple(layer.weight.shape):
                    return False
                stored = reader.read(key)
                canonical = layer.layout.canonical(stored)
                known = layer.fingerprint or fingerprint(*layer.reads())
                cpu = {name: index.cpu() for name, index in layer.indices().items()}
                if not same_base(known, *layer.reads_of(canonical, cpu)):
                    return False
    except (OSError, ValueError, TypeError):  # no safetensors, damaged or quantised: nothing to compare
        return False
    return True
