"""Find the tokenizer and processors of a run."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_pmss.conversion.roots import adapted_root

# The usual attribute names; they also cover properties, and classes outside of transformers.
_NAMES = ("processor", "tokenizer", "image_processor", "video_processor", "feature_extractor")
_CLASSES = {
    "processor": ("transformers.processing_utils", "ProcessorMixin"),
    "tokenizer": ("transformers.tokenization_utils_base", "PreTrainedTokenizerBase"),
    "image_processor": ("transformers.image_processing_base", "ImageProcessingMixin"),
    "feature_extractor": ("transformers.feature_extraction_utils", "FeatureExtractionMixin"),
}
_NAMED = ("tokenizer", "tokenizer_name", "tokenizer_name_or_path")  # attributes that may name a tokenizer


def processing_of(trainer: L.Trainer, module: L.LightningModule) -> list[Any]:
    """Objects with ``save_pretrained`` to save with a merged model, at most one of each kind.

    They are searched in the LightningModule, then in the DataModule, then in the collate functions of the training loaders. A
    DataModule may also give the name of its tokenizer. The data makes the texts, so its tokenizer goes before the
    LightningModule's if it has another chat template.
    """
    found: dict[str, Any] = {}
    owners = _owners(trainer, module)
    for owner in owners:
        for kind, value in _parts(owner):
            found.setdefault(kind, value)
    found |= _rendering(owners)
    if "tokenizer" not in found and "processor" not in found:
        tokenizer = next((t for owner in owners for t in _by_name(owner)), None)
        if tokenizer is not None:
            found["tokenizer"] = tokenizer
    # A processor also writes its tokenizer; one that was found separately is written later and replaces it.
    parts = [found[kind] for kind in sorted(found, key=lambda kind: kind != "processor")]
    stops = _generation_config(trainer, module)
    return parts if stops is None else [*parts, stops]


def _generation_config(trainer: L.Trainer, module: L.LightningModule) -> Any:
    """The model's generation config with the DataModule's end tokens added; None if nothing is missing.

    A chat template may end a turn by another token than the base's end of sequence; generation would not stop there.
    """
    ends = getattr(getattr(trainer, "datamodule", None), "end_ids", ())
    config: Any = getattr(adapted_root(module)[0], "generation_config", None)
    if config is None:
        return None
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    missing = sorted(set(ends) - set(known))
    if not missing:
        return None
    config = copy.deepcopy(config)
    config.eos_token_id = [*(token for token in known if token is not None), *missing]
    return config


def report_template(trainer: L.Trainer, module: L.LightningModule, folder: Path) -> bool:
    """Return whether the data has a chat template that is not the LightningModule's, and log that ``folder`` gets it."""
    parts = _rendering(_owners(trainer, module))
    for kind in parts:
        own = dict(_parts(module)).get(kind)
        other = f"; that of {type(module).__name__} has {'another' if own.chat_template else 'none'}" if own else ""
        rank_zero_info(f"The {kind} in {folder} has the chat template that the data was rendered with{other}.")
    return bool(parts)


def _owners(trainer: L.Trainer, module: L.LightningModule) -> list[Any]:
    return [module, getattr(trainer, "datamodule", None), *_collate_functions(trainer)]


def _rendering(owners: Sequence[Any]) -> dict[str, Any]:
    """The data's tokenizer and processor, by kind, whose chat template the first owner, the LightningModule, does not have.

    Our DataModules report whether they use the template. Others are taken to use the one that they have.
    """
    own = {kind: getattr(value, "chat_template", None) for kind, value in _parts(owners[0])}
    found: dict[str, Any] = {}
    for owner in owners[1:]:
        if getattr(owner, "uses_chat_template", True):
            for kind, value in _parts(owner):
                if kind in ("tokenizer", "processor") and getattr(value, "chat_template", None):
                    found.setdefault(kind, value)
    return {kind: value for kind, value in found.items() if value.chat_template != own.get(kind)}


def _collate_functions(trainer: L.Trainer) -> list[Any]:
    combined = getattr(trainer.fit_loop, "_combined_loader", None)
    return [getattr(loader, "collate_fn", None) for loader in combined.flattened] if combined is not None else []


def _parts(owner: Any) -> Iterator[tuple[str, Any]]:
    """(kind, object) of attributes with the usual names or of transformers' classes."""
    if owner is None:
        return
    for name in _NAMES:
        value = getattr(owner, name, None)
        if hasattr(value, "save_pretrained") and not isinstance(value, nn.Module):  # a model would write its weights
            yield name, value
    for value in list(getattr(owner, "__dict__", {}).values()):
        for kind, (module, name) in _CLASSES.items():
            # No import: a run without such objects should not load their dependencies.
            class_ = getattr(sys.modules.get(module), name, None)
            if class_ is not None and isinstance(value, class_):
                yield kind, value


def _by_name(owner: Any) -> Iterator[Any]:
    """The tokenizer that an object names, loaded from its folder or the hub's cache."""
    name = next((value for n in _NAMED if isinstance(value := getattr(owner, n, None), str)), None)
    if name is None:
        return
    from transformers import AutoTokenizer

    try:
        yield AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        rank_zero_warn(
            f"The tokenizer {name!r} of {type(owner).__name__} could not be loaded for the merged model: {reason}"
        )
