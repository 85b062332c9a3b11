"""Read a HiRA of peft's format as an adapter of ours: ``W' = W (.) (1 + hira_B hira_A)``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning_pmss.files.adapter_file import CONFIG_FILE, WEIGHTS_FILE, AdapterFile, AdapterModule
from lightning_pmss.files.peft_folder import (
    AGAIN,
    PeftRecord,
    adapter_file,
    base_weights,
    drop_copies,
    layer_options,
    read_weights,
    refuse_fields,
    sort_tensors,
    transposed_layers,
)
from lightning_pmss.layers.fingerprint import fingerprint
from lightning_pmss.layers.layout import Layout
from lightning_pmss.methods.hira import HiRAConfig, HiRAUpdate
from lightning_pmss.store import checked
from lightning_pmss.store.shards import ShardReader

_ENDS = {"hira_A": "A", "hira_B": "B"}
_IN_TRAINING = ("hira_dropout", "init_weights")


class HiraRecord(PeftRecord):
    """The fields that HiRA has beside."""

    peft_type: Literal["HIRA"]
    r: int = 0  # shows in the tensors
    fan_in_fan_out: bool = False


def read_hira(folder: Path, content: Any, reader: ShardReader) -> AdapterFile:
    """Read and check a folder of HiRA. It is bound to its base, of which a fingerprint is made.

    Args:
        folder: With both files.
        content: Of its config.
        reader: The base's files.

    Raises:
        ValueError: Layers that are not linear, damaged files, or layers that the base does not have.
    """
    where = str(folder / CONFIG_FILE)
    record = checked(HiraRecord, content, where, AGAIN)
    refuse_fields(record, "HiRA", where, _IN_TRAINING)
    file = str(folder / WEIGHTS_FILE)
    pairs, full = sort_tensors(read_weights(folder), "HiRA", _ENDS, ("hira_",), file)
    drop_copies(pairs, full, "HiRA", folder, reader)
    shapes = {name: (pair["B"].shape[0], pair["A"].shape[-1]) for name, pair in pairs.items()}
    transposed = transposed_layers(shapes, record.fan_in_fan_out, "HiRA", folder, reader)
    modules = {}
    for name, stored in base_weights(pairs, "HiRA", folder, reader):
        tensors = {part: tensor.float() for part, tensor in pairs[name].items()}
        layout = Layout.CONV1D if name in transposed else Layout.LINEAR
        weight = layout.canonical(stored)
        shape = weight.shape[0], weight.shape[1]
        if reason := HiRAUpdate.why_not(shape, tensors):
            raise ValueError(f"{file}: {name}.{reason}. {AGAIN}")
        update = HiRAUpdate(**tensors).narrowed(shape)
        modules[name] = AdapterModule(shape, layout, fingerprint(*update.read(weight)), update)
    options = HiRAConfig(**layer_options({n: m.update.rank for n, m in modules.items()}, full))
    return adapter_file(folder, record, options, modules, full)
