"""Let ``save_pretrained`` of other libraries write the merged weights of a converted model.

Each of them writes ``self.state_dict()``. A converted model's holds the base's weights and, beside them, the adapter's tensors,
which ``from_pretrained`` ignores as unexpected: what was read back would be the base. So their methods are wrapped, once per
process and class, as soon as there is a converted layer. Of models without one the wrapper does nothing.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_pmss.layers.merged_layer import Mergeable
from lightning_pmss.layers.parts import clean_state, is_sharded
from lightning_pmss.layers.plain_state import is_trained_state, plain_state, plain_state_dicts, without_quantiser

# Where the classes live; a library that is not imported has made no model.
_WRITERS = (
    ("transformers.modeling_utils", "PreTrainedModel"),
    ("huggingface_hub.hub_mixin", "ModelHubMixin"),
    ("diffusers.models.modeling_utils", "ModelMixin"),
)
_METHOD = "save_pretrained"


def watch_writers() -> None:
    """Wrap the methods of all libraries that are imported by now."""
    for module, name in _WRITERS:
        cls = getattr(sys.modules.get(module), name, None)
        if cls is not None and not hasattr(getattr(cls, _METHOD), "writes_merged_weights"):
            setattr(cls, _METHOD, _wrapped(getattr(cls, _METHOD)))


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, nn.Module) or not any(isinstance(m, Mergeable) for m in self.modules()):
            return original(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        given = bound.arguments.get("state_dict")
        if given is not None:
            if is_trained_state(self, given):
                bound.arguments["state_dict"] = plain_state(self, given)
            with without_quantiser(self):
                return original(*bound.args, **bound.kwargs)
        if is_sharded(self):
            raise ValueError(
                "save_pretrained cannot merge a sharded model. Write the merged one by `write_merged(model, folder)`, or the"
                " adapter by `save_adapter(model, folder)`, on every rank."
            )
        with plain_state_dicts(self), without_quantiser(self):
            if "state_dict" in signature.parameters:  # else the writer asks for it itself
                bound.arguments["state_dict"] = clean_state(self)
            return original(*bound.args, **bound.kwargs)

    save_pretrained.writes_merged_weights = True  # type: ignore[attr-defined]
    return save_pretrained
