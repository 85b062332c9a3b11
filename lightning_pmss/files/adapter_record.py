"""Schema of ``adapter_config.json``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from lightning_pmss.layers.fingerprint import FingerprintRecord
from lightning_pmss.layers.layout import Layout
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.store import Record, TensorRecord
from lightning_pmss.store.records import Setting, Shape, Size

FORMAT_VERSION = 2


def peft_type(options: AdapterConfig) -> str:
    """Return the method's name in the file. It is never one of peft's (``LORA``), whose files have other tensors."""
    return "PMSS" if options.method == "pmss" else options.method


class LayerRecord(Record):
    """One converted layer."""

    shape: Annotated[list[Size], Field(min_length=2, max_length=2)]
    rank: Size | Annotated[list[Size], Field(min_length=2, max_length=2)]
    layout: Annotated[Layout, Field(strict=False)]
    fingerprint: FingerprintRecord | None


class FullRecord(Record):
    """One tensor of a module trained in full."""

    shape: Shape
    tied: list[str] = []


class FreshRecord(FullRecord):
    """One tensor that the base's files do not contain completely: its shape in the model, and the first stored row."""

    start: Annotated[int, Field(ge=0)] = 0


class AdapterRecord1(Record):
    """Format 1, without checksums."""

    model_config = ConfigDict(extra="ignore")

    format_version: Literal[1]
    peft_type: str
    written_by: str = ""
    files: list[str] = []
    base_model_name_or_path: str | None = None
    revision: str | None = None
    model_class: str | None = None
    quantisation: list[str] = []
    quantization_config: dict[str, Any] | None = None
    base_dtype: str | None = None
    config: dict[str, Any]
    modules: Annotated[dict[str, LayerRecord], Field(min_length=1)]
    also_train: dict[str, FullRecord]
    versions: dict[str, str] = {}
    tensors: dict[str, TensorRecord] | None = None  # present if somebody edited the version number of a later format


class AdapterRecord(AdapterRecord1):
    """Format 2, with dtype, shape and checksum of every tensor in the weights file."""

    model_config = ConfigDict(extra="forbid")

    format_version: Literal[2]  # type: ignore[assignment]
    root: str | None = None
    left_out: list[str] | None = None
    fresh: dict[str, FreshRecord] = {}
    settings: dict[str, Setting] = {}
    tensors: dict[str, TensorRecord]


RECORDS: dict[int, type[AdapterRecord1]] = {1: AdapterRecord1, 2: AdapterRecord}
