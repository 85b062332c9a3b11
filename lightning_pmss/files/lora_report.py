"""Report of an export: as data, as text, and as a model card."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_pmss.files.adapter_card import CARD_FILE, class_of, is_hub_id
from lightning_pmss.files.adapter_file import library_versions
from lightning_pmss.files.lora_config import VLLM_RANKS, vllm_rank
from lightning_pmss.store.kinds import LORA, WRITTEN_BY, files_below

REPORT_FILE = LORA.manifest
_TAGS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
}


@dataclass(frozen=True)
class ExportedLayer:
    """One exported layer.

    Attributes:
        name: Canonical module name.
        shape: (out, in) of W.
        full_rank: Rank of the adapter's update.
        rank: Rank in the export; smaller if it was cut.
    """

    name: str
    shape: tuple[int, int]
    full_rank: int
    rank: int


@dataclass
class LoraReport:
    """Report of `export_lora` and `export_peft`, to ``print``.

    Attributes:
        output: The folder.
        method: Name of the method that trained the adapter.
        about: Sentences on its update.
        layers: One entry per layer.
        modules_to_save: Modules trained in full, which are also in the file.
        dtype: Dtype of the factors.
        bytes: Size of all tensors.
        base_model: Id or path of the base.
        revision: Commit of the base.
        model_class: Dotted path of the model's class, if it is known.
        errors: For each layer that was cut, the share of its update's Frobenius norm that is lost.
        form: Name of the adapter type.
        served: Whether vLLM reads this type.
        for_peft: Whether peft reads it.
        merge_only: Whether it has convolutions or embeddings.
        instead: Why it is a LoRA although peft has a type of its own; None where it is that type, or was asked for.
    """

    output: str
    method: str
    about: str
    layers: list[ExportedLayer]
    modules_to_save: list[str]
    dtype: str
    bytes: int
    base_model: str | None
    revision: str | None
    model_class: str | None
    errors: dict[str, float] = field(default_factory=dict)
    form: str = "LoRA"
    served: bool = True
    for_peft: bool = True
    merge_only: bool = False
    instead: str | None = None

    @property
    def rank(self) -> int:
        """The largest rank, peft's ``r``."""
        return max(layer.rank for layer in self.layers)

    @property
    def max_lora_rank(self) -> int | None:
        """The smallest ``--max-lora-rank`` for vLLM; None if vLLM cannot serve this rank or type."""
        return vllm_rank(self.rank) if self.served else None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self) | {"rank": self.rank, "max_lora_rank": self.max_lora_rank}

    def announcement(self) -> str:
        """Describe the planned export in one line."""
        counts = Counter(layer.rank for layer in self.layers)
        ranks = ", ".join(f"{count} of rank {rank}" for rank, count in sorted(counts.items(), reverse=True))
        cut = sum(layer.rank < layer.full_rank for layer in self.layers)
        how = f"{cut} of them cut to it" if cut else "exact"
        why = f". {self.instead}" if self.instead else ""
        also = f", {len(self.modules_to_save)} modules in full" if self.modules_to_save else ""
        size = f"{_size(self.bytes)} in {self.dtype}"
        return f"{self.form} of {len(self.layers)} layers ({ranks}; {how}){also}: {size}, to {self.output}{why}"

    def vllm(self) -> str:
        """Return the option that vLLM needs, or the reason why vLLM cannot serve the adapter."""
        if self.merge_only:
            return "vLLM is not known to read a LoRA of convolutions and embeddings: merge for it."
        if not self.served and self.form == "LoRA":
            return "vLLM has names of its own for the experts of most models: export with --format vllm, or merge."
        if not self.served:
            return f"vLLM reads LoRA only, and no {self.form}: export with --as lora, or merge."
        if self.modules_to_save:
            return f"vLLM takes no adapter with modules trained in full ({', '.join(self.modules_to_save)}); merge instead."
        if self.max_lora_rank is None:
            return (
                f"vLLM takes ranks up to {VLLM_RANKS[-1]}, and this one is {self.rank}: export with --rank {VLLM_RANKS[-1]}, "
                "which reports the error, or merge."
            )
        return f"vLLM needs --max-lora-rank {self.max_lora_rank}."

    def __str__(self) -> str:
        lines = [f"wrote {_size(self.bytes)} to {self.output}. {self.vllm()}"]
        if self.errors:
            lines.append("cut by singular values; share of the update's norm that is lost:")
            width = max(map(len, self.errors))
            ranks = {layer.name: layer for layer in self.layers}
            for name, error in self.errors.items():
                lines.append(f"  {name:<{width}}  rank {ranks[name].full_rank} to {ranks[name].rank}  {error:.3g}")
        return "\n".join(lines)


