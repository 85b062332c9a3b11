"""Settings of a quantised Hugging Face model."""

from __future__ import annotations

import json
from typing import Any


def quantisation_settings(model: Any) -> dict[str, Any]:
    """Return the settings, as JSON, with which `from_pretrained` quantises the base the same way; empty if not quantised.

    Returns:
        ``quantization_config`` as in config.json, and ``base_dtype``, the dtype of the tensors that are not quantised.
    """
    if getattr(model, "hf_quantizer", None) is None:
        return {}
    settings = json.loads(model.config.to_json_string(use_diff=False))  # to_dict() would contain enum members
    return {"quantization_config": settings["quantization_config"], "base_dtype": settings["dtype"]}
