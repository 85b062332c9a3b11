"""The page of a run: what it shows, that it needs no other file, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_pmss import PMSSCallback
from lightning_pmss.cli import main
from lightning_pmss.datamodules import ArithmeticDataModule
from lightning_pmss.inspect import read_run, write_report
from lightning_pmss.metrics import GSM8KAccuracy
from lightning_pmss.modules import CausalLMModule


@pytest.fixture(scope="module")
def finished(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, fitted and tested."""
    logger = CSVLogger(tmp_path_factory.mktemp("report"), name="run")
    trainer = L.Trainer(
        max_steps=6,
        val_check_interval=3,
        log_every_n_steps=1,
        accelerator="cpu",
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[PMSSCallback(rank=8)],
    )
    module = CausalLMModule(tiny_llama, metric=GSM8KAccuracy(), max_new_tokens=2)
    data = ArithmeticDataModule(tiny_llama, train_size=48, val_size=4, test_size=4, batch_size=8)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    folder = Path(logger.log_dir)
    (folder / "config.yaml").write_text("model: <script>alert('unescaped')</script>\n")
    return folder


def test_shows_curves_update_scores_and_settings(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(finished)])
    assert "report.html" in capsys.readouterr().out
    page = (finished / "report.html").read_text(encoding="utf-8")
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        "Loss",
        "Throughput",
        "Memory",
        "The update, layer by layer",
        "Spectrum of the update",
        "Scores: test",
        "On disk",
        "Configuration",
        "Versions",
    ]
    assert page.count("<svg") == 5
    assert "norm of s C U R" in page
    assert "<script" not in page  # the configuration is text
    loaded = re.findall(r"""(?:src|href)=["']?(https?:|//|/)[^"'>]*""", page)
    assert not loaded
    assert f"{14 * 64:,}" in page  # trained parameters: 14 layers of rank 8
    assert "<b>6</b><span>steps</span>" in page
    run = read_run(finished)
    assert f"{run.last('test/loss'):.4f}" in page


def test_without_the_base_it_says_what_is_missing(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "moved")
    described = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    (folder / "adapter" / "adapter_config.json").write_text(
        json.dumps(described | {"base_model_name_or_path": "org/name"})
    )
    page = write_report(folder, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Type --base MODEL_DIR" in page
    assert "norm of s U" in page
    assert "Spectrum" not in page


def test_a_folder_with_metrics_alone(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "metrics.csv", tmp_path)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "No adapter in the run" in page
    assert re.findall(r"<h2>(.*?)</h2>", page)[:1] == ["Loss"]


@pytest.mark.parametrize("name", ["report.html", "report.html.writing", ".report.html.pmss-tmp-0123456789ab"])
def test_links_in_a_downloaded_folder_are_not_written_through(finished: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "thesis").write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(finished / "metrics.csv", folder)
    (folder / name).symlink_to(tmp_path / "none" if name == "report.html" else tmp_path / "thesis")
    page = write_report(folder)
    assert "PMSS run" in page.read_text(encoding="utf-8")
    assert not page.is_symlink()
    assert (tmp_path / "thesis").read_text() == "mine"
    assert not (tmp_path / "none").exists()


def test_refusals(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(finished, tmp_path / "page.html")
    with pytest.raises(FileExistsError, match=r"another --output or --overwrite"):
        write_report(finished, tmp_path / "page.html")
    write_report(finished, tmp_path / "page.html", overwrite=True)
    (tmp_path / "thesis.html").write_text("mine")
    with pytest.raises(FileExistsError, match=r"thesis\.html is not a page of a run.*Name another file"):
        write_report(finished, tmp_path / "thesis.html", overwrite=True)
    assert (tmp_path / "thesis.html").read_text() == "mine"
    with pytest.raises(FileNotFoundError, match=r"Did you mean .*version_0\?"):
        write_report(finished.parent)
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "nowhere")])
    assert "There is no folder" in capsys.readouterr().err
    (tmp_path / "metrics.csv").write_text("step,loss\nfirst,1.0\n")
    with pytest.raises(ValueError, match=r"metrics\.csv, line 2"):
        read_run(tmp_path)
    (tmp_path / "metrics.csv").unlink()
    (tmp_path / "summary-test.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary-test\.json is not readable JSON.*Run `test` again"):
        read_run(tmp_path)
