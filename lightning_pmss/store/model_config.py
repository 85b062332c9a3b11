"""Check a model's ``config.json`` for everything on which transformers would crash or never end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from lightning_pmss.store.json_text import read_json
from lightning_pmss.store.records import Record, checked

_AGAIN = "Copy or download it again."
# Some models have one number per layer.
_Count = Annotated[int, Field(ge=1, le=2**31)] | list[Any] | None
_Layers = Annotated[int, Field(ge=0, le=10_000)] | list[Any] | None


class ModelConfigRecord(Record):
    """Settings that all models have; each has more."""

    model_config = ConfigDict(extra="allow")

    model_type: str | None = None
    architectures: list[str] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    hidden_size: _Count = None
    intermediate_size: _Count = None
    vocab_size: _Count = None
    num_attention_heads: _Count = None
    num_key_value_heads: _Count = None
    head_dim: _Count = None
    max_position_embeddings: _Count = None
    n_embd: _Count = None
    n_head: _Count = None
    n_positions: _Count = None
    num_hidden_layers: _Layers = None
    n_layer: _Layers = None
    text_config: ModelConfigRecord | None = None


def read_model_config(file: Path, where: str | None = None) -> dict[str, Any]:
    """Read the settings in a ``config.json``, before transformers reads them.

    Args:
        file: Its path.
        where: Beginning of messages; default: the path.

    Raises:
        FileNotFoundError: There is no such file.
        PermissionError: It must not be read.
        ValueError: It is no JSON object, or a size in it is no size.
    """
    settings = read_json(file, _AGAIN, where)
    checked(ModelConfigRecord, settings, where or str(file), _AGAIN)
    return dict(settings)
