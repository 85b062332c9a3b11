"""Read checkpoints of Lightning on the CPU, without the training program: a file, or a folder of FSDP or DeepSpeed.

A folder contains a ``pmss.json`` beside its parts, which names the tensors of the model. The engines pickle these parts: load
checkpoints only from people whose programs you would run.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict
from torch import Tensor

from lightning_pmss.layers.parts import clean_name
from lightning_pmss.messages import one_line, reason, some
from lightning_pmss.store.json_text import read_json
from lightning_pmss.store.records import FileRecord, Record, Shape, checked
from lightning_pmss.store.unreadable import refuse_unreadable

SIDECAR = "pmss.json"
DAMAGED = "Use an earlier checkpoint."


def read_checkpoint(path: Path, *, weights_only: bool = True) -> dict[str, Any]:
    """Contents of a checkpoint, with the model's trained tensors whole under ``state_dict``.

    Args:
        path: File, or folder of FSDP1, FSDP2, ZeRO-2 or ZeRO-3, whose optimizer states are not read.
        weights_only: Refuse a file with other objects than plain values and tensors, since unpickling could run code.

    Raises:
        FileNotFoundError: The path does not exist.
        PermissionError: The file is not readable.
        ValueError: It is damaged, incomplete, or no checkpoint of Lightning.
        ModuleNotFoundError: It is a folder of DeepSpeed, which is not installed.
    """
    if path.is_dir():
        return _read_folder(path)
    refuse_unreadable(path)
    with refusing_damage(path):
        # Memory-mapped, so that optimizer states are not read.
        content = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=zipfile.is_zipfile(path))
    check_content(content, f"the checkpoint {path}")
    refuse_flipped_bits(path)
    return dict(content)


def step_of(path: Path) -> int:
    """Return the optimizer step of a checkpoint that a run of one's own has written; its tensors are not read.

    Args:
        path: File, or folder of FSDP1, FSDP2, ZeRO-2 or ZeRO-3.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: It is damaged, or no checkpoint of Lightning.
    """
    with refusing_damage(path):
        file = path
        if path.is_dir():
            first = path / "meta.pt"
            file = first if first.is_file() else min(path.glob("*/*model_states.pt"))
        content = torch.load(file, map_location="cpu", weights_only=False, mmap=zipfile.is_zipfile(file))
        return int(content["global_step"])


@contextmanager
def refusing_damage(path: Path) -> Iterator[None]:
    """Convert errors in reading a checkpoint to ValueError; their type depends on the place of the damage.

    Raises:
        ValueError: The file cannot be read.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, ModuleNotFoundError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error):
            raise ValueError(f"the checkpoint {path} cannot be read ({reason(error)}). {DAMAGED}") from error
        raise ValueError(
            f"the checkpoint {path} contains more than plain values and tensors ({reason(error)}). If it is yours, load it"
            f" with weights_only=False; else: {DAMAGED}"
        ) from error
    except Exception as error:
        raise ValueError(
            f"the checkpoint {path} cannot be read: truncated, damaged, or no checkpoint ({reason(error)}). {DAMAGED}"
        ) from error


def refuse_flipped_bits(file: Path) -> None:
    """Compare the checksums that ``torch.save`` writes and ``torch.load`` ignores.

    Raises:
        ValueError: A part of the file was changed after it was written.
    """
    if not zipfile.is_zipfile(file):  # torch before 1.6 wrote no checksums
        return
    with zipfile.ZipFile(file) as archive:
        try:
            damaged = archive.testzip()
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"the checkpoint {file} is damaged ({reason(error)}). {DAMAGED}") from error
    if damaged is not None:
        raise ValueError(
            f"the checkpoint {file} changed after it was written: the checksum of its part {one_line(damaged)} differs."
            f" {DAMAGED}"
        )


def check_content(content: Any, where: str) -> None:
    """Refuse content that is no checkpoint of Lightning.

    Raises:
        ValueError: An entry that every checkpoint has is missing or has another type.
    """
    kinds: dict[str, type | tuple[type, ...]] = {
        "state_dict": Mapping, "epoch": int, "global_step": int, "pytorch-lightning_version": str, "loops": Mapping,
        "callbacks": Mapping, "optimizer_states": list, "lr_schedulers": list, "hyper_parameters": dict,
    }  # fmt: skip
    if not isinstance(content, Mapping) or "state_dict" not in content:
        raise ValueError(
            f"{where} is no checkpoint of Lightning (it has no state_dict). Give the file that a Trainer wrote."
        )
    wrong = [name for name, kind in kinds.items() if name in content and not isinstance(content[name], kind)]
    wrong += [name for name in ("epoch", "global_step") if name not in wrong and not 0 <= content.get(name, 0) < 2**63]
    if "pytorch-lightning_version" not in wrong and not _is_of_today(content):
        wrong.append("pytorch-lightning_version")
    state = content["state_dict"]
    if not wrong and not all(isinstance(k, str) and _is_plain(v) for k, v in state.items()):
        wrong = ["state_dict"]
    if not wrong and (twice := _twice(state)):
        raise ValueError(f"{where} is damaged: it has two values for {some(twice)}. {DAMAGED}")
    if wrong:
        raise ValueError(f"{where} is damaged: {some(wrong)} has another form than Lightning writes. {DAMAGED}")


