"""Checkpoint files: the last good one is there at every moment, whatever the file systems and whoever is killed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from lightning_pmss import PMSSCallback
from tests import forks
from tests.callbacks.toys import Toy, plain_loader, trainer

ROOT = Path(__file__).parents[2]


def fit(folder: Path, saver: ModelCheckpoint, **options: Any) -> Toy:
    module = Toy()
    callback = PMSSCallback(rank=4, output_dir=folder / "out", merge_on_save=None)
    trainer(folder, callback, saver, **options).fit(module, plain_loader())
    return module


# Run in a process of its own: an audit hook stays for ever. It reports how the file given by name was touched.
WATCHED = """
import json, os, sys
from pathlib import Path
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from tests.callbacks.test_checkpoint_files import fit

touched, synced = [], []
fsync = os.fsync
os.fsync = lambda handle: (synced.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))[1]

def watch(event, given):
    if event == "open" and isinstance(given[0], str) and given[0].endswith("last.ckpt"):
        if given[2] & (os.O_WRONLY | os.O_RDWR):
            touched.append(["written", given[0]])
    elif event == "os.rename" and str(given[1]).endswith("last.ckpt"):
        touched.append(["renamed", str(given[0]), str(given[0]) in synced])

sys.addaudithook(watch)
for name, plugins in (("default", []), ("async", [AsyncCheckpointIO()])):
    folder = Path(sys.argv[1]) / name
    fit(folder, ModelCheckpoint(folder, "{epoch}", save_last=True), max_epochs=2, plugins=plugins)
print(json.dumps(touched))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_last_checkpoint_is_renamed_into_place_and_never_written(tmp_path: Path) -> None:
    """Lightning writes into TMPDIR; on another file system the move is a copy over the last good checkpoint."""
    other = Path("/dev/shm")  # noqa: S108 - another file system than pytest's folders
    environment = dict(os.environ)
    if other.is_dir() and other.stat().st_dev != tmp_path.stat().st_dev:
        environment["TMPDIR"] = str(other)
    done = forks.run(["-c", WATCHED, tmp_path], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    touched = json.loads(done.stdout.splitlines()[-1])
    folders = [tmp_path / name for name in ("default", "default", "async", "async")]  # two epochs each
    assert [(how, Path(source).parents[1], *rest) for how, source, *rest in touched] == [
        ("renamed", f, True) for f in folders
    ]
    for folder in folders:
        assert sorted(p.name for p in folder.iterdir() if p.is_file()) == ["epoch=1.ckpt", "last.ckpt"]
        assert torch.load(folder / "last.ckpt")["epoch"] == 1


def test_a_folder_of_that_name_is_replaced_when_the_file_is_complete(tmp_path: Path) -> None:
    (tmp_path / "saved" / "last.ckpt").mkdir(parents=True)  # as FSDP leaves it
    (tmp_path / "saved" / "last.ckpt" / "meta.pt").write_text("x")
    fit(tmp_path, ModelCheckpoint(tmp_path / "saved", save_last=True, enable_version_counter=False), max_epochs=1)
    assert torch.load(tmp_path / "saved" / "last.ckpt")["epoch"] == 0


def test_a_folder_that_holds_no_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    for name in ("last.ckpt", "last-interrupted.ckpt"):
        (tmp_path / "saved" / name).mkdir(parents=True)
        (tmp_path / "saved" / name / "thesis.txt").write_text("mine")
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True, enable_version_counter=False)
    with pytest.raises(IsADirectoryError, match="last.ckpt is a folder without a checkpoint.*Move it away"):
        fit(tmp_path, saver, max_epochs=1)
    fit(tmp_path, ModelCheckpoint(tmp_path / "saved", "{epoch}"), max_epochs=1)
    for name in ("last.ckpt", "last-interrupted.ckpt"):
        assert (tmp_path / "saved" / name / "thesis.txt").read_text() == "mine"


def test_a_folder_of_shards_stays_until_the_one_file_is_complete(tmp_path: Path) -> None:
    """FSDP with ``state_dict_type="full"`` removes a folder of that name first: the last good checkpoint of another run."""
    last = tmp_path / "saved" / "last.ckpt"
    last.mkdir(parents=True)
    callback = PMSSCallback(rank=4, output_dir=tmp_path / "out", merge_on_save=None)
    seen = []

    class Sharded(Toy):
        def on_train_start(self) -> None:
            seam: Any = callback._seam
            seam.engine = "fsdp1"
            inner = seam._inner["save_checkpoint"]

            def save(checkpoint: Any, path: Path, options: Any) -> None:
                seen.append((last.is_dir(), path.parents[1], path == last))
                inner(checkpoint, path, options)

            seam._inner["save_checkpoint"] = save

    saver = ModelCheckpoint(tmp_path / "saved", "last", enable_version_counter=False)
    trainer(tmp_path, callback, saver, max_epochs=1).fit(Sharded(), plain_loader())
    assert seen == [(True, last.parent, False)]
    assert torch.load(last)["epoch"] == 0
    assert [p.name for p in last.parent.iterdir()] == ["last.ckpt"]


