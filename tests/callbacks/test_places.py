"""Where a run writes is looked at before it trains; and what was trained is kept where writing fails all the same."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from lightning_pmss import PMSSCallback, load_adapter
from lightning_pmss.callbacks import results
from lightning_pmss.conversion.convert import conversion_of
from tests.callbacks.toys import Toy, plain_loader, trainer


def fit(folder: Path, *more: L.Callback, module: L.LightningModule | None = None, **options: Any) -> L.LightningModule:
    module = module or Toy()
    settings = {"rank": 4, "output_dir": folder / "out"} | options.pop("callback", {})
    trainer(folder, PMSSCallback(**settings), *more, **{"max_epochs": 2} | options).fit(module, plain_loader())
    return module


def refused(folder: Path, *more: L.Callback, match: str, error: type[Exception] = OSError, **options: Any) -> None:
    """Refused before the model is converted, and nothing is written."""
    before = sorted(folder.rglob("*"))
    module = Toy()
    with pytest.raises(error, match=match):
        fit(folder, *more, module=module, **options)
    assert conversion_of(module) is None
    assert not module.losses
    assert sorted(folder.rglob("*")) == before


def thesis(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "thesis.txt").write_text("mine")
    return folder / "thesis.txt"


def same_adapter(folder: Path, module: Any) -> bool:
    other = Toy()
    load_adapter(other, folder)
    x = torch.randn(3, 16)
    return torch.allclose(other.net(x), module.net(x), atol=1e-5)


# -- at the start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter", "merged", "adapter-interrupted"])
def test_files_of_others_in_the_place_of_results(tmp_path: Path, name: str) -> None:
    thesis(tmp_path / "out" / name)
    refused(tmp_path, match=r"did not write \(thesis\.txt\).*Move them away")


def test_files_of_others_beside_checkpoints(tmp_path: Path) -> None:
    thesis(tmp_path / "saved" / "epoch=0-merged")
    saver = ModelCheckpoint(tmp_path / "saved", "{epoch}")
    refused(tmp_path, saver, match=r"thesis\.txt", callback={"merge_on_save": "checkpoint"})
    fit(tmp_path, saver)  # nothing is written there


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    refused(tmp_path, match=r"Not a directory: nothing can be written in .*out, .*--pmss\.output_dir")
    refused(tmp_path, match="Not a directory", callback={"output_dir": tmp_path / "out" / "below"})
    (tmp_path / "out").unlink()
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    refused(tmp_path, match="Not a directory")
    (tmp_path / "out").unlink()
    (tmp_path / "out").symlink_to(tmp_path / "out")
    refused(tmp_path, match="Not a directory")
    (tmp_path / "out").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "merged").write_text("a file")
    refused(tmp_path, match="is a file, and a folder is to be written there")
    fit(tmp_path, callback={"merge_on_save": None})


def test_folders_of_checkpoints_are_looked_at_too(tmp_path: Path) -> None:
    (tmp_path / "saved").touch()
    refused(tmp_path, ModelCheckpoint(tmp_path / "saved"), match="Not a directory: nothing can be written in .*saved")


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    if os.access(tmp_path / "closed", os.W_OK):  # root may write everywhere
        allowed = os.access
        monkeypatch.setattr(os, "access", lambda path, *a, **k: Path(path).name != "closed" and allowed(path, *a, **k))
    folder = tmp_path / "closed" / "run"
    refused(tmp_path, match="Permission denied: nothing can be written in .*run", callback={"output_dir": folder})


def test_remote_folders_are_refused_and_not_made_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"s3://bucket/run is not on this machine.*--pmss\.output_dir"):
        PMSSCallback(output_dir="s3://bucket/run")
    options: dict[str, Any] = {"callback": {"output_dir": None}, "default_root_dir": "memory://bucket/run"}
    refused(tmp_path, match="memory://bucket/run is not on this machine", error=ValueError, **options)
    saver = ModelCheckpoint("memory://bucket/saved")
    beside = {"merge_on_save": "checkpoint"}
    refused(tmp_path, saver, match="a merged model beside each checkpoint", error=ValueError, callback=beside)
    assert not list(tmp_path.glob("memory:*"))


class Language(L.LightningModule):
    def __init__(self, base: str | Path) -> None:
        super().__init__()
        self.model: Any = AutoModelForCausalLM.from_pretrained(base)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("trained")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_the_base_in_the_place_of_the_merged_model(tiny_llama: str, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "out" / "merged"))
    manifest = {"written_by": "lightning-pmss", "files": [p.name for p in base.iterdir()]}
    (base / "merge_report.json").write_text(json.dumps(manifest))  # as of an earlier run, and so it might be replaced
    with pytest.raises(ValueError, match=r"the output .* is the base itself.*--pmss\.output_dir"):
        fit(tmp_path, module=Language(base))
    assert (base / "model.safetensors").is_file()


def test_too_little_room_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.warns(
        UserWarning, match=r"1e-06 GB are free on the disk of the adapter \(about .*merged model.*checkpoints"
    ):
        fit(tmp_path, ModelCheckpoint(tmp_path / "saved"))
    assert (tmp_path / "out" / "merged").is_dir()


def test_leftovers_of_killed_runs_go(tmp_path: Path) -> None:
    for folder in ("out", "saved"):
        for name in (".adapter.pmss-tmp-0123456789ab", ".epoch=7-merged.pmss-tmp-0123456789ab"):
            (tmp_path / folder / name).mkdir(parents=True)
    (tmp_path / "saved" / ".last.ckpt.pmss-tmp-0123456789ab").write_text("half")
    (tmp_path / "saved" / ".own.pmss-tmp-notours").write_text("x")
    fit(tmp_path, ModelCheckpoint(tmp_path / "saved"))
    hidden = [p.name for p in tmp_path.rglob(".*")]
    assert hidden == [".own.pmss-tmp-notours"]


# -- at the end ---------------------------------------------------------------------------------------------------------


class Meanwhile(L.Callback):
    """Does something in the middle of the training."""

    def __init__(self, action: Any) -> None:
        self.action = action

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 0:
            self.action()


def test_what_came_into_the_way_meanwhile_stays_and_results_go_beside_it(tmp_path: Path) -> None:
    def put() -> None:
        thesis(tmp_path / "out" / "adapter")
        thesis(tmp_path / "out" / "merged")

    with pytest.warns(UserWarning, match=r"adapter could not be written .*The result is in .*adapter-2 instead\."):
        module = fit(tmp_path, Meanwhile(put))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"adapter", "adapter-2", "merged", "merged-2"}
    assert [p.name for p in (tmp_path / "out" / "adapter").iterdir()] == ["thesis.txt"]
    assert same_adapter(tmp_path / "out" / "adapter-2", module)
    assert (tmp_path / "out" / "merged-2" / "model.safetensors").is_file()


def test_a_lost_output_folder_is_replaced_by_one_elsewhere(tmp_path: Path) -> None:
    def lose() -> None:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "out").write_text("a file")

    with pytest.warns(UserWarning, match=r"The result is in .*root/out-adapter-2 instead\."):
        module = fit(tmp_path, Meanwhile(lose), default_root_dir=tmp_path / "root")
    assert same_adapter(tmp_path / "root" / "out-adapter-2", module)


def test_a_merged_model_that_fails_leaves_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(results, "write_merged", full)
    module = Toy()
    with pytest.raises(OSError, match="No space left") as caught:
        fit(tmp_path, module=module)
    adapter = tmp_path / "out" / "adapter"
    assert f"The adapter is complete: {adapter}." in caught.value.__notes__[0]
    assert "python -m lightning_pmss merge --base BASE --adapter" in caught.value.__notes__[0]
    assert same_adapter(adapter, module)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["adapter"]


def test_an_adapter_that_fails_everywhere_leaves_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(results, "save_adapter", broken)
    module = Toy()
    with pytest.raises(OSError, match="I/O error"):
        fit(tmp_path, ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1000), module=module)
    monkeypatch.undo()
    other = Toy()
    callback = PMSSCallback(rank=4, output_dir=tmp_path / "again")
    checkpoint = str(tmp_path / "saved" / "last-interrupted.ckpt")
    trainer(tmp_path, callback, max_epochs=2).fit(other, plain_loader(), ckpt_path=checkpoint)
    assert not other.losses
    assert same_adapter(tmp_path / "again" / "adapter", module)


def test_a_checkpoint_that_finds_no_room_goes_elsewhere(tmp_path: Path) -> None:
    """The one of a run that is stopped: it is one of the two things that are left of it."""

    def stop() -> None:
        (tmp_path / "saved" / "last-interrupted.ckpt").mkdir(parents=True)
        (tmp_path / "saved" / "last-interrupted.ckpt" / "thesis.txt").write_text("mine")
        raise ValueError("of the user")

    class Full(L.pytorch.plugins.io.TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            if Path(path).name == "last-interrupted.ckpt":
                raise OSError(errno.EIO, "I/O error")
            super().save_checkpoint(checkpoint, path)

    saver = ModelCheckpoint(tmp_path / "saved", "{epoch}", every_n_epochs=5)
    with pytest.warns(UserWarning, match=r"The result is in .*last-interrupted-2\.ckpt instead\."):  # noqa: SIM117
        with pytest.raises(ValueError, match="of the user"):
            fit(tmp_path, Meanwhile(stop), saver, plugins=[Full()])
    assert torch.load(tmp_path / "saved" / "last-interrupted-2.ckpt")["global_step"] == 6


def test_pruning_goes_on_past_what_it_must_not_remove(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "saved", "{epoch}")

    class Puts(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 1:
                thesis(tmp_path / "saved" / "epoch=0-merged")

    with pytest.warns(UserWarning, match=r"epoch=0-merged stays, although its checkpoint is gone.*thesis\.txt"):
        module = fit(tmp_path, Puts(), saver, callback={"merge_on_save": "checkpoint"}, max_epochs=3)
    assert len(module.losses) == 18  # type: ignore[arg-type]
    assert {p.name for p in (tmp_path / "saved").iterdir()} == {"epoch=2.ckpt", "epoch=2-merged", "epoch=0-merged"}
    assert (tmp_path / "saved" / "epoch=0-merged" / "thesis.txt").read_text() == "mine"


def test_training_goes_on_without_a_merged_model_beside_a_checkpoint(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "saved", "{epoch}", save_top_k=-1)
    put = Meanwhile(lambda: thesis(tmp_path / "saved" / "epoch=1-merged"))
    with pytest.warns(UserWarning, match=r"No merged model was written beside .*epoch=1\.ckpt, which is complete"):
        fit(tmp_path, put, saver, callback={"merge_on_save": "checkpoint"}, max_epochs=3)
    merged = {p.name for p in (tmp_path / "saved").iterdir() if (p / "model.safetensors").is_file()}
    assert merged == {"epoch=0-merged", "epoch=2-merged"}


def test_training_goes_on_where_an_old_checkpoint_cannot_be_removed(tmp_path: Path) -> None:
    class Stubborn(L.pytorch.plugins.io.TorchCheckpointIO):
        def remove_checkpoint(self, path: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    saver = ModelCheckpoint(tmp_path / "saved", "{epoch}")
    with pytest.warns(
        UserWarning, match=r"The old checkpoint .*epoch=0\.ckpt could not be removed: .*Permission denied"
    ):
        fit(tmp_path, saver, plugins=[Stubborn()])
    assert (tmp_path / "out" / "merged").is_dir()
