"""Stream safetensors checkpoints: one tensor at a time in, one tensor at a time out.

Reading maps one shard at a time. Writing begins with the header (names, dtypes and shapes are known beforehand) and appends the
tensors as they come, so no shard is ever in memory as a whole.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from pydantic import ConfigDict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lightning_pmss.messages import one_line, short
from lightning_pmss.store import Record, checked, get_tensor, open_tensors, read_json
from lightning_pmss.store.expert_tensors import ExpertTensor, expert_tensors

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_AGAIN = "Copy or download it again."

# Names of the safetensors format. Other types (4- and 6-bit floats) belong to quantised checkpoints.
_TO_TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
_FROM_TORCH = {dtype: name for name, dtype in _TO_TORCH.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Entry of one tensor in the header of a shard."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str = ""

    @property
    def bytes(self) -> int:
        """Size of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class ShardReader:
    """The tensors of a Hugging Face folder, read one at a time; one shard is open (mapped) at a time."""

    folder: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, Any] = field(default_factory=dict)  # of the index file
    _open: tuple[str, Any] | None = None

    @cached_property
    def experts(self) -> dict[str, ExpertTensor]:
        """The matrices of fused experts and of parameters in these files, by the names of their layers' weights."""
        return expert_tensors(self.tensors)

    @property
    def matrices(self) -> ChainMap[str, TensorInfo | ExpertTensor]:
        """The tensors, and those."""
        return ChainMap(self.tensors, self.experts)  # type: ignore[arg-type]

    @property
    def files(self) -> list[str]:
        """The shard files in the order of the index."""
        return list(dict.fromkeys(info.file for info in self.tensors.values()))

    def read(self, key: str) -> Tensor:
        """One tensor: a view of the mapped file, to be read only; it stays valid when the shard is closed.

        Args:
            key: Of `tensors`, or of an expert's matrix, which is made of its parts.

        Raises:
            ValueError: The shard cannot be read.
        """
        if key not in self.tensors:
            expert = self.experts[key]
            return expert.of({part: self.read(part) for part in expert.parts})
        info = self.tensors[key]
        file = self.folder / info.file
        if self._open is None or self._open[0] != info.file:
            self.close()
            self._open = (info.file, open_tensors(file, _AGAIN))
        return get_tensor(self._open[1], key, file, _AGAIN)

    def close(self) -> None:
        """Unmap the open shard."""
        self._open = None

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_shards(base: str | os.PathLike[str]) -> ShardReader:
    """Open the weights of a model: a Hugging Face folder, or a state dict in a safetensors file.

    Of a folder it opens ``model.safetensors``, else the shards that ``model.safetensors.index.json`` names, else the one
    safetensors file in it. It reads the header of every shard, so that a missing, truncated or foreign one is reported before
    any work is done.

    Raises:
        FileNotFoundError: Nothing there, no safetensors weights in the folder, or a missing shard.
        PermissionError: A file must not be read.
        ValueError: An unreadable index or shard, or an index that does not agree with the shards.
    """
    folder = Path(base).expanduser()
    if folder.is_file():
        return _one_file(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder. The base is a folder with config.json and safetensors weights, or a safetensors file"
            " with a state dict; a model of the hub is downloaded to a folder by `hf download MODEL --local-dir FOLDER`."
        )
    if (folder / SINGLE_FILE).is_file():  # transformers, too, prefers it to an index
        return _one_file(folder / SINGLE_FILE)
    if not (folder / INDEX_FILE).is_file():
        single = sorted(folder.glob("*.safetensors"))
        if len(single) != 1:
            raise FileNotFoundError(_no_weights(folder, single))
        return _one_file(single[0])

    weight_map, metadata = _read_index(folder / INDEX_FILE)
    files = list(dict.fromkeys(weight_map.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of {len(files)} shards named in {INDEX_FILE} are missing: "
            f"{few(missing)}. Download or copy the folder again."
        )
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for info in read_header(folder / file):
            if weight_map.get(info.key) == file:  # a tensor the index does not claim is not part of the model
                tensors[info.key] = info
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise ValueError(
            f"{folder}: {INDEX_FILE} promises tensors that are not in their shard: "
            f"{few([f'{key} (in {weight_map[key]})' for key in lost])}. Index and shards are of different models; "
            "download or copy the folder again."
        )
    return ShardReader(folder, tensors, metadata)


def read_header(file: Path) -> list[TensorInfo]:
    """Names, dtypes and shapes of one safetensors file, in the order of the file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a complete safetensors file, or one with a type that torch has not.
    """
    infos = []
    with open_tensors(file, _AGAIN) as shard:
        for key in shard.offset_keys():
            part = shard.get_slice(key)
            name = part.get_dtype()
            if name not in _TO_TORCH:
                raise ValueError(
                    f"{file}: the tensor {one_line(key)} has the type {name}, which lightning-pmss cannot copy. Give a model"
                    " in floating point."
                )
            infos.append(TensorInfo(key, _TO_TORCH[name], tuple(part.get_shape()), file.name))
    return infos


class ShardWriter:
    """Write one safetensors file tensor by tensor.

    Args:
        file: Path of the new file.
        tensors: All tensors of the file; the header lists them.
        metadata: Strings for the header.
    """

    def __init__(self, file: Path, tensors: Iterable[TensorInfo], metadata: dict[str, str] | None = None) -> None:
        # Wide dtypes first, as in every safetensors file, so that each tensor begins at a multiple of its item size.
        self.plan = sorted(tensors, key=lambda info: -info.dtype.itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        offset = 0
        for info in self.plan:
            end = offset + info.bytes
            header[info.key] = {
                "dtype": _FROM_TORCH[info.dtype], "shape": list(info.shape), "data_offsets": [offset, end],
            }  # fmt: skip
            offset = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._next = 0
        self._file = open(file, "wb")  # noqa: SIM115 - closed by __exit__
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, key: str, value: Tensor) -> None:
        """Append a tensor; the order is that of `plan`.

        Raises:
            ValueError: Not the tensor that the header announced at this place.
        """
        want = self.plan[self._next]
        if (key, value.dtype, tuple(value.shape)) != (want.key, want.dtype, want.shape):
            raise ValueError(f"expected {want}, got {key} {value.dtype} {tuple(value.shape)}")
        if value.numel():
            self._file.write(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._next += 1

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()
        if kind is None and self._next != len(self.plan):
            raise ValueError(f"{self._file.name}: {len(self.plan) - self._next} announced tensors were not written")


def plan_shards(tensors: Sequence[TensorInfo], max_bytes: int | None) -> list[list[TensorInfo]]:
    """Divide tensors into shards.

    The shards they come from (``TensorInfo.file``) are kept as they are, unless one would be larger than `max_bytes`;
    then all are divided anew, as ``save_pretrained`` does. A tensor larger than `max_bytes` gets a shard of its own.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    kept: dict[str, list[TensorInfo]] = {}
    for info in tensors:
        kept.setdefault(info.file, []).append(info)
    if max_bytes is None or all(sum(info.bytes for info in shard) <= max_bytes for shard in kept.values()):
        return list(kept.values())
    known = {info.key: info for info in tensors}
    split = split_state_dict_into_shards_factory(
        known,
        get_storage_size=lambda info: info.bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    return [[known[key] for key in keys] for keys in split.filename_to_tensors.values()]


def shard_names(count: int) -> list[str]:
    """The names that transformers gives to `count` shards."""
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, shards: dict[str, list[TensorInfo]], metadata: dict[str, Any]) -> None:
    """Write ``model.safetensors.index.json`` for several shards; a single one needs none."""
    if len(shards) == 1:
        return
    total = sum(info.bytes for shard in shards.values() for info in shard)
    weight_map = {info.key: file for file, shard in shards.items() for info in shard}
    content = {"metadata": {**metadata, "total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors that fit into memory; every key is kept, also of tensors that share memory (they become copies).

    Raises:
        OSError: With the system's error number, such as that of a full disk; safetensors has an exception of its own.
    """
    copies = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    try:
        save_file(copies, file, {"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, f"cannot be written ({error})", str(file)) from error


def parse_size(size: str | int) -> int:
    """Bytes of ``"5GB"``, ``"500MB"``, ``"2GiB"`` or a number (decimal units as in transformers).

    Raises:
        ValueError: Not a positive size.
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    if match is None or match[2].upper() not in units or float(match[1]) * units[match[2].upper()] < 1:
        raise ValueError(f"max_shard_size={size!r} is not a size; write for example '5GB', '500MB' or a number.")
    return int(float(match[1]) * units[match[2].upper()])


class _Index(Record):
    """Required content of ``model.safetensors.index.json``; transformers adds more."""

    model_config = ConfigDict(extra="ignore")

    weight_map: dict[str, str]
    metadata: dict[str, Any] | None = None


def _one_file(file: Path) -> ShardReader:
    return ShardReader(file.parent, {info.key: info for info in read_header(file)})


def _read_index(file: Path) -> tuple[dict[str, str], dict[str, Any]]:
    index = checked(_Index, read_json(file, _AGAIN), str(file), _AGAIN)
    weight_map = index.weight_map
    outside = [name for name in weight_map.values() if Path(name).name != name]
    if not weight_map or outside:
        raise ValueError(f"{file} names no shards beside it ({few(outside) or 'empty'}). {_AGAIN}")
    return weight_map, index.metadata or {}


def _no_weights(folder: Path, single: Sequence[Path]) -> str:
    if single:
        return (
            f"{folder} holds {few([path.name for path in single])} and no {INDEX_FILE} that says which of them are the model."
            " Give the file of the state dict itself."
        )
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        return (
            f"{folder} holds its weights as {few(pickled)}, not as safetensors. Convert it once: "
            "AutoModelForCausalLM.from_pretrained(FOLDER, dtype='auto').save_pretrained(NEW_FOLDER), copy or save the "
            "tokenizer beside it, and give NEW_FOLDER as the base. A state dict of a model of yours: "
            "safetensors.torch.save_file(state, 'FILE.safetensors'), and give the file."
        )
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    hint = f" It holds {few(gguf)}; load that in transformers and save_pretrained() it first." if gguf else ""
    return f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}.{hint}"


def few(names: Sequence[str], limit: int = 5) -> str:
    """The first few names, for messages."""
    return ", ".join(short(one_line(name)) for name in names[:limit]) + (
        f" and {len(names) - limit} more" if len(names) > limit else ""
    )
