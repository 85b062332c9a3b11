"""The folder of unfinished work beside the output of a long selection.

``<output>.partial/`` contains one safetensors file per finished matrix, with the options and the file that it was made from. A
run with the same options skips those matrices.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from torch import Tensor

from lightning_pmss.methods.skeleton import SkeletonLayerRecord
from lightning_pmss.store import Record, check_sums, checked, open_tensors, parse_json, read_tensors
from lightning_pmss.store.disk import LOCK, atomic_file, clean_folder, held
from lightning_pmss.store.shards import few, save_tensors

_ABOUT = "piece"
_AGAIN = "Delete it: the next run makes it again."


class PieceRecord(Record):
    """Metadata saved with the tensors of one matrix.

    Attributes:
        options: Options of the selection (`AdapterConfig.per_matrix`).
        rank: Rank that it was selected with.
        source: Size and modification time of the base's file with its weight (`file_state`).
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
        found: Undamaged pieces of earlier runs, by module.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any], *, overwrite: bool) -> None:
        self.folder, self.options = folder, dict(options)
        self.found: dict[str, PieceRecord] = {}
        files = sorted(path for path in folder.iterdir() if path.name != LOCK)
        if strange := [file.name for file in files if _about(file) is None]:
            raise FileExistsError(
                f"{folder} is for unfinished work, but contains something else ({few(strange)}). Move it away, or give "
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
                f"{folder} contains an unfinished selection with other options ({'; '.join(changed)}). Finish it with those, "
                "start anew with --overwrite, or give another --output."
            )
        self.forget(others)

    def forget(self, names: list[str]) -> None:
        """Remove pieces, so that they are made again."""
        for name in names:
            del self.found[name]
            self._file(name).unlink()

    def save(self, name: str, tensors: Mapping[str, Tensor], rank: int, source: list[int], layer: Any) -> None:
        """Save a finished matrix, durable after a kill or a power cut. See `PieceRecord` for the last three arguments."""
        about = {"options": self.options, "rank": rank, "source": source, "layer": layer}
        with atomic_file(self._file(name)) as new:
            save_tensors(tensors, new, {_ABOUT: json.dumps(about)})

    def load(self, name: str) -> tuple[SkeletonLayerRecord, dict[str, Tensor]]:
        """Return a finished matrix's entry for the skeleton file, and copies of its tensors.

        Raises:
            ValueError: The piece is damaged.
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
    """Make or reuse a selection's folder and lock it; it stays only if the work fails with some matrices finished.

    Args:
        output: The file that the selection is for.
        options: Options of the selection; pieces made with others are refused.
        overwrite: Delete pieces made with other options.

    Raises:
        FileExistsError: The folder contains something else, or another run is using it.
        ValueError: It was begun with other options, and ``overwrite`` is not given.
    """
    folder = output.with_name(f"{output.name}.partial")
    if folder.is_symlink():
        raise FileExistsError(f"{folder}, the folder for unfinished work, is a link. Remove the link.")
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
    """Return a piece's metadata; empty if a power cut damaged it, None if the file is not a piece.

    The name does not decide, because another safetensors file may have been moved here.
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
    """Size and modification time. Files with equal ones are taken as equal; a file with others may still be a copy."""
    state = file.stat()
    return [state.st_size, state.st_mtime_ns]