def _is_of_today(content: Mapping[str, Any]) -> bool:
    """Whether the Lightning version is 2 or later; a checkpoint without a ``pmss`` entry may lack it."""
    version = content.get("pytorch-lightning_version", None if "pmss" in content else "2.0")
    return version is not None and re.match(r"[2-9]\.\d", version) is not None


def _is_plain(value: Any) -> bool:
    """Whether a value is a strided tensor with data: not sparse, quantised or on the meta device."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta and not value.is_quantized


def _twice(state: Mapping[str, Tensor]) -> list[str]:
    """Clean names with two different values, from keys with and without a wrapper's prefix."""
    found: dict[str, Tensor] = {}
    return [
        name
        for key, value in state.items()
        if (first := found.setdefault(name := clean_name(key), value)) is not value and not torch.equal(first, value)
    ]


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of each part of a checkpoint folder, for `refuse_changed_parts`."""
    parts = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SIDECAR)
    return {part.relative_to(folder).as_posix(): _file_record(part) for part in parts}


def refuse_changed_parts(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Compare the parts of a folder with their sizes and checksums.

    Args:
        folder: The checkpoint.
        files: Result of `describe_files` at the time of writing.

    Raises:
        ValueError: A part is missing or changed.
    """
    for name, record in files.items():
        part = folder / name
        if not part.is_file() or not Path(os.path.realpath(part)).is_relative_to(os.path.realpath(folder)):
            raise ValueError(f"the checkpoint {folder} is not complete: it has no {one_line(name)}. {DAMAGED}")
        if part.stat().st_size != record.bytes or _file_record(part) != record.model_dump():
            raise ValueError(
                f"the checkpoint {folder} changed after it was written: {one_line(name)} is not what it was. {DAMAGED}"
            )


def _file_record(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


class _Parts(Record):
    """Entries of the sidecar about a folder's parts."""

    model_config = ConfigDict(extra="ignore")

    tensors: dict[str, Shape]
    files: dict[str, FileRecord] = {}  # absent in format 1


def _read_folder(folder: Path) -> dict[str, Any]:
    about = read_sidecar(folder)
    parts = checked(_Parts, about, str(folder / SIDECAR), DAMAGED)
    wanted = parts.tensors
    refuse_changed_parts(folder, parts.files)
    with refusing_damage(folder):
        content = _read_deepspeed(folder) if (folder / "latest").is_file() else _read_fsdp(folder, set(wanted))
    state = {k: v for k, v in content["state_dict"].items() if k in wanted}
    if missing := sorted(set(wanted) - set(state)):
        raise ValueError(f"the checkpoint {folder} lacks {some(missing)}. {DAMAGED}")
    content |= {"state_dict": state, "pmss": about}
    check_content(content, f"the checkpoint {folder}")
    return content


def read_sidecar(folder: Path) -> dict[str, Any]:
    """Contents of the JSON file beside the parts of a checkpoint folder.

    Raises:
        PermissionError: The file is not readable.
        ValueError: The file is missing, or contains no JSON object.
    """
    if not (folder / SIDECAR).is_file():
        raise ValueError(f"{folder} was made without PMSSCallback (it has no {SIDECAR}) or is not complete.")
    about = read_json(folder / SIDECAR, DAMAGED)
    if not isinstance(about, dict):
        raise ValueError(f"{folder / SIDECAR} is damaged: it is not an object of JSON. {DAMAGED}")
    return about


def _read_fsdp(folder: Path, wanted: set[str]) -> dict[str, Any]:
    """Read the model's tensors one by one, since the folder also contains the optimizer's."""
    from torch.distributed.checkpoint import FileSystemReader, load

    parts = FileSystemReader(folder).read_metadata().state_dict_metadata
    state: dict[str, Any] = {}
    for key, part in parts.items():
        root, _, name = key.partition(".")  # FSDP1: `model`, FSDP2: `state_dict`
        if name in wanted and root in ("model", "state_dict"):
            tensor: Any = part
            state.setdefault(root, {})[name] = torch.empty(tensor.size, dtype=tensor.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on purpose
        load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    found = {name: value for root in state.values() for name, value in root.items()}
    rest = torch.load(folder / "meta.pt", map_location="cpu", weights_only=True)
    return dict(rest) | {"state_dict": found}


def _read_deepspeed(folder: Path) -> dict[str, Any]:
    """Read parameters from the optimizer's float32 copies, and all else from the engine's copy of the model."""
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise ModuleNotFoundError(
            f"the checkpoint {folder} was written by DeepSpeed, which is needed to read it:"
            " pip install -c constraints.txt -e '.[deepspeed]'"
        ) from error
    name = (folder / "latest").read_text(encoding="utf-8").strip()
    if Path(name).name != name:
        raise ValueError(f"`latest` names no folder of it: {name}")
    parts = folder / name
    first = min(parts.glob("*model_states.pt"))  # of rank 0
    content = torch.load(first, map_location="cpu", weights_only=False)
    buffers = {key: value for key, value in content["module"].items() if isinstance(value, Tensor)}
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        trained = get_fp32_state_dict_from_zero_checkpoint(str(folder), exclude_frozen_parameters=True)
    kept = ("epoch", "global_step", "pytorch-lightning_version", "callbacks", "loops", "made_with", "hyper_parameters")
    return {key: content[key] for key in kept if key in content} | {
        "state_dict": {clean_name(key): value.detach() for key, value in (buffers | dict(trained)).items()}
    }
