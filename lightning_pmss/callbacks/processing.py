"""The tokenizer and processors that a run works with, wherever they live."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_pmss.conversion.roots import adapted_root

# The usual attributes; they also cover properties, and classes that transformers does not know.
_NAMES = ("processor", "tokenizer", "image_processor", "video_processor", "feature_extractor")
_CLASSES = {
    "processor": ("transformers.processing_utils", "ProcessorMixin"),
    "tokenizer": ("transformers.tokenization_utils_base", "PreTrainedTokenizerBase"),
    "image_processor": ("transformers.image_processing_base", "ImageProcessingMixin"),
    "feature_extractor": ("transformers.feature_extraction_utils", "FeatureExtractionMixin"),
}
_NAMED = ("tokenizer", "tokenizer_name", "tokenizer_name_or_path")  # attributes that may name a tokenizer


def processing_of(trainer: L.Trainer, module: L.LightningModule) -> list[Any]:
    """What a merged model needs beside its weights: objects with ``save_pretrained``, at most one of each kind.

    Looked for in the LightningModule, then in the DataModule, then in the collate functions of the training loaders; a
    DataModule may also give the name of its tokenizer.
    """
    found: dict[str, Any] = {}
    owners = [module, getattr(trainer, "datamodule", None), *_collate_functions(trainer)]
    for owner in owners:
        for kind, value in _parts(owner):
            found.setdefault(kind, value)
    if "tokenizer" not in found and "processor" not in found:
        tokenizer = next((t for owner in owners for t in _by_name(owner)), None)
        if tokenizer is not None:
            found["tokenizer"] = tokenizer
    # A processor writes its tokenizer, too, and one that was found on its own is written over that.
    parts = [found[kind] for kind in sorted(found, key=lambda kind: kind != "processor")]
    stops = _generation_config(trainer, module)
    return parts if stops is None else [*parts, stops]


def _generation_config(trainer: L.Trainer, module: L.LightningModule) -> Any:
    """The model's generation config with the token that the DataModule ends responses with, where that is missing in it.

    The end of a turn in a chat template need not be the base's end of sequence, and the merged model would not stop there.
    """
    end = getattr(getattr(trainer, "datamodule", None), "end_id", None)
    config: Any = getattr(adapted_root(module)[0], "generation_config", None)
    if end is None or config is None:
        return None
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if end in known:
        return None
    config = copy.deepcopy(config)
    config.eos_token_id = [*(token for token in known if token is not None), end]
    return config


def _collate_functions(trainer: L.Trainer) -> list[Any]:
    combined = getattr(trainer.fit_loop, "_combined_loader", None)
    return [getattr(loader, "collate_fn", None) for loader in combined.flattened] if combined is not None else []


def _parts(owner: Any) -> Iterator[tuple[str, Any]]:
    """(kind, object) of what an object holds under the usual names or of transformers' classes."""
    if owner is None:
        return
    for name in _NAMES:
        value = getattr(owner, name, None)
        if hasattr(value, "save_pretrained") and not isinstance(value, nn.Module):  # a model would write its weights
            yield name, value
    for value in list(getattr(owner, "__dict__", {}).values()):
        for kind, (module, name) in _CLASSES.items():
            # Not imported: a run without such objects should not load what they need.
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
