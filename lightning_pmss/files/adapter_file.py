"""The adapter folder: ``adapter_model.safetensors`` and ``adapter_config.json``.

Names are relative to the outermost Hugging Face model if there is one (so an adapter trained in a LightningModule loads into
the plain model), else to the saved model. All tensors have the canonical layout [out, in]:

    <module>.<part> fields of the method's `Update`, including scale and coordinates; numbers are float32 (float64 on a
                    float64 base), indices int32. PMSS: U [c, r], rows [r], cols [c]. LoRA: A [r, in], B [out, r]
    <name>          parameters and buffers of the modules trained in full (`also_train`), and frozen tensors that no file
                    of the base contains (`fresh`): the whole tensor, or the rows that were added

A PMSS file defines ``W' = W + W[:, cols] U W[rows]``. The config has a checksum of each tensor (format 2; format 1 had none).
Loading refuses missing and unknown tensors, and checks everything before it changes the model.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_pmss.files.adapter_card import CARD_FILE, adapter_card
from lightning_pmss.files.adapter_record import (
    FORMAT_VERSION,
    RECORDS,
    AdapterRecord1,
    FreshRecord,
    LayerRecord,
    peft_type,
)
from lightning_pmss.files.processing import save_processing
from lightning_pmss.layers.fingerprint import same_base
from lightning_pmss.layers.layout import Layout
from lightning_pmss.messages import one_line
from lightning_pmss.methods import METHODS, method_of
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.method import Update
from lightning_pmss.store import (
    check_sums,
    checked,
    describe_tensors,
    not_finite,
    read_json,
    read_tensors,
)
from lightning_pmss.store.atomic import atomic_folder
from lightning_pmss.store.kinds import ADAPTER, WRITTEN_BY, files_below
from lightning_pmss.store.shards import few, save_tensors

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_KINDS = {peft_type(method.config_class()): method for method in METHODS.values()}
_AGAIN = "Copy the folder again, or use an earlier adapter."


@dataclass(frozen=True)
class AdapterModule:
    """One layer of an adapter, in the canonical layout [out, in].

    Attributes:
        shape: (out, in) of W.
        layout: How the base stores W.
        fingerprint: See `lightning_pmss.layers.fingerprint`; empty if the update is not bound to a base.
        update: The change of W.
    """

    shape: tuple[int, int]
    layout: Layout
    fingerprint: dict[str, str]
    update: Update

    def canonical(self, stored: Tensor) -> Tensor:
        """Return W ``[out, in]`` from the tensor that the base stores."""
        return self.layout.canonical(stored)

    def is_of(self, weight: Tensor) -> bool:
        """Whether W ``[out, in]`` is the one that the layer was trained on, in the entries that the update depends on."""
        return same_base(self.fingerprint, *self.update.read(weight))


@dataclass(frozen=True)
class FreshTensor:
    """Stored rows of a tensor that is not, or not completely, in the base's files.

    Attributes:
        value: Rows from ``start`` on, ``[rows - start, ...]``; the whole tensor if ``start`` is 0.
        start: Number of rows before, which come from the base's files.
    """

    value: Tensor
    start: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor in the model."""
        return () if self.value.dim() == 0 else (self.start + self.value.shape[0], *self.value.shape[1:])

    def whole(self, stored: Callable[[], Tensor]) -> Tensor:
        """Return the whole tensor; its first rows come from ``stored()``, the base's tensor, which also sets the dtype."""
        if self.start == 0:
            return self.value
        before = stored()[: self.start]
        return torch.cat([before, self.value.to(before.device, before.dtype)])


