"""The side folder in which a long selection keeps what it has finished: one small file per matrix.

``<output>.partial/`` holds ``selection.json`` (how the pieces were made and from which files) and one safetensors file per
finished matrix, each put in place by a rename. A run with the same options goes on where the last one stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

from torch import Tensor

from lightning_pmss.files.atomic import WRITTEN_BY
from lightning_pmss.files.shards import ShardWriter, TensorInfo
from lightning_pmss.reading import Record, check_sums, checked, open_tensors, parse_json, read_json, read_tensors
from lightning_pmss.skeleton import SkeletonLayerRecord

try:
    import fcntl
except ImportError:  # Windows: two runs to one output are not told apart there
    fcntl = None  # type: ignore[assignment]

IDENTITY = "selection.json"
_ABOUT = "piece"
_AGAIN = "Delete it: the next run makes it anew."


class PieceRecord(Record):
    """What is saved beside the tensors of one matrix.

    Attributes:
        rank: It was selected with.
        layer: Its entry in the skeleton file.
    """

    rank: int
    layer: SkeletonLayerRecord


class Pieces:
    """The finished matrices of one selection; open it with ``with``, which locks the folder.

    Args:
        output: The file that the selection is for.
        options: How each matrix is treated; pieces made in another way are refused.
        files: Size and time of the base's files, to see whether they may have changed.
        overwrite: Throw away pieces that were made in another way.

    Attributes:
        folder: ``<output>.partial``.
        base_unchanged: Whether the base's files are, by size and time, those that the pieces were made from. If not, they
            may still hold the same weights (a copy): ask the fingerprints.
    """

    def __init__(
        self, output: Path, options: Mapping[str, Any], files: Mapping[str, list[int]], *, overwrite: bool
    ) -> None:
        self.folder = output.with_name(f"{output.name}.partial")
        self.identity: dict[str, Any] = {"written_by": WRITTEN_BY, "options": dict(options), "files": dict(files)}
        self.overwrite = overwrite
        self.base_unchanged = True
        self._lock: int | None = None

    def __enter__(self) -> Pieces:
        """Make or take up the folder.

        Raises:
            FileExistsError: The folder is not of a selection, or another run is at work in it.
            ValueError: It was begun with other options, and `overwrite` is not given.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if fcntl is not None:
            self._lock = os.open(self.folder, os.O_RDONLY)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._unlock()
                raise FileExistsError(
                    f"another run is writing to {self.folder}; wait for it, or give another --output."
                ) from None
            except OSError:
                pass  # a file system without locks
        try:
            self._take_up()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        # Refused before the first matrix was done: nothing to take up.
        if kind is not None and not any(self.folder.glob("*.safetensors")):
            self.remove()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_up(self) -> None:
        present = list(self.folder.iterdir())
        before = self._read_identity()
        if before is None and any(path.name != f"{IDENTITY}.tmp" for path in present):
            raise FileExistsError(
                f"{self.folder} is where unfinished work is kept, but holds something else ({present[0].name}). Move it "
                "away, or give another --output."
            )
        if before is None:
            self.write_identity()
            return
        old, new = before.get("options", {}), self.identity["options"]
        changed = [f"{k} {old.get(k)!r}, now {new.get(k)!r}" for k in {**new, **old} if old.get(k) != new.get(k)]
        if changed and not self.overwrite:
            raise ValueError(
                f"{self.folder} holds an unfinished selection with other options ({'; '.join(changed)}). Finish it with "
                "those, start anew with --overwrite, or give another --output."
            )
        if changed:
            self.start_anew()
        else:
            self.base_unchanged = before.get("files") == self.identity["files"]

    def _read_identity(self) -> dict[str, Any] | None:
        try:
            found = read_json(self.folder / IDENTITY, _AGAIN)
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and found.get("written_by") == WRITTEN_BY else None

    def write_identity(self) -> None:
        """Record options and base; called anew once pieces of a base that looks changed have been checked."""
        temporary = self.folder / f"{IDENTITY}.tmp"
        temporary.write_text(json.dumps(self.identity, indent=2) + "\n", encoding="utf-8")
        sync(temporary)
        os.replace(temporary, self.folder / IDENTITY)

    def start_anew(self) -> None:
        """Remove all pieces; what comes is made from the files as they are now."""
        self._clear()
        self.write_identity()
        self.base_unchanged = True

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()

    def file(self, name: str) -> Path:
        """The piece of a module."""
        return self.folder / f"{quote(name, safe='')}.safetensors"

    def save(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Keep a finished matrix, safe from a kill and from a power cut."""
        infos = [TensorInfo(key, value.dtype, tuple(value.shape)) for key, value in tensors.items()]
        temporary = self.file(name).with_suffix(".tmp")
        with ShardWriter(temporary, infos, {_ABOUT: json.dumps(about)}) as writer:
            for info in writer.plan:
                writer.write(info.key, tensors[info.key])
        sync(temporary)
        os.replace(temporary, self.file(name))

    def about(self, name: str) -> PieceRecord | None:
        """What was saved beside a module's tensors; None if there is no whole piece of it."""
        try:
            with open_tensors(self.file(name), _AGAIN) as opened:
                text = (opened.metadata() or {}).get(_ABOUT, "")
            return checked(
                PieceRecord, parse_json(text.encode(), str(self.file(name)), _AGAIN), str(self.file(name)), _AGAIN
            )
        except (FileNotFoundError, ValueError):
            return None

    def load(self, name: str) -> dict[str, Tensor]:
        """The tensors of a piece, as copies.

        Raises:
            ValueError: They are not those that were saved.
        """
        file, about = self.file(name), self.about(name)
        tensors = read_tensors(file, _AGAIN)
        if about is None or set(about.layer.tensors) != set(tensors):
            raise ValueError(f"{file} is damaged. {_AGAIN}")
        check_sums(tensors, about.layer.tensors, str(file), _AGAIN)
        return tensors

    def infos(self, name: str) -> list[TensorInfo]:
        """Dtypes and shapes of a piece."""
        return [TensorInfo(key, value.dtype, tuple(value.shape)) for key, value in self.load(name).items()]

    def remove(self) -> None:
        """Remove the folder: the work is done."""
        self._clear()
        self.folder.rmdir()


def sync(file: Path) -> None:
    """Flush a file to the disk."""
    handle = os.open(file, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_states(folder: Path, names: list[str]) -> dict[str, list[int]]:
    """Size and time of change of files, by name."""
    states = {name: (folder / name).stat() for name in names}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}
