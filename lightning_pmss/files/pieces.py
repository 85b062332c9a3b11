"""The side folder in which a long selection keeps what it has finished: one small file per matrix.

``<output>.partial/`` holds one safetensors file per finished matrix, which says how and from which file it was made. A run with
the same options skips those matrices.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from torch import Tensor

from lightning_pmss.methods.pmss.skeleton import SkeletonLayerRecord
from lightning_pmss.store import Record, check_sums, checked, open_tensors, parse_json, read_tensors
from lightning_pmss.store.disk import LOCK, atomic_file, clean_folder, held
from lightning_pmss.store.shards import few, save_tensors

_ABOUT = "piece"
_AGAIN = "Delete it: the next run makes it anew."


class PieceRecord(Record):
    """What is saved beside the tensors of one matrix.

    Attributes:
        options: How every matrix of the selection is treated.
        rank: It was selected with.
        source: Size and time of change of the base's file with its weight (`file_state`).
        layer: Its entry in the skeleton file.
    """

    options: dict[str, Any]
    rank: int
    source: list[int]
    layer: SkeletonLayerRecord


class Pieces:
    """The finished matrices of one selection; `keeping` opens it.

    Attributes:
        folder: ``<output>.partial``.
        found: Those of earlier runs, by module; the damaged ones are left out, and made again.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any], *, overwrite: bool) -> None:
        self.folder, self.options = folder, dict(options)
        self.found: dict[str, PieceRecord] = {}
        files = sorted(path for path in folder.iterdir() if path.name != LOCK)
        if strange := [file.name for file in files if _about(file) is None]:
            raise FileExistsError(
                f"{folder} is where unfinished work is kept, but holds something else ({few(strange)}). Move it away, or give "
                "another --output."
            )
        for file in files:
            with suppress(ValueError):
                self.found[unquote(file.stem)] = _record(file)
        others = [name for name, record in self.found.items() if record.options != self.options]
        if others and not overwrite:
            old, new = self.found[others[0]].options, self.options
            changed = [f"{k} {old.get(k)!r}, now {new.get(k)!r}" for k in new | old if old.get(k) != new.get(k)]
            raise ValueError(
                f"{folder} holds an unfinished selection with other options ({'; '.join(changed)}). Finish it with those, "
                "start anew with --overwrite, or give another --output."
            )
        self.forget(others)

    def forget(self, names: list[str]) -> None:
        """Remove pieces, which are made again."""
        for name in names:
            del self.found[name]
            self._file(name).unlink()

    def save(self, name: str, tensors: Mapping[str, Tensor], rank: int, source: list[int], layer: Any) -> None:
        """Keep a finished matrix, safe from a kill and from a power cut. For the last three see `PieceRecord`."""
        about = {"options": self.options, "rank": rank, "source": source, "layer": layer}
        with atomic_file(self._file(name)) as new:
            save_tensors(tensors, new, {_ABOUT: json.dumps(about)})

    def load(self, name: str) -> tuple[SkeletonLayerRecord, dict[str, Tensor]]:
        """The entry of a finished matrix in the skeleton file, and its tensors, as copies.

        Raises:
            ValueError: They are not those that were saved.
        """
        file = self._file(name)
        layer, tensors = _record(file).layer, read_tensors(file, _AGAIN)
        if set(layer.tensors) != set(tensors):
            raise ValueError(f"{file} is damaged. {_AGAIN}")
        check_sums(tensors, layer.tensors, str(file), _AGAIN)
        return layer, tensors

    def _file(self, name: str) -> Path:
        return self.folder / f"{quote(name, safe='')}.safetensors"


@contextmanager
def keeping(output: Path, options: Mapping[str, Any], *, overwrite: bool) -> Iterator[Pieces]:
    """Make or take up the folder of a selection and lock it; it stays only if the work fails with some matrices finished.

    Args:
        output: The file that the selection is for.
        options: How every matrix is treated; pieces made in another way are refused.
        overwrite: Throw away pieces that were made in another way.

    Raises:
        FileExistsError: The folder holds something else, or another run is at work in it.
        ValueError: It was begun with other options, and `overwrite` is not given.
    """
    folder = output.with_name(f"{output.name}.partial")
    if folder.is_symlink():
        raise FileExistsError(f"{folder} is a link, and unfinished work is kept there. Remove the link.")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with held(folder, f"another run is writing to {folder}; wait for it, or give another --output."):
            clean_folder(folder)
            yield Pieces(folder, options, overwrite=overwrite)
            for file in sorted(folder.iterdir()):
                if _about(file) is not None:
                    file.unlink()
    finally:
        with suppress(OSError):  # not empty: unfinished work
            folder.rmdir()


def _about(file: Path) -> str | None:
    """What a piece says of itself; empty where a power cut damaged it, and None of a file of others.

    A safetensors file of others may have been moved here, so the name does not decide.
    """
    if file.is_symlink() or not file.is_file() or file.suffix != ".safetensors":
        return None
    try:
        with open_tensors(file, _AGAIN) as opened:
            return (opened.metadata() or {}).get(_ABOUT)
    except ValueError:
        return ""


def _record(file: Path) -> PieceRecord:
    return checked(PieceRecord, parse_json((_about(file) or "").encode(), str(file), _AGAIN), str(file), _AGAIN)


def file_state(file: Path) -> list[int]:
    """Size and time of change: a file with the same ones holds the same weights. With others it may be a copy."""
    state = file.stat()
    return [state.st_size, state.st_mtime_ns]
