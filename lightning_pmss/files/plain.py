"""How a Hugging Face model that was loaded quantised was loaded."""

from __future__ import annotations

import json
from typing import Any


def quantisation_settings(model: Any) -> dict[str, Any]:
    """What `from_pretrained` needs to quantise the base again in the same way, as JSON; empty where it was not quantised.

    Returns:
        ``quantization_config`` as in config.json, and ``base_dtype``, the dtype of the model beside its codes.
    """
    if getattr(model, "hf_quantizer", None) is None:
        return {}
    settings = json.loads(model.config.to_json_string(use_diff=False))  # to_dict() has enumerations in it
    return {"quantization_config": settings["quantization_config"], "base_dtype": settings["dtype"]}
