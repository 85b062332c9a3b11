"""The adapter folder: ``adapter_model.safetensors`` and ``adapter_config.json``.

Tensors, under the module names of the outermost Hugging Face model where there is one (so that what was trained in a
LightningModule loads into the plain model), else of the model that was saved:

    <module>.U      s U [c, r], float32 (float64 on a float64 base): scale and coordinates folded in
    <module>.rows   int32 [r], rows of W in the canonical layout [out, in]
    <module>.cols   int32 [c], columns
    <name>          parameters and buffers of the modules trained in full (`also_train`)

so the file means ``W' = W + W[:, cols] U W[rows]`` and nothing else. Loading is strict both ways and checks everything
before it touches the model.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_pmss.files.shards import few

FORMAT_VERSION = 1
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PARTS = ("U", "rows", "cols")
_LAYOUTS = ("linear", "conv1d")


@dataclass(frozen=True)
class AdapterModule:
    """One layer of an adapter, in the canonical layout [out, in].

    Attributes:
        shape: (out, in) of W.
        layout: ``"linear"``: the base stores W; ``"conv1d"``: it stores W transposed.
        fingerprint: see `lightning_pmss.fingerprint`.
        U: ``s U [c, r]``.
        rows: int64 [r].
        cols: int64 [c].
    """

    shape: tuple[int, int]
    layout: str
    fingerprint: dict[str, str]
    U: Tensor
    rows: Tensor
    cols: Tensor


@dataclass(frozen=True)
class AdapterFile:
    """A read and checked adapter folder."""

    folder: Path
    config: dict[str, Any]  # the fields of PMSSConfig
    base_model: str | None
    revision: str | None
    modules: dict[str, AdapterModule]
    model_class: str | None = None  # dotted path; files of early versions lack it
    also_train: dict[str, Tensor] = field(default_factory=dict)
    tied: dict[str, list[str]] = field(default_factory=dict)  # other names of an also_train tensor
    quantisation: list[str] = field(default_factory=list)  # how the base kept its weights, such as "bitsandbytes nf4"

    def wrong_base(self, modules: list[str], base: str) -> str:
        """The message for a base that is not the one this adapter was trained on."""
        trained_on = self.base_model or "a base whose name is not recorded"
        revision = f", revision {self.revision}" if self.revision else ""
        return (
            f"{self.folder} belongs to another base: the weights of {few(modules, 3)} in {base} are not those it was "
            f"trained on ({trained_on}{revision}). Load that base, unmerged; on other weights a PMSS adapter means "
            f"nothing.{self._quantised_hint()}"
        )

    def _quantised_hint(self) -> str:
        if not self.quantisation:
            return ""
        return (
            f" It was trained on quantised weights ({', '.join(self.quantisation)}), which are not those of the checkpoint:"
            " load the base quantised the same way; for a dense model write_merged(model, folder) after load_adapter."
        )


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFile:
    """Read and check an adapter folder; needs no model.

    Raises:
        FileNotFoundError: no folder, or a file of the two is missing.
        ValueError: see `load_adapter`.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder. Give the folder that save_adapter or a training run wrote.")
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {' and '.join(missing)}: not a complete adapter folder.")
    config = _read_config(folder / CONFIG_FILE)
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    expected = {f"{name}.{part}" for name in config["modules"] for part in _PARTS} | set(config["also_train"])
    file = folder / WEIGHTS_FILE
    lost, foreign = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
    if lost or foreign:
        says = [f"lacks {few(lost)}"] if lost else []
        says += [f"holds {few(foreign)}, which {CONFIG_FILE} does not know"] if foreign else []
        raise ValueError(f"{file} {' and '.join(says)}. The two files do not belong together; copy the folder again.")
    if broken := not_finite(tensors):
        raise ValueError(f"{file}: NaN or infinite values in {few(broken)}. Use an earlier adapter or checkpoint.")
    modules = {}
    for name, entry in config["modules"].items():
        modules[name] = _checked_module(file, name, entry, *(tensors.pop(f"{name}.{part}") for part in _PARTS))
    for name, entry in config["also_train"].items():
        if list(tensors[name].shape) != entry["shape"]:
            raise ValueError(
                f"{file}: {name} has the shape {list(tensors[name].shape)}, {CONFIG_FILE} says {entry['shape']}. "
                "The two files do not belong together; copy the folder again."
            )
    return AdapterFile(
        folder=folder,
        config=config["config"],
        base_model=config.get("base_model_name_or_path"),
        revision=config.get("revision"),
        modules=modules,
        model_class=config.get("model_class"),
        also_train=tensors,
        quantisation=list(config.get("quantisation") or ()),
        tied={name: entry["tied"] for name, entry in config["also_train"].items() if entry.get("tied")},
    )


