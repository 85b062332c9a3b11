"""Files and folders are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lightning_pmss.store.atomic import atomic_folder
from lightning_pmss.store.disk import atomic_file
from lightning_pmss.store.kinds import MERGED
from tests.killing import Moment, files, forks, moments, run


def _write(target: Path, text: str, *, overwrite: bool = False) -> None:
    with atomic_folder(target, MERGED, overwrite=overwrite) as folder:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tools.jinja").write_text(text)
        (folder / "config.json").write_text(text)
        listed = ["config.json", "additional_chat_templates/tools.jinja", "merge_report.json"]
        (folder / "merge_report.json").write_text(json.dumps({"written_by": "lightning-pmss", "files": listed}))


def _text(target: Path) -> str:
    text = (target / "config.json").read_text()
    assert (target / "additional_chat_templates" / "tools.jinja").read_text() == text
    return text


def _hidden(parent: Path) -> list[str]:
    return [path.name for path in parent.iterdir() if path.name.startswith(".")]


def test_writes_and_replaces_own_folder(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    _write(target, "first")
    _write(target, "second", overwrite=True)
    assert _text(target) == "second"
    assert _hidden(target.parent) == []


def test_existing_folder_needs_overwrite(tmp_path: Path) -> None:
    _write(tmp_path / "out", "first")
    with pytest.raises(FileExistsError, match=r"not empty.*--overwrite.*overwrite=True"):
        _write(tmp_path / "out", "second")
    assert _text(tmp_path / "out") == "first"
    assert _hidden(tmp_path) == []


def test_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").touch()
    _write(tmp_path / "out", "first")
    assert _text(tmp_path / "out") == "first"
    assert _hidden(tmp_path) == []


def test_exception_keeps_the_old_folder(tmp_path: Path) -> None:
    _write(tmp_path / "out", "first")
    with pytest.raises(TypeError, match="must be str"):
        _write(tmp_path / "out", 7, overwrite=True)  # type: ignore[arg-type] - fails inside the block
    assert _text(tmp_path / "out") == "first"
    assert _hidden(tmp_path) == []
    _write(tmp_path / "out", "second", overwrite=True)
    assert _text(tmp_path / "out") == "second"
    assert _hidden(tmp_path) == []


@pytest.mark.parametrize("write", [_write, lambda *args, **_: _write_file(*args)])
def test_full_disk_keeps_what_was_there(tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "first")
    before = files(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as caught:
            write(tmp_path / "out", "second", overwrite=True)
    assert "Nothing was changed" in caught.value.__notes__[0]
    assert files(tmp_path) == before


def test_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "out", "first")

    def fails(source: Path, target: Path) -> None:
        assert not (tmp_path / "out").exists()  # the old folder is moved aside
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="I/O error"):
        _write(tmp_path / "out", "second", overwrite=True)
    assert _text(tmp_path / "out") == "first"
    assert _hidden(tmp_path) == []


@forks
def test_a_kill_at_any_change_loses_nothing(tmp_path: Path) -> None:
    """Every one of them: this is cheap."""
    runs, log = tmp_path / "runs", tmp_path / "log"

    def work() -> None:
        _write(runs / "out", "second", overwrite=True)

    _write(runs / "out", "first")
    ending = run(work, runs, log)
    assert ending.status == 0, ending.output
    seen = []
    for moment in moments(ending.changes, 0, ending.changes):
        _write(runs / "out", "first", overwrite=True)
        assert run(work, runs, log, Moment(moment.change)).status == -9
        # Between the two renames alone nothing is there: the next run brings it back.
        seen.append(_text(runs / "out") if (runs / "out").exists() else "between")
        with pytest.raises(FileExistsError, match="not empty"):
            _write(runs / "out", "third")
        assert _text(runs / "out") in ("first", "second")
        work()
        assert _text(runs / "out") == "second"
        assert _hidden(runs) == []
    assert set(seen) == {"first", "second", "between"}
    assert seen.count("between") == 1


def _write_file(path: Path, text: str, **_: Any) -> None:
    with atomic_file(path) as file:
        file.write_text(text)


@contextmanager
def _another_process_at(target: Path, write: str) -> Iterator[None]:
    """Inside, another process is in the middle of writing the target; then it is killed."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            with atomic_folder(target, MERGED) if write == "folder" else atomic_file(target) as temporary:
                (temporary / "half" if write == "folder" else temporary).write_text("half")
                theirs.send(b"ready")
                time.sleep(600)
        finally:
            os._exit(1)
    try:
        assert ours.recv(5) == b"ready"
        yield
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        ours.close()
        theirs.close()


@forks
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_second_process_leaves_the_first_alone_and_a_killed_one_s_leavings_go(tmp_path: Path, kind: str) -> None:
    def write() -> None:
        _write(tmp_path / "out", "whole", overwrite=True) if kind == "folder" else _write_file(tmp_path / "out", "x")

    with _another_process_at(tmp_path / "out", kind):
        write()
        assert len(_hidden(tmp_path)) == 1
    whole = files(tmp_path / "out") or (tmp_path / "out").read_bytes()
    assert len(_hidden(tmp_path)) == 1
    write()
    assert _hidden(tmp_path) == []
    assert (files(tmp_path / "out") or (tmp_path / "out").read_bytes()) == whole


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_in_the_place_of_a_file_is_replaced(tmp_path: Path, exists: bool) -> None:
    if exists:
        (tmp_path / "thesis").write_text("mine")
    (tmp_path / "out").symlink_to(tmp_path / "thesis")
    _write_file(tmp_path / "out", "page")
    assert not (tmp_path / "out").is_symlink()
    assert files(tmp_path) == {"out": b"page"} | ({"thesis": b"mine"} if exists else {})


@pytest.mark.parametrize("kind", ["pipe", "link to a folder", "broken link", "circle"])
def test_strange_things_under_the_names_of_leavings(tmp_path: Path, kind: str) -> None:
    """A downloaded folder may hold them: they do not hang, and nothing is reached through them."""
    name = ".out.pmss-tmp-0123456789ab"
    thesis, place = tmp_path / "thesis", tmp_path / "runs" / name
    thesis.mkdir()
    (thesis / "text").write_text("mine")
    place.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to({"link to a folder": thesis, "broken link": "none", "circle": name}[kind])
    _write_file(tmp_path / "runs" / "out", "page")
    assert files(thesis) == {"text": b"mine"}
    assert (tmp_path / "runs" / "out").read_text() == "page"
    assert not os.path.lexists(place)


def test_special_files_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for name in ("pipe", "link"):
        with pytest.raises(FileExistsError, match="is no regular file"):
            _write_file(tmp_path / name, "page")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        _write_file(tmp_path, "page")


def test_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    _write(tmp_path / "real", "first")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    _write(tmp_path / "link", "second", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert _text(tmp_path / "real") == "second"


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_files_get_the_modes_that_the_umask_allows(tmp_path: Path, umask: int, mode: int) -> None:
    """safetensors makes its files readable by their owner alone, which a served model must not stay."""
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "out", MERGED) as folder:
            (folder / "weights").write_text("x")
            (folder / "weights").chmod(0o600)
        with atomic_file(tmp_path / "file") as temporary:
            temporary.write_text("x")
            temporary.chmod(0o600)
    finally:
        os.umask(before)
    for written in (tmp_path / "out" / "weights", tmp_path / "file"):
        assert written.stat().st_mode & 0o777 == mode
