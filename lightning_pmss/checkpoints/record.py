"""Schema of a checkpoint's ``pmss`` entry, which describes its tensors, and checks of these tensors.

A checkpoint of format 2 and the base's weights suffice to write the adapter. Format 1 contains only options and fingerprints,
so names are read from the keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field
from torch import Tensor

from lightning_pmss.checkpoints.reading import DAMAGED
from lightning_pmss.layers.adapted import trained_key
from lightning_pmss.layers.convertible import FLOATS
from lightning_pmss.layers.fingerprint import FingerprintRecord
from lightning_pmss.layers.layout import Layout
from lightning_pmss.messages import one_line, some
from lightning_pmss.methods import METHODS
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.method import Kind, Method
from lightning_pmss.store import Record, check_index, checked, not_finite
from lightning_pmss.store.records import FileRecord, Setting, Shape, Size, shown

METADATA = "pmss"
FORMAT_VERSION = 2


class LayerRecord(Record):
    """One converted layer.

    Attributes:
        key: Key of the layer in the state dict, without the last dot; "" if it is the LightningModule itself.
        shape: (out, in) of W.
        layout: How the base stores W.
        frame_dtype: Dtype of W when frozen tensors were derived from it; None: they were read from a skeleton file.
        fingerprint: Fingerprint of the parts of W that the update reads; None if it reads nothing.
        rank: Rank of the layer; None in earlier files, where it is the number of rows.
    """

    key: str
    shape: Annotated[list[Size], Field(min_length=2, max_length=2)]
    layout: Annotated[Layout, Field(strict=False)]
    frame_dtype: Literal["float64", "float32", "bfloat16", "float16"] | None
    fingerprint: FingerprintRecord | None
    rank: Size | None = None


class FullRecord(Record):
    """One tensor of a module trained in full.

    Attributes:
        key: Key of the tensor in the state dict.
        shape: Shape of the tensor.
        tied: Other canonical names of the tensor.
    """

    key: str
    shape: Shape
    tied: list[str]


class FreshRecord(FullRecord):
    """One frozen tensor that the base's files lack, wholly or in part.

    Attributes:
        start: Number of its rows that the files contain.
    """

    start: Annotated[int, Field(ge=0)]


class BaseRecord(Record):
    """The base, with the same fields as in an adapter's config."""

    name: str | None
    revision: str | None
    model_class: str | None
    quantisation: list[str]
    quantisation_settings: dict[str, Any]


class CheckpointRecord1(Record):
    """The ``pmss`` entry in format 1."""

    model_config = ConfigDict(extra="ignore")

    format_version: Literal[1]
    method: Literal["pmss"] = "pmss"
    config: dict[str, Any]
    fingerprints: Annotated[dict[str, FingerprintRecord], Field(min_length=1)]
    tensors: dict[str, Shape] | None = None  # only beside a folder: shapes of the trained tensors by key

    @property
    def prints(self) -> dict[str, dict[str, str]]:
        """The fingerprints by canonical module name."""
        return {name: record.model_dump() for name, record in self.fingerprints.items()}


class CheckpointRecord(Record):
    """The ``pmss`` entry in format 2, with the contents of the state dict by canonical name.

    Attributes:
        format_version: The number 2.
        method: Name of the method.
        config: Options of the method.
        base: The base model.
        root: Full name of the module that names are relative to; None if the conversion stored none.
        left_out: Names of linear layers that were not converted.
        modules: The converted layers.
        also_train: The tensors of the modules trained in full.
        full_modules: Names of these modules.
        fresh: The frozen tensors that the base's files lack.
        settings: Changes that these tensors require in the base's config.json.
        tensors: Only beside a folder: shapes of the trained tensors by key.
        files: Only beside a folder: size and checksum of each part.
    """

    format_version: Literal[2]
    method: str = "pmss"
    config: dict[str, Any]
    base: BaseRecord
    root: str | None
    left_out: list[str]
    modules: Annotated[dict[str, LayerRecord], Field(min_length=1)]
    also_train: dict[str, FullRecord]
    full_modules: list[str]
    fresh: dict[str, FreshRecord] = {}
    settings: dict[str, Setting] = {}
    tensors: dict[str, Shape] | None = None
    files: dict[str, FileRecord] | None = None

    @property
    def prints(self) -> dict[str, dict[str, str]]:
        """The fingerprints by canonical module name; {} for an update that reads nothing of its base."""
        found = {name: layer.fingerprint for name, layer in self.modules.items()}
        return {name: {} if record is None else record.model_dump() for name, record in found.items()}


