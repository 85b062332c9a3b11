"""The state dict of a converted model as if it had never been converted, with W' in the converted layers."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pmss.layers.guard import refuse_disabled
from lightning_pmss.layers.merged_layer import LayerDrift, Mergeable
from lightning_pmss.layers.parts import clean_name
from lightning_pmss.layers.quantised import dequantised, is_quantised, value_dtype


@contextmanager
def plain_state_dicts(model: nn.Module, asked: Container[int] | None = None) -> Iterator[dict[int, LayerDrift]]:
    """Inside, ``state_dict()`` of the model, and of modules in it, is that of the merged model, whoever asks.

    Keys are those without the adapter's. Quantised layers give dense weights, on the CPU. Everything is computed, and
    refused, before the block begins.

    Args:
        model: Converted or not, in whole or in part.
        asked: ``id`` of the modules that are wanted; default: all.

    Yields:
        What the rounding of each merge cost, by ``id`` of the layer.

    Raises:
        ValueError: A merged weight is not finite, or the adapter is disabled.
    """
    dense: dict[int, dict[str, Tensor]] = {}
    drift: dict[int, LayerDrift] = {}
    found = {clean_name(n): m for n, m in model.named_modules() if asked is None or id(m) in asked}
    refuse_disabled(found.values(), "written or merged")
    for name, module in found.items():
        if isinstance(module, Mergeable):
            dense[id(module)], cost = module.plain_weights(name)
            drift |= cost
        elif isinstance(module, nn.Linear) and is_quantised(module):
            dense[id(module)] = {"weight": dequantised(module, dtype=value_dtype(module)).cpu()}

    def show(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        converted = isinstance(module, Mergeable)
        codes = getattr(module, "quantised", False) if converted else True
        for key in [key for key in state if key.startswith(prefix)]:
            own = key.removeprefix(prefix)
            if converted and module.adapter_key(own) or codes and own.startswith(("weight", "SCB")):  # type: ignore[union-attr, operator]
                del state[key]
        state.update({f"{prefix}{key}": value for key, value in dense[id(module)].items()})

    with ExitStack() as stack:
        for module in found.values():
            if id(module) in dense:
                stack.callback(module.register_state_dict_post_hook(show).remove)
        yield drift


def is_trained_state(model: nn.Module, state: Mapping[str, Any]) -> bool:
    """Whether a state dict of this model has the tensors of an adapter beside the base's weights."""
    layers = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, Mergeable)}
    prefixes = {f"{clean_name(name)}.".lstrip("."): layer for name, layer in layers.items()}
    return any(
        key.startswith(prefix) and layer.adapter_key(key.removeprefix(prefix))
        for prefix, layer in prefixes.items()
        for key in map(clean_name, state)
    )


@torch.no_grad()
def plain_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of this model (live, averaged, gathered, ...) with W' in place of W and the adapter's tensors.

    Keys are the clean names.

    Raises:
        ValueError: It lacks tensors of a layer, or a merged weight is not finite.
    """
    plain = {clean_name(key): value for key, value in state.items()}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{clean_name(name)}.".lstrip(".")
        if not isinstance(module, Mergeable):
            continue
        own = [key for key in plain if key.startswith(prefix) and module.adapter_key(key.removeprefix(prefix))]
        if own:
            values = module.plain_from(plain, prefix)
            kept_in_codes = getattr(module, "quantised", False)
            codes = [key for key in plain if kept_in_codes and key.startswith((f"{prefix}weight", f"{prefix}SCB"))]
            for key in (*own, *codes):
                plain.pop(key, None)
            plain |= {f"{prefix}{key}": value for key, value in values.items()}
    return plain


@contextmanager
def without_quantiser(model: Any) -> Iterator[None]:
    """Inside, ``save_pretrained`` writes the state dict that it is given and a config that asks for no quantisation.

    Else transformers would write its own state dict, that of the codes, and a config that has them quantised again.
    """
    config = getattr(model, "config", None)
    kept = {
        name: model.__dict__.pop(name) for name in ("hf_quantizer", "quantization_method") if name in model.__dict__
    }
    quantisation = config.__dict__.pop("quantization_config", None) if config is not None else None
    try:
        yield
    finally:
        model.__dict__.update(kept)
        if quantisation is not None:
            config.quantization_config = quantisation  # type: ignore[union-attr]