def test_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(Toy):
        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 1:

                def full(_: int) -> None:
                    raise OSError(28, "No space left on device")

                monkeypatch.setattr(os, "fsync", full)

    saver = ModelCheckpoint(tmp_path / "saved", "{epoch}", save_last=True)
    callback = PMSSCallback(rank=4, output_dir=tmp_path / "out", merge_on_save=None)
    with pytest.raises(OSError, match="No space left") as caught:
        trainer(tmp_path, callback, saver).fit(Full(), plain_loader())
    monkeypatch.undo()
    assert "Nothing was changed at" in caught.value.__notes__[0]
    assert not [p for p in (tmp_path / "saved").iterdir() if p.name.startswith(".")]
    assert torch.load(tmp_path / "saved" / "last.ckpt")["epoch"] == 0


def test_resuming_brings_back_a_checkpoint_that_a_kill_left_between_two_renames(tmp_path: Path) -> None:
    """As a folder of shards may lie; a file is used here because one process writes no shards."""
    last = tmp_path / "saved" / "last.ckpt"
    fit(tmp_path, ModelCheckpoint(last.parent, save_last=True), max_epochs=1)
    aside = last.with_name(".last.ckpt.pmss-tmp-0123456789ab") / "old"
    aside.parent.mkdir()
    last.rename(aside)
    module = Toy()
    callback = PMSSCallback(rank=4, output_dir=tmp_path / "out", merge_on_save=None)
    saver = ModelCheckpoint(last.parent, save_last=True)
    trainer(tmp_path, callback, saver, max_epochs=2).fit(module, plain_loader(), ckpt_path=str(last))
    assert len(module.losses) == 6  # of the second epoch alone
    assert torch.load(last)["epoch"] == 1
    assert not list(last.parent.glob(".*"))


class Broken(dict[str, Any]):
    """A value that cannot be pickled."""

    def __reduce__(self) -> Any:
        raise ValueError("no pickle of this")


def test_what_cannot_be_pickled_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    class Late(L.Callback):
        def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            if trainer.current_epoch == 1:
                checkpoint["late"] = Broken()

    saver = ModelCheckpoint(tmp_path / "saved", "{epoch}", save_last=True)
    callback = PMSSCallback(rank=4, output_dir=tmp_path / "out", merge_on_save=None)
    with pytest.raises(ValueError, match="no pickle"):
        trainer(tmp_path, callback, Late(), saver).fit(Toy(), plain_loader())
    assert not [p for p in (tmp_path / "saved").iterdir() if p.name.startswith(".")]
    assert torch.load(tmp_path / "saved" / "last.ckpt")["epoch"] == 0


def test_link_to_the_last_checkpoint_never_dangles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ModelCheckpoint removes what the link points to before it makes a new link; a kill between would lose the link."""
    link = tmp_path / "saved" / "last.ckpt"
    seen = []
    remove = TorchCheckpointIO.remove_checkpoint

    def removed(self: TorchCheckpointIO, path: Any) -> None:
        remove(self, path)
        seen.append(torch.load(link)["epoch"])  # what a run that is killed now would resume from

    monkeypatch.setattr(TorchCheckpointIO, "remove_checkpoint", removed)
    fit(tmp_path, ModelCheckpoint(tmp_path / "saved", save_last="link"), max_epochs=3)
    assert seen == [1, 2]
    assert link.is_symlink()
    assert torch.load(link)["epoch"] == 2


def test_remote_checkpoints_go_where_lightning_puts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.chdir(tmp_path)
    saver = ModelCheckpoint("memory://bucket/run", "{epoch}", save_last=True, save_top_k=1)
    module = fit(tmp_path, saver, max_epochs=2)
    assert not (tmp_path / "memory:").exists()
    files = fsspec.filesystem("memory")
    assert {Path(f).name for f in files.ls("/bucket/run", detail=False)} == {"epoch=1.ckpt", "last.ckpt"}
    other = Toy()
    callback = PMSSCallback(rank=4, output_dir=tmp_path / "out", merge_on_save=None)
    trainer(tmp_path, callback).validate(other, plain_loader(), ckpt_path="memory://bucket/run/last.ckpt")
    assert torch.equal(other.net[0].core.weight, module.net[0].core.weight)


def test_a_plugin_of_the_user_stays(tmp_path: Path) -> None:
    class Mine(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            torch.save({"mine": True}, path)

    for name, plugin in (("own", Mine()), ("wrapped", AsyncCheckpointIO(Mine()))):
        saver = ModelCheckpoint(tmp_path / name, "{epoch}", save_last=True)
        fit(tmp_path, saver, max_epochs=1, plugins=[plugin])
        assert torch.load(tmp_path / name / "last.ckpt") == {"mine": True}
