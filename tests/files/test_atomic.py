"""Folders are written whole or not at all, and only our own are replaced."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_pmss import disk
from lightning_pmss.files.atomic import atomic_folder


def _write(target: Path, text: str, *, overwrite: bool = False) -> None:
    with atomic_folder(target, overwrite=overwrite) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "data.txt").write_text(text)
        manifest = {"written_by": "lightning-pmss", "files": ["sub/data.txt", "merge_report.json"]}
        (folder / "merge_report.json").write_text(json.dumps(manifest))


def _hidden(parent: Path) -> list[str]:
    return [path.name for path in parent.iterdir() if path.name.startswith(".")]


def test_writes_and_replaces_own_folder(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    _write(target, "first")
    _write(target, "second", overwrite=True)
    assert (target / "sub" / "data.txt").read_text() == "second"
    assert _hidden(target.parent) == []


def test_existing_folder_needs_overwrite(tmp_path: Path) -> None:
    _write(tmp_path / "out", "first")
    with pytest.raises(FileExistsError, match=r"not empty.*--overwrite.*overwrite=True"):
        _write(tmp_path / "out", "second")
    assert (tmp_path / "out" / "sub" / "data.txt").read_text() == "first"


def test_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").touch()
    _write(tmp_path / "out", "first")
    assert (tmp_path / "out" / "sub" / "data.txt").exists()


def test_file_in_place_of_folder(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(FileExistsError, match="is a file"):
        _write(tmp_path / "out", "first", overwrite=True)


@pytest.mark.parametrize("ours", [True, False])
def test_foreign_files_are_never_destroyed(tmp_path: Path, ours: bool) -> None:
    target = tmp_path / "out"
    if ours:
        _write(target, "first")
    (target / "sub").mkdir(parents=True, exist_ok=True)
    (target / "sub" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"did not write \(sub/thesis.txt\)"):
        _write(target, "second", overwrite=True)
    assert (target / "sub" / "thesis.txt").read_text() == "mine"


def test_manifest_of_others_gives_no_right(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(FileExistsError, match="adapter_config.json"):
        _write(tmp_path / "out", "second", overwrite=True)


@pytest.mark.parametrize("swap", [True, False])
def test_exception_keeps_the_old_folder(tmp_path: Path, swap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not swap:
        monkeypatch.setattr(disk, "_exchange", lambda *_: False)
    _write(tmp_path / "out", "first")
    with pytest.raises(TypeError, match="must be str"):
        _write(tmp_path / "out", 7, overwrite=True)  # type: ignore[arg-type] - fails inside the block
    assert (tmp_path / "out" / "sub" / "data.txt").read_text() == "first"
    assert _hidden(tmp_path) == []
    _write(tmp_path / "out", "second", overwrite=True)
    assert (tmp_path / "out" / "sub" / "data.txt").read_text() == "second"
    assert _hidden(tmp_path) == []


def test_full_disk_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "out", "first")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as caught:
            _write(tmp_path / "out", "second", overwrite=True)
    assert "Nothing was changed" in caught.value.__notes__[0]
    assert (tmp_path / "out" / "sub" / "data.txt").read_text() == "first"
    assert _hidden(tmp_path) == []


def test_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "out", "first")
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if ".pmss-tmp-" in self.name:
            raise OSError(errno.EIO, "I/O error")
        return rename(self, target)

    monkeypatch.setattr(disk, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="I/O error"):
        _write(tmp_path / "out", "second", overwrite=True)
    assert (tmp_path / "out" / "sub" / "data.txt").read_text() == "first"


def test_killed_run_leaves_nothing_that_looks_complete_and_is_cleaned(tmp_path: Path) -> None:
    _write(tmp_path / "out", "first")
    code = (
        "import sys, time; from lightning_pmss.files.atomic import atomic_folder\n"
        "with atomic_folder(sys.argv[1], overwrite=True) as folder:\n"
        "    (folder / 'data').write_text('half'); print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    # A second run beside the living one leaves its folder alone.
    _write(tmp_path / "out", "meanwhile", overwrite=True)
    assert len(_hidden(tmp_path)) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (tmp_path / "out" / "sub" / "data.txt").read_text() == "meanwhile"
    assert len(_hidden(tmp_path)) == 1
    _write(tmp_path / "out", "second", overwrite=True)
    assert _hidden(tmp_path) == []


def test_kill_between_two_renames_is_repaired(tmp_path: Path) -> None:
    _write(tmp_path / "out", "first")
    (tmp_path / "out").rename(tmp_path / ".out.pmss-old-0123456789ab")
    with pytest.raises(FileExistsError, match="not empty"):
        _write(tmp_path / "out", "second")
    assert (tmp_path / "out" / "sub" / "data.txt").read_text() == "first"


def test_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    _write(tmp_path / "real", "first")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    _write(tmp_path / "link", "second", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "sub" / "data.txt").read_text() == "second"


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_files_get_the_modes_that_the_umask_allows(tmp_path: Path, umask: int, mode: int) -> None:
    """safetensors makes its files readable by their owner alone, which a served model must not stay."""
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "weights").write_text("x")
            (folder / "weights").chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "weights").stat().st_mode & 0o777 == mode
