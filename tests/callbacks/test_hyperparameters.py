"""The callback's options among the hyper-parameters of every logger, beside those of the module and its data."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_pmss import AdapterCallback, PMSSCallback, PMSSConfig
from lightning_pmss.callbacks.hyperparameters import log_hyperparameters
from tests.callbacks.toys import Numbers, Toy, trainer


class Keeps(L.pytorch.loggers.Logger):
    """Keeps the last hyper-parameters that it is given, or the first ones, or all together."""

    def __init__(self, keeps: str) -> None:
        super().__init__()
        self.keeps, self.kept = keeps, None
        self.calls: list[dict[str, Any]] = []

    @property
    def name(self) -> str:
        return "keeps"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.calls.append(dict(params))
        if self.keeps == "all":
            self.kept = (self.kept or {}) | dict(params)
        elif self.keeps == "last" or self.kept is None:
            self.kept = dict(params)

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass


class Saves(Toy):
    def __init__(self, width: int = 16, rank: int = 7) -> None:
        super().__init__()
        self.save_hyperparameters()


class Data(Numbers):
    def __init__(self, fold: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()


def pmss(folder: Path, **options: Any) -> PMSSCallback:
    return PMSSCallback(**{"rank": 6, "output_dir": folder / "out", "merge_on_save": None} | options)


@pytest.mark.parametrize("module_class", [Toy, Saves])
def test_every_logger_has_the_options_and_the_modules_own(tmp_path: Path, module_class: Any) -> None:
    keepers, csv = [Keeps(kind) for kind in ("all", "first", "last")], CSVLogger(tmp_path)
    callback = pmss(tmp_path, target_modules=["0", "2"], dropout=0.25)
    module = module_class()
    trainer(tmp_path, callback, logger=[csv, *keepers], max_epochs=1).fit(module, Data())
    stored = yaml.safe_load((Path(csv.log_dir) / "hparams.yaml").read_text())
    own = {"width": 16, "rank": 7} if module_class is Saves else {}
    options = {f"pmss/{key}": value for key, value in callback.config.to_dict().items()}
    report = callback.report
    assert report is not None
    figures = {"pmss/trainable_parameters": report.trainable, "pmss/total_parameters": report.total}
    more = {"pmss/merge_on_save": None, "pmss/on_nonfinite": "stop", "pmss/converted_layers": 2}
    for kept in (stored, *(keeper.kept for keeper in keepers)):
        assert {**options, **figures, **more, **own, "fold": 3}.items() <= kept.items()
        named = set(inspect.signature(AdapterCallback.__init__).parameters) - {"self", "config"}
        named |= {field.name for field in dataclasses.fields(PMSSConfig)}
        assert {f"pmss/{name}" for name in named} <= set(kept)
        assert kept["pmss/output_dir"] == str(tmp_path / "out")
    assert dict(module.hparams) == own
    assert options["pmss/rank"] == 6
    assert report.trainable == 72


def test_options_alone_are_logged_once_and_nobody_asked_for_none(tmp_path: Path) -> None:
    keeper = Keeps("all")
    trainer(tmp_path, pmss(tmp_path), logger=keeper, max_epochs=1).fit(Toy(), Numbers())
    assert len(keeper.calls) == 1
    for options in ({"fast_dev_run": True}, {"enable_autolog_hparams": False}):
        silent = Keeps("all")
        trainer(tmp_path, pmss(tmp_path), logger=silent, max_epochs=1, **options).fit(Saves(), Numbers())
        assert not silent.calls
    trainer(tmp_path, pmss(tmp_path), logger=False, max_epochs=1).fit(Saves(), Numbers())
    trainer(tmp_path, pmss(tmp_path), logger=DummyLogger(), max_epochs=1).fit(Saves(), Numbers())


def test_only_the_first_rank_logs(tmp_path: Path) -> None:
    keeper, callback = Keeps("all"), pmss(tmp_path)
    runner = trainer(tmp_path, callback, logger=keeper, max_epochs=1)
    module = Toy()
    runner.fit(module, Numbers())
    assert len(keeper.calls) == 1
    second: Any = SimpleNamespace(fast_dev_run=False, is_global_zero=False, loggers=[keeper])
    log_hyperparameters(second, module, callback.report, {})
    assert len(keeper.calls) == 1


def test_options_of_the_command_line(tmp_path: Path, tiny_llama: str) -> None:
    from lightning_pmss.cli import main

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1 + 1?", "answer": "2\\n#### 2"}\n' * 8)
    main(
        ["fit", "--model", "CausalLMModule", "--model.model_name_or_path", tiny_llama, "--data", "GSM8KDataModule"]
        + ["--data.path", str(rows), "--data.val_size", "2", "--trainer.max_steps", "1", "--pmss.rank", "5"]
        + ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path / "logs")]
        + ["--trainer.accelerator", "cpu", "--pmss.merge_on_save", "null", "--pmss.coordinates", "spectral"]
        + ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
        + ["--trainer.limit_val_batches", "0"]
    )
    (file,) = (tmp_path / "logs").rglob("hparams.yaml")
    stored = yaml.safe_load(file.read_text())
    assert (stored["pmss/rank"], stored["pmss/coordinates"]) == (5, "spectral")
    assert {f"pmss/{key}" for key in PMSSConfig().to_dict()} <= set(stored)
