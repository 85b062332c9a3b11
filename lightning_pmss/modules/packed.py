"""Check that a model keeps the examples of a packed row apart if only restarting positions separate them."""

from __future__ import annotations

from typing import Any

# Implementations for which transformers builds a mask. Its flash attention reads positions of one row per batch only, and would
# silently let the examples of a larger batch see each other.
_MASKED = ("eager", "sdpa")


def check_packing(model: Any) -> None:
    """Raise unless ``model`` attends within each example where ``position_ids`` restart and no mask is given.

    transformers does so in all models of its common attention interface. Others, and those with a state that runs along
    the row (Mamba and hybrids), would mix the examples of a row without an error.

    Args:
        model: A model of transformers.

    Raises:
        ValueError: If it does not, or if that is unknown; the message says what to type.
    """
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False) or getattr(model, "_is_stateful", False):
        raise ValueError(
            f"{name} would let packed examples see each other: it has a recurrent state, or an attention that does not "
            "go by position_ids. Give --data.packing false."
        )
    attention = getattr(model.config, "_attn_implementation", None)
    if attention not in _MASKED:
        raise ValueError(
            f"{name} runs with attention {attention!r}, which does not keep packed examples of a batch apart. Load it "
            f"with attn_implementation {' or '.join(map(repr, _MASKED))}, or give --data.packing false."
        )