def library_versions() -> dict[str, str]:
    """Versions of what takes part in a result."""
    found = {"python": platform.python_version()}
    for name in ("lightning-pmss", "torch", "lightning", "transformers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _read_config(file: Path) -> dict[str, Any]:
    """The config, with every part that is relied on later checked."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not readable JSON ({error}); copy the folder again.") from error
    found = config.get("format_version") if isinstance(config, dict) else None
    if not isinstance(found, int) or config.get("peft_type") != "PMSS":
        kind = f" (peft_type {config['peft_type']})" if isinstance(config, dict) and "peft_type" in config else ""
        other = " peft loads it: PeftModel.from_pretrained(base, folder)." if kind and "PMSS" not in kind else ""
        raise ValueError(f"{file} does not describe a PMSS adapter{kind}.{other}")
    if found > FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {found}, and this lightning-pmss reads up to {FORMAT_VERSION}: upgrade it. "
            f"It was written with {config.get('versions')}."
        )
    try:
        for entry in config["modules"].values():
            out_features, in_features = entry["shape"]
            fine = isinstance(out_features, int) and isinstance(in_features, int) and entry["layout"] in _LAYOUTS
            if not fine or not isinstance(entry["fingerprint"]["dtype"], str):
                raise TypeError(f"bad entry {entry}")
        if not config["modules"] or not isinstance(config["config"], dict):
            raise TypeError("no modules or no config")
        if not all(isinstance(entry["shape"], list) for entry in config["also_train"].values()):
            raise TypeError("bad also_train")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} is damaged or was edited by hand ({error!r}); copy the folder again.") from error
    return dict(config)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            # Copies: a view would pin the file, which the next save replaces.
            return {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is not a complete safetensors file ({error}): truncated or damaged. Copy the folder again, or use "
            "an earlier adapter."
        ) from error


def _checked_module(
    file: Path, name: str, entry: Mapping[str, Any], u: Tensor, rows: Tensor, cols: Tensor
) -> AdapterModule:
    out_features, in_features = entry["shape"]
    for part, indices, size in (("rows", rows, out_features), ("cols", cols, in_features)):
        if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1 or not len(indices):
            raise ValueError(
                f"{file}: {name}.{part} is {indices.dtype} {list(indices.shape)}, and an index vector was expected."
            )
        if int(indices.min()) < 0 or int(indices.max()) >= size:
            raise ValueError(f"{file}: {name}.{part} holds indices outside 0..{size - 1} (W is {entry['shape']}).")
        if len(indices.unique()) != len(indices):
            raise ValueError(f"{file}: {name}.{part} holds an index twice.")
    if u.dtype not in (torch.float32, torch.float64) or tuple(u.shape) != (len(cols), len(rows)):
        raise ValueError(
            f"{file}: {name}.U is {u.dtype} {list(u.shape)}; by its indices it must be float32 or float64 "
            f"[{len(cols)}, {len(rows)}]."
        )
    return AdapterModule(
        (out_features, in_features), entry["layout"], entry["fingerprint"], u, rows.long(), cols.long()
    )


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with NaN or infinite values."""
    return [key for key, value in tensors.items() if value.is_floating_point() and not bool(value.isfinite().all())]
