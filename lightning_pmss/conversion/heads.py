"""Which linear layers are output heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from lightning_pmss.conversion.left_out import HEAD
from lightning_pmss.conversion.roots import is_hugging_face

# Usual names of the output head in models that are not Hugging Face models.
HEAD_NAMES = ("lm_head", "head", "heads", "classifier", "score", "qa_outputs", "embed_out")


def heads_of(root: nn.Module, modules: Mapping[str, nn.Module], candidates: Sequence[str]) -> dict[str, str]:
    """Reason by name of the linear layers that ``"all-linear"`` leaves out."""
    heads: dict[str, str] = {}
    embedded = {id(m._parameters.get("weight")) for m in modules.values() if isinstance(m, nn.Embedding)} - {id(None)}
    body = getattr(root, getattr(root, "base_model_prefix", "") or "_", root)
    inside = {id(m) for m in body.modules()} if is_hugging_face(root) else None
    for name in candidates:
        parent = modules.get(name.rpartition(".")[0])
        if id(modules[name]._parameters.get("weight")) in embedded:
            heads[name] = "shares the embedding's weight"
        elif (
            inside is not None
            and id(modules[name]) not in inside
            or inside is None
            and any(part in HEAD_NAMES for part in name.split("."))
        ):
            heads[name] = HEAD
        elif isinstance(parent, nn.MultiheadAttention):
            heads[name] = "nn.MultiheadAttention never calls its forward"
    return heads
