"""What lies beside the weights in a model folder: config, tokenizer, and the report of a merge."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightning_pmss.files.adapter_file import library_versions
from lightning_pmss.files.atomic import WRITTEN_BY, files_below
from lightning_pmss.merging import LayerDrift

REPORT_FILE = "merge_report.json"
# Weights in any form, what belongs to an adapter or to an earlier merge, and what version control keeps.
_NOT_COPIED = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.gguf",
    "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "adapter_config.json", REPORT_FILE, ".git*", ".cache",
)  # fmt: skip


@dataclass
class FileMergeReport:
    """What `merge_files` or `write_merged` did."""

    output: str
    merged: dict[str, LayerDrift] = field(default_factory=dict)  # by module name
    replaced: list[str] = field(default_factory=list)  # also_train tensors that took the place of the base's
    added: list[str] = field(default_factory=list)  # also_train tensors that the base has not
    copied_files: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)

    @property
    def total(self) -> LayerDrift:
        """The largest figures of any layer."""
        layers = self.merged.values()
        return LayerDrift(
            max_error=max((drift.max_error for drift in layers), default=0.0),
            relative_error=max((drift.relative_error for drift in layers), default=0.0),
            lost_update=max((drift.lost_update for drift in layers), default=0.0),
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self) | {"total": asdict(self.total)}

    def __str__(self) -> str:
        worst = max(self.merged, key=lambda name: self.merged[name].max_error, default="none")
        return (
            f"merged {len(self.merged)} layers into {self.output}: rounding error at most {self.total.max_error:.3g} "
            f"(in {worst}), {self.total.relative_error:.3g} of the weights' norm, "
            f"{self.total.lost_update:.3g} of the update's norm"
        )


def refuse_overlap(output: Path, inputs: Mapping[str, Path]) -> None:
    target = output.resolve()
    for role, folder in inputs.items():
        source = folder.resolve()
        if target == source:
            raise ValueError(f"the output {output} is the {role} itself, which stays as it is; name another folder.")
        if target.is_relative_to(source):
            raise ValueError(f"the output {output} lies inside the {role} {folder}; name a folder outside of it.")
        if source.is_relative_to(target):
            raise ValueError(f"the output {output} contains the {role} {folder}; name a folder of its own.")


def _other_files(folder: Path, *, top_only: bool) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if any(fnmatch.fnmatch(entry.name, pattern) for pattern in _NOT_COPIED):
            continue
        if entry.is_dir():
            if not top_only:
                yield from _other_files(entry, top_only=False)
        elif entry.is_file():
            yield entry


def copy_others(base: Path, folder: Path, dtype: torch.dtype | None, *, top_only: bool = False) -> list[str]:
    """Copy config, tokenizer and all else that is not weights; note a changed dtype in config.json."""
    copied = []
    for source in _other_files(base, top_only=top_only):
        relative = source.relative_to(base)
        target = folder / relative
        if target.exists():  # written by the caller already
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)  # the content, also of a link into the hub's cache; modes are not copied
        copied.append(relative.as_posix())
    config = folder / "config.json"
    if dtype is not None and config.is_file():
        settings = json.loads(config.read_text(encoding="utf-8"))
        old_name = "torch_dtype" in settings and "dtype" not in settings
        settings["torch_dtype" if old_name else "dtype"] = str(dtype).removeprefix("torch.")
        config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return copied


def write_report(folder: Path, report: FileMergeReport, **origin: Any) -> None:
    """Write merge_report.json: the drift, where the model comes from, and the manifest that `atomic_folder` reads."""
    content = {
        "written_by": WRITTEN_BY,
        "files": [*files_below(folder), REPORT_FILE],
        **origin,
        **{key: value for key, value in report.to_dict().items() if key != "output"},
        "versions": library_versions(),
    }
    (folder / REPORT_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