_RECORDS: dict[int, type[CheckpointRecord1] | type[CheckpointRecord]] = {1: CheckpointRecord1, 2: CheckpointRecord}


def read_record(entry: Any, where: str) -> CheckpointRecord1 | CheckpointRecord:
    """Check and parse the `METADATA` entry of a checkpoint.

    Args:
        entry: The entry; None without one.
        where: The checkpoint, for messages.

    Raises:
        ValueError: The entry is missing or damaged, or its format is unknown.
    """
    if entry is None:
        raise ValueError(
            f"{where} contains no PMSS adapter (it has no `{METADATA}` entry); it was made without PMSSCallback. To start from"
            " its weights, load them into the model before the Trainer runs, and drop ckpt_path."
        )
    version = entry.get("format_version") if isinstance(entry, dict) else None
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"{where} is damaged: its `{METADATA}` entry has the format {shown(version)}. {DAMAGED}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{where} has format {one_line(version)}, and this lightning-pmss reads up to {FORMAT_VERSION}: upgrade it, or use"
            " the version that made the checkpoint."
        )
    record: CheckpointRecord1 | CheckpointRecord = checked(_RECORDS[version], entry, where, DAMAGED, under=METADATA)
    options_of(record, where)
    return record


def options_of(record: CheckpointRecord1 | CheckpointRecord, where: str) -> AdapterConfig:
    """Options of the conversion.

    Args:
        record: Entry of the checkpoint.
        where: The checkpoint, for messages.

    Raises:
        ValueError: The options do not fit this version.
    """
    if record.method not in METHODS:
        raise ValueError(f"{where} is of the method {record.method!r}, which this version does not know: upgrade it.")
    return METHODS[record.method].config_class.from_file(record.config, where, DAMAGED)


class StoredLayer(NamedTuple):
    """Trained and index tensors of one layer of a checkpoint.

    Attributes:
        rank: Rank of the layer.
        trained: Trained tensors by name.
        indices: Index tensors by name, int64.
    """

    rank: int
    trained: dict[str, Tensor]
    indices: dict[str, Tensor]


def check_layer(
    tensors: Mapping[str, Tensor],
    shape: tuple[int, int],
    method: Method[Any],
    key: str,
    where: str,
    rank: int | None = None,
) -> StoredLayer:
    """Find and check the trained and index tensors of one layer.

    Args:
        tensors: The state dict of the checkpoint.
        shape: (out, in) of W.
        method: Method of the layer.
        key: Key of the layer in the state dict.
        where: The checkpoint, for messages.
        rank: Rank of the layer; None: the number of its indices.

    Raises:
        ValueError: A tensor is missing, is not finite, has another shape, or is no valid index.
    """
    start = f"{key}." if key else ""
    kinds = {name: spec.kind for name, spec in method.specs(shape, 1).items()}
    names = {
        n: f"{start}{trained_key(n) if kind is Kind.TRAINED else n}"
        for n, kind in kinds.items()
        if kind is not Kind.FROZEN
    }
    if missing := [name for name in names.values() if name not in tensors]:
        raise ValueError(f"{where} lacks {some(missing)}. {DAMAGED}")
    own = {name: tensors[full] for name, full in names.items()}
    indices = {name: tensor for name, tensor in own.items() if kinds[name] is Kind.INDEX}
    for name, index in indices.items():
        check_index(index, method.specs(shape, 1)[name].below, names[name], where, DAMAGED)
    if rank is None:
        if not indices:
            raise ValueError(f"{where} does not say the rank of `{key}`. {DAMAGED}")
        rank = len(next(iter(indices.values())))
    trained = {}
    for name, spec in method.specs(shape, rank).items():
        if spec.kind is Kind.FROZEN:
            continue
        tensor = own[name]
        wrong = tensor.dtype not in FLOATS if spec.kind is Kind.TRAINED else False
        if wrong or tuple(tensor.shape) != spec.shape:
            raise ValueError(
                f"{where}: `{names[name]}` is {tensor.dtype} {list(tensor.shape)}; for rank {rank} it must be"
                f" {'float32' if spec.kind is Kind.TRAINED else 'int32'} {list(spec.shape)}. {DAMAGED}"
            )
        if spec.kind is Kind.TRAINED:
            trained[name] = tensor
    if broken := not_finite({names[name]: tensor for name, tensor in trained.items()}):
        raise ValueError(f"{where}: NaN or infinite values in `{broken[0]}`. {DAMAGED}")
    return StoredLayer(rank, trained, {name: index.long() for name, index in indices.items()})
