"""The side folder in which a long selection keeps what it has finished: one small file per matrix.

``<output>.partial/`` holds ``selection.json`` (how the pieces were made and from which files) and one safetensors file per
finished matrix, each put in place by a rename. A run with the same options goes on where the last one stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

from torch import Tensor

from lightning_pmss.methods.pmss.skeleton import SkeletonLayerRecord
from lightning_pmss.store import Record, check_sums, checked, open_tensors, parse_json, read_json, read_tensors
from lightning_pmss.store.disk import held, sync
from lightning_pmss.store.kinds import WRITTEN_BY
from lightning_pmss.store.shards import ShardWriter, TensorInfo, few

IDENTITY = "selection.json"
_ABOUT, _NEW = "piece", ".tmp"
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
        self._held = ExitStack()

    def __enter__(self) -> Pieces:
        """Make or take up the folder.

        Raises:
            FileExistsError: The folder is not of a selection, or another run is at work in it.
            ValueError: It was begun with other options, and `overwrite` is not given.
        """
        if self.folder.is_symlink():
            raise FileExistsError(f"{self.folder} is a link, and unfinished work is kept there. Remove the link.")
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            refusal = f"another run is writing to {self.folder}; wait for it, or give another --output."
            stack.enter_context(held(self.folder, refusal))
            stack.callback(self._remove_empty)
            self._take_up()
            self._held = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        # Refused before the first matrix was done: nothing to take up.
        if kind is not None and not any(self.folder.glob("*.safetensors")):
            self.remove()
        self._held.close()

    def _remove_empty(self) -> None:
        with suppress(OSError):  # not empty: unfinished work
            self.folder.rmdir()

    def _take_up(self) -> None:
        before = self._read_identity()
        with os.scandir(self.folder) as found:
            strange = sorted(entry.name for entry in found if before is None or not self._is_ours(entry))
        if strange := [name for name in strange if name != f"{IDENTITY}{_NEW}"]:
            raise FileExistsError(
                f"{self.folder} is where unfinished work is kept, but holds something else ({few(strange)}). Move it "
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

    def _is_ours(self, entry: os.DirEntry[str]) -> bool:
        """By name and content: a safetensors file of others may have been moved here."""
        if not entry.is_file(follow_symlinks=False):
            return False
        if not entry.name.endswith(".safetensors"):
            return entry.name == IDENTITY or entry.name.endswith(_NEW)
        try:
            with open_tensors(Path(entry.path), _AGAIN) as opened:
                return _ABOUT in (opened.metadata() or {})
        except ValueError:  # a power cut; made again
            return True

    def _read_identity(self) -> dict[str, Any] | None:
        file = self.folder / IDENTITY
        try:
            found = None if file.is_symlink() else read_json(file, _AGAIN)
        except (OSError, ValueError):
            return None
        if not isinstance(found, dict) or found.get("written_by") != WRITTEN_BY:
            return None
        return found if isinstance(found.get("options"), dict) else None

    def write_identity(self) -> None:
        """Record options and base; called anew once pieces of a base that looks changed have been checked."""
        temporary = self.folder / f"{IDENTITY}{_NEW}"
        temporary.write_text(json.dumps(self.identity, indent=2) + "\n", encoding="utf-8")
        sync(temporary)
        os.replace(temporary, self.folder / IDENTITY)

    def start_anew(self) -> None:
        """Remove all pieces; what comes is made from the files as they are now."""
        self._clear()
        self.write_identity()
        self.base_unchanged = True

    def _clear(self) -> None:
        with os.scandir(self.folder) as found:
            own = [entry.name for entry in found if self._is_ours(entry)]
        for name in sorted(own, key=lambda name: name == IDENTITY):  # last: what a kill leaves is still a selection's
            (self.folder / name).unlink()

    def file(self, name: str) -> Path:
        """The piece of a module."""
        return self.folder / f"{quote(name, safe='')}.safetensors"

    def save(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Keep a finished matrix, safe from a kill and from a power cut."""
        infos = [TensorInfo(key, value.dtype, tuple(value.shape)) for key, value in tensors.items()]
        temporary = self.file(name).with_suffix(_NEW)
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


def file_states(folder: Path, names: list[str]) -> dict[str, list[int]]:
    """Size and time of change of files, by name."""
    states = {name: (folder / name).stat() for name in names}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}