@dataclass(frozen=True)
class AdapterFile:
    """Contents of an adapter folder, read and checked, or about to be written.

    Attributes:
        folder: Source of the adapter, for messages.
        options: Options of the conversion.
        base_model: Id or path of the base.
        revision: Commit of the base.
        modules: The converted layers by canonical name.
        model_class: Dotted path of the model's class; files of early versions lack it.
        also_train: Tensors of the modules trained in full.
        tied: Other names of the tensors in ``also_train`` and ``fresh``.
        quantisation: Storage of the base's weights, such as "bitsandbytes nf4"; empty if not quantised.
        quantisation_settings: See `files.plain`.
        root: Full name, in the saved model, of the module that names are relative to; None if it needs no name (see
            `adapted_root`).
        left_out: Linear layers of the saved model that were not converted; None in files of early versions.
        fresh: Frozen tensors that the base's files do not contain, or not completely.
        settings: Entries of the base's config.json that the fresh tensors change; see `files.fresh`.
    """

    folder: Path
    options: AdapterConfig
    base_model: str | None
    revision: str | None
    modules: dict[str, AdapterModule]
    model_class: str | None = None
    also_train: dict[str, Tensor] = field(default_factory=dict)
    tied: dict[str, list[str]] = field(default_factory=dict)
    quantisation: list[str] = field(default_factory=list)
    quantisation_settings: dict[str, Any] = field(default_factory=dict)
    root: str | None = None
    left_out: list[str] | None = None
    fresh: dict[str, FreshTensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """The options as plain values."""
        return self.options.to_dict()

    def fresh_weight(self, name: str) -> FreshTensor | None:
        """A layer's weight, where no file of the base contains it, or not all of it."""
        own = name if self.modules[name].layout is Layout.PARAMETER else f"{name}.weight"
        return self.fresh.get(own)

    def wrong_base(self, modules: list[str], base: str) -> str:
        """Message for a base that is not the one this adapter was trained on."""
        trained_on = self.base_model or "a base whose name is not recorded"
        revision = f", revision {self.revision}" if self.revision else ""
        return (
            f"{self.folder} belongs to another base: the weights of {few(modules, 3)} in {base} are not those it was "
            f"trained on ({one_line(trained_on + revision)}). Load that base, unmerged; on other weights an adapter of "
            f"{self.options.label()} means nothing.{self._quantised_hint()}"
        )

    def _quantised_hint(self) -> str:
        if not self.quantisation:
            return ""
        return (
            f" It was trained on quantised weights ({one_line(', '.join(self.quantisation))}), which are not those of the"
            " checkpoint: load the base quantised the same way; for a dense model write_merged(model, folder) after"
            " load_adapter."
        )


def write_adapter(
    adapter: AdapterFile,
    folder: Path,
    *,
    overwrite: bool = False,
    run: Mapping[str, Any] | None = None,
    base: Path | None = None,
    tokenizer: Any = None,
) -> None:
    """Write an adapter folder, whole or not at all.

    Args:
        adapter: The adapter to write.
        folder: The folder to write.
        overwrite: Replace an earlier adapter of this library.
        run: Facts for the card, see `save_adapter`.
        base: Folder of the base, for the card.
        tokenizer: See `save_adapter`.

    Raises:
        FileExistsError: See `atomic_folder`.
        ValueError: NaN or infinite values, or two tensors of one name.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in adapter.modules.items():
        tensors |= {f"{name}.{part}": value for part, value in module.update.numbers().items()}
        tensors |= {f"{name}.{part}": value.to(torch.int32) for part, value in module.update.indices().items()}
    extra = adapter.also_train | {name: kept.value for name, kept in adapter.fresh.items()}
    if clash := sorted(set(tensors) & set(extra)):
        raise ValueError(
            f"also_train has tensors under the names of the adapter's own: {few(clash)}. Rename these modules."
        )
    tensors.update(extra)
    if broken := not_finite(tensors):
        raise ValueError(
            f"NaN or infinite values in {few(broken)}: the training has diverged, so the adapter is not saved. "
            "Lower the learning rate, or go back to an earlier checkpoint."
        )
    config = {
        "written_by": WRITTEN_BY,
        "files": [],
        "format_version": FORMAT_VERSION,
        "peft_type": peft_type(adapter.options),
        "base_model_name_or_path": adapter.base_model,
        "revision": adapter.revision,
        "model_class": adapter.model_class,
        "quantisation": adapter.quantisation,
        **adapter.quantisation_settings,
        "fresh": {
            key: {"shape": list(kept.shape), "start": kept.start, "tied": adapter.tied.get(key, [])}
            for key, kept in adapter.fresh.items()
        },
        "settings": adapter.settings,
        "root": adapter.root,
        "left_out": adapter.left_out,
        "config": adapter.config,
        "modules": {name: _entry(module) for name, module in adapter.modules.items()},
        "also_train": {
            key: {"shape": list(value.shape), "tied": adapter.tied.get(key, [])}
            for key, value in adapter.also_train.items()
        },
        "tensors": describe_tensors(tensors),
        "versions": library_versions(),
    }
    with atomic_folder(folder, ADAPTER, overwrite=overwrite) as temporary:
        save_processing(tokenizer, temporary)
        config["files"] = sorted({CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, *files_below(temporary)})
        save_tensors(tensors, temporary / WEIGHTS_FILE)
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (temporary / CARD_FILE).write_text(adapter_card(config, adapter.options, run, base), encoding="utf-8")


def _entry(module: AdapterModule) -> dict[str, Any]:
    return {
        "shape": list(module.shape),
        "rank": module.update.ranks,
        "layout": str(module.layout),
        "fingerprint": module.fingerprint or None,
    }


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFile:
    """Read and check an adapter folder, without a model.

    Raises:
        FileNotFoundError: The folder or one of its two files is missing.
        PermissionError: A file must not be read.
        ValueError: See `load_adapter`.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder. Give the folder that save_adapter or a training run wrote.")
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {' and '.join(missing)}: not a complete adapter folder.")
    config = _read_config(folder / CONFIG_FILE)
    options = _KINDS[config.peft_type].config_class.from_file(config.config, str(folder / CONFIG_FILE), _AGAIN)
    file = folder / WEIGHTS_FILE
    tensors = read_tensors(file, _AGAIN)
    update_class = method_of(options).update_class
    parts = update_class.names()
    of_layers = {f"{name}.{part}" for name in config.modules for part in parts}
    _check_names(file, config, of_layers, len(parts), set(tensors))
    if broken := not_finite(tensors):
        raise ValueError(f"{file}: NaN or infinite values in {few(broken)}. Use an earlier adapter or checkpoint.")
    modules = {
        name: _checked_module(file, name, entry, update_class, {p: tensors[f"{name}.{p}"] for p in parts})
        for name, entry in config.modules.items()
    }
    entries: dict[str, FreshRecord] = getattr(config, "fresh", {})
    fresh = {name: FreshTensor(tensors[name], entry.start) for name, entry in entries.items()}
    there = {name: tensors[name].shape for name in config.also_train} | {n: kept.shape for n, kept in fresh.items()}
    for name, full in (config.also_train | entries).items():
        if list(there[name]) != full.shape:
            raise ValueError(
                f"{file}: {one_line(name)} has the shape {list(there[name])}, {CONFIG_FILE} says {full.shape}. "
                "The two files do not belong together; copy the folder again."
            )
    if config.tensors is not None:
        check_sums(tensors, config.tensors, str(file), _AGAIN)
    return AdapterFile(
        folder=folder,
        options=options,
        base_model=config.base_model_name_or_path,
        revision=config.revision,
        modules=modules,
        model_class=config.model_class,
        also_train={name: tensors[name] for name in config.also_train},
        tied={name: full.tied for name, full in (config.also_train | entries).items() if full.tied},
        quantisation=config.quantisation,
        quantisation_settings=config.model_dump(include={"quantization_config", "base_dtype"}, exclude_none=True),
        root=getattr(config, "root", None),
        left_out=getattr(config, "left_out", None),
        fresh=fresh,
        settings=getattr(config, "settings", {}),
    )


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("lightning-pmss", "torch", "lightning", "transformers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _read_config(file: Path) -> AdapterRecord1:
    """Read the config and check every entry that is used later."""
    config = read_json(file, _AGAIN)
    found = config.get("format_version") if isinstance(config, dict) else None
    named = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(found, int) or isinstance(found, bool) or not isinstance(named, str) or named not in _KINDS:
        kind = f" (peft_type {config['peft_type']})" if isinstance(config, dict) and "peft_type" in config else ""
        other = " peft loads it: PeftModel.from_pretrained(base, folder)." if kind and "PMSS" not in kind else ""
        raise ValueError(f"{file} does not describe an adapter of lightning-pmss{one_line(kind)}.{other}")
    if found > FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {one_line(found)}, and this lightning-pmss reads up to {FORMAT_VERSION}: upgrade it. "
            f"It was written with {one_line(config.get('versions'))}."
        )
    if found not in RECORDS:
        raise ValueError(f"{file} has format version {one_line(found)}, which does not exist. {_AGAIN}")
    return checked(RECORDS[found], config, str(file), _AGAIN)


def _check_names(file: Path, config: AdapterRecord1, of_layers: set[str], parts: int, present: set[str]) -> None:
    """Refuse unknown, missing and doubly named tensors."""
    also_train, fresh = set(config.also_train), set(getattr(config, "fresh", {}))
    if len(of_layers) != parts * len(config.modules) or of_layers & (also_train | fresh) or also_train & fresh:
        raise ValueError(f"{file.with_name(CONFIG_FILE)} gives two of its tensors one name. {_AGAIN}")
    expected = of_layers | also_train | fresh
    lost, foreign = sorted(expected - present), sorted(present - expected)
    if lost or foreign:
        says = [f"lacks {few(lost)}"] if lost else []
        says += [f"has {few(foreign)}, which {CONFIG_FILE} does not list"] if foreign else []
        raise ValueError(f"{file} {' and '.join(says)}. The two files do not belong together; copy the folder again.")
    if config.tensors is not None and (odd := sorted(expected ^ set(config.tensors))):
        raise ValueError(
            f"{file.with_name(CONFIG_FILE)}: `tensors` and `modules` differ in {few(odd)}. It is damaged or was edited by"
            f" hand. {_AGAIN}"
        )


def _checked_module(
    file: Path, name: str, entry: LayerRecord, update: type[Update], tensors: dict[str, Tensor]
) -> AdapterModule:
    out_features, in_features = entry.shape
    if reason := update.why_not((out_features, in_features), tensors):
        raise ValueError(f"{file}: {one_line(name)}.{reason}. {_AGAIN}")
    if update.bound_to_base and entry.fingerprint is None:
        raise ValueError(f"{file.with_name(CONFIG_FILE)}: {one_line(name)} has no fingerprint of its base. {_AGAIN}")
    values = {part: value if value.is_floating_point() else value.long() for part, value in tensors.items()}
    prints = {} if entry.fingerprint is None or not update.bound_to_base else entry.fingerprint.model_dump()
    made = update(**values)
    if made.ranks != entry.rank:
        raise ValueError(
            f"{file}: {one_line(name)} has the rank {made.ranks}, and {CONFIG_FILE} says rank {entry.rank}. The two files do"
            " not belong together; copy the folder again."
        )
    shape = out_features, in_features
    return AdapterModule(shape, entry.layout, prints, made.narrowed(shape))