def write_report(folder: Path, report: LoraReport) -> None:
    """Write export_report.json, the last file of the folder and the manifest that `atomic_folder` reads."""
    content = {
        "written_by": WRITTEN_BY,
        "files": [*files_below(folder), REPORT_FILE],
        **{key: value for key, value in report.to_dict().items() if key != "output"},
        "versions": library_versions(),
    }
    (folder / REPORT_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_card(folder: Path, report: LoraReport) -> None:
    """Write the model card in the hub's format."""
    # The hub refuses a card with a path as base_model.
    known = report.base_model if report.base_model and is_hub_id(report.base_model) else None
    head = ["---", *([f"base_model: {known}"] if known else []), "library_name: peft"]
    tag = next((tag for end, tag in _TAGS.items() if (report.model_class or "").endswith(end)), None)
    head += [f"pipeline_tag: {tag}"] if tag else []
    head += [
        "tags:",
        *([f"- base_model:adapter:{known}"] if known else []),
        f"- {report.form.lower()}",
        "- pmss",
        "---",
        "",
    ]
    (folder / CARD_FILE).write_text("\n".join([*head, *_card(report)]) + "\n", encoding="utf-8")


def _card(report: LoraReport) -> list[str]:
    base = report.base_model or "BASE"
    revision = f", revision={report.revision!r}" if report.revision else ""
    module, name = class_of(report.model_class)
    if module.startswith("transformers."):
        load = [f"from transformers import {name}", "", f"base = {name}.from_pretrained({json.dumps(base)}{revision})"]
    else:
        load = ["", f"base = ...  # the {name or 'model'} that the adapter was trained on"]
    counts = Counter(layer.rank for layer in report.layers)
    ranks = "; ".join(f"rank {rank}: {count} layers" for rank, count in sorted(counts.items(), reverse=True))
    exact = (
        f"The conversion is exact, in {report.dtype}.{f' It is a LoRA, since {report.instead}.' if report.instead else ''}"
        if not report.errors
        else "Cut to a smaller rank by singular values; share of each update's norm that is lost: largest "
        f"{max(report.errors.values()):.3g}, smallest {min(report.errors.values()):.3g} ({REPORT_FILE} has every layer's)."
    )
    peft = ["## Load with peft", "", "```python", "from peft import PeftModel", *load]
    peft += ['model = PeftModel.from_pretrained(base, "THIS_FOLDER")', "```", ""]
    serve = [report.vllm()]
    if not report.modules_to_save and report.max_lora_rank is not None:
        flags = f"--enable-lora --max-lora-rank {report.max_lora_rank} --lora-modules NAME=THIS_FOLDER"
        serve = ["```bash", f"vllm serve {base} {flags}", "```"]
    return [
        f"# LoRA form of a {report.method} adapter"
        if report.form == "LoRA"
        else f"# {report.form} adapter of peft's own type",
        "",
        f"Trained with lightning-pmss and exported to {report.form}. Before the export: {report.about}",
        f"Base: {base}{f', revision {report.revision}' if report.revision else ''}. It is used as it is, unmerged.",
        "",
        exact,
        "",
        f"{_size(report.bytes)}; {ranks}.",
        *([f"Trained in full: {', '.join(report.modules_to_save)}."] if report.modules_to_save else []),
        "",
        *(peft if report.for_peft else []),
        "## Serve with vLLM",
        "",
        *serve,
    ]


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
