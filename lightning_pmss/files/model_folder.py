"""Files beside the weights in a model folder: config, tokenizer, and the report of a merge."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightning_pmss.files.adapter_file import library_versions
from lightning_pmss.layers.merged_layer import LayerDrift
from lightning_pmss.store.kinds import (
    ADAPTER,
    BESIDE_WEIGHTS,
    FURTHER_TEMPLATES,
    MERGED,
    SHARDS,
    WRITTEN_BY,
    entries,
    files_below,
    matches,
)
from lightning_pmss.store.model_config import read_model_config
from lightning_pmss.store.shards import INDEX_FILE, few

OF_A_HEAD = ("architectures", "id2label", "label2id", "problem_type", "num_labels")
REPORT_FILE = MERGED.manifest
_AGAIN = "Copy or download the base again."


@dataclass
class FileMergeReport:
    """Report of `merge_files` or `write_merged`, to ``print``."""

    output: str
    merged: dict[str, LayerDrift] = field(default_factory=dict)  # by module name
    replaced: list[str] = field(default_factory=list)  # also_train tensors that replaced the base's
    added: list[str] = field(default_factory=list)  # also_train tensors that the base does not have
    copied_files: list[str] = field(default_factory=list)
    not_copied: list[str] = field(default_factory=list)  # other files in the base's folder
    shards: list[str] = field(default_factory=list)

    @property
    def total(self) -> LayerDrift:
        """Maximum of each figure over the layers."""
        layers = self.merged.values()
        return LayerDrift(
            max_error=max((drift.max_error for drift in layers), default=0.0),
            relative_error=max((drift.relative_error for drift in layers), default=0.0),
            lost_update=max((drift.lost_update for drift in layers), default=0.0),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self) | {"total": asdict(self.total)}

    def __str__(self) -> str:
        worst = max(self.merged, key=lambda name: self.merged[name].max_error, default="none")
        return (
            f"merged {len(self.merged)} layers into {self.output}: rounding error at most {self.total.max_error:.3g} "
            f"(in {worst}), {self.total.relative_error:.3g} of the weights' norm, "
            f"{self.total.lost_update:.3g} of the update's norm"
            f"{f'; not copied from the base: {few(self.not_copied)}' if self.not_copied else ''}"
        )


def refuse_overlap(output: Path, inputs: Mapping[str, Path]) -> None:
    """Refuse an output that is, contains or lies inside an input."""
    target = Path(os.path.realpath(output))  # `resolve` raises where links form a circle
    for role, folder in inputs.items():
        source = Path(os.path.realpath(folder))
        if target == source:
            raise ValueError(f"the output {output} is the {role} itself, which stays as it is; name another folder.")
        if target.is_relative_to(source):
            raise ValueError(f"the output {output} lies inside the {role} {folder}; name a folder outside of it.")
        if source.is_relative_to(target):
            raise ValueError(f"the output {output} contains the {role} {folder}; name another folder.")


@dataclass(frozen=True)
class BesideWeights:
    """Contents of a base's folder, sorted for copying.

    Attributes:
        files: Relative name -> path of each file to copy, such as config and tokenizer.
        outside: The same for links that lead out of the folder, which are not copied.
        others: Other entries: weights, training runs, caches, unreadable files. A folder ends in a slash.
    """

    files: dict[str, Path]
    outside: dict[str, Path]
    others: list[str]

    def not_copied(self) -> list[str]:
        """Names for the report of a merge."""
        weights = (*SHARDS, INDEX_FILE)
        rest = [name for name in self.others if not matches(name, weights)]
        return [*rest, *(f"{name} (a link out of the folder)" for name in self.outside)]


def beside_weights(base: Path) -> BesideWeights:
    """Sort the contents of a base's folder. Links to folders are not followed, links to files only within the folder.

    The hub's cache stores a model's files as links from ``snapshots/<commit>`` to ``blobs``, so these are followed.
    """
    root = Path(os.path.realpath(base))
    allowed = [root] + ([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])
    found = BesideWeights({}, {}, [])
    for name, entry in entries(root):
        real = Path(os.path.realpath(entry.path))  # the path itself where links form a circle
        if not matches(name, BESIDE_WEIGHTS) or name == ADAPTER.manifest or not real.is_file():
            found.others.append(name)
        elif any(real.is_relative_to(folder) for folder in allowed):
            found.files[name] = real
        else:
            found.outside[name] = real
    return found


def refuse_outside(base: Path, found: BesideWeights) -> None:
    """Refuse a base whose config or tokenizer is a link to somewhere else."""
    for name, real in found.outside.items():
        raise ValueError(
            f"{base / name} is a link to {real}, outside of the base, and is not copied into a model. Replace it by a copy:"
            f" cp --remove-destination {real} {base / name}"
        )


def copy_beside(found: BesideWeights, folder: Path, dtype: torch.dtype | None) -> list[str]:
    """Copy config, tokenizer and the like; write a changed dtype into config.json. Return the names."""
    copied = []
    # The base's further templates are not those of a tokenizer that the caller has written.
    templated = (folder / "chat_template.jinja").exists()
    for name, source in found.files.items():
        target = folder / name
        if target.exists() or templated and matches(name, FURTHER_TEMPLATES):  # already written by the caller
            continue
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)  # without permissions
        copied.append(name)
    config = folder / "config.json"
    if dtype is not None and config.name in copied:
        settings = read_model_config(found.files[config.name])
        old_name = "torch_dtype" in settings and "dtype" not in settings
        settings["torch_dtype" if old_name else "dtype"] = str(dtype).removeprefix("torch.")
        config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return copied


def change_settings(folder: Path, settings: Mapping[str, Any], sizes: Mapping[int, int]) -> None:
    """Update config.json for tensors that grew, shrank or were added.

    Args:
        folder: The merged model.
        settings: Setting -> value from the adapter; a nested setting has a dotted name. Only sizes and a head's labels are
            used.
        sizes: Old -> new number of rows of resized tensors; sets the vocabulary size if ``settings`` is empty (adapters of
            early versions).
    """
    config = folder / "config.json"
    if not config.is_file() or not (settings or sizes):
        return
    content = read_model_config(config)
    if not settings:
        for part in (content, content.get("text_config")):
            if isinstance(part, dict) and part.get("vocab_size") in sizes:
                part["vocab_size"] = sizes[part["vocab_size"]]
    for name, value in settings.items():
        *path, key = name.split(".")
        part = content
        for step in path:
            part = part.get(step) if isinstance(part, dict) else None
        if isinstance(part, dict) and (key in OF_A_HEAD or type(value) is int and type(part.get(key, 0)) is int):
            part[key] = value
    config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_report(folder: Path, report: FileMergeReport, **origin: Any) -> None:
    """Write merge_report.json: the drift, the model's origin, and the manifest that `atomic_folder` reads."""
    content = {
        "written_by": WRITTEN_BY,
        "files": [*files_below(folder), REPORT_FILE],
        **origin,
        **{key: value for key, value in report.to_dict().items() if key != "output"},
        "versions": library_versions(),
    }
    (folder / REPORT_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
