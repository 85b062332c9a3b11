"""A Hugging Face model that was loaded quantised: written as the dense model it stands for, and how it was loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ON_MODEL = ("hf_quantizer", "quantization_method")


@contextmanager
def without_quantiser(model: Any) -> Iterator[None]:
    """Inside, ``save_pretrained`` writes the state dict that it is given and a config that asks for no quantisation.

    Else transformers would write its own state dict, that of the codes, and a config that has them quantised again.
    """
    config = getattr(model, "config", None)
    kept = {name: model.__dict__.pop(name) for name in _ON_MODEL if name in model.__dict__}
    quantisation = config.__dict__.pop("quantization_config", None) if config is not None else None
    try:
        yield
    finally:
        model.__dict__.update(kept)
        if quantisation is not None:
            config.quantization_config = quantisation  # type: ignore[union-attr]


def quantisation_settings(model: Any) -> dict[str, Any]:
    """What `from_pretrained` needs to quantise the base again in the same way, as JSON; empty where it was not quantised.

    Returns:
        ``quantization_config`` as in config.json, and ``base_dtype``, the dtype of the model beside its codes.
    """
    if getattr(model, "hf_quantizer", None) is None:
        return {}
    settings = model.config.to_dict()
    return {"quantization_config": settings["quantization_config"], "base_dtype": str(settings["dtype"]).split(".")[-1]}
