"""``python -m lightning_pmss estimate``: its table, its JSON, its advice and its refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lightning_pmss.cli import main
from lightning_pmss.estimate import Run, estimate
from lightning_pmss.estimate.advice import remedies
from lightning_pmss.estimate.memory import COLUMNS
from tests.estimate.small import pmss_config, write_config


def call(folder: str, *options: str) -> None:
    main(["estimate", "--model", folder, "--sequence-length", "64", *options])


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(write_config(tmp_path), "--rank", "32", "--devices", "2", "--gpu", "24GB")
    text = capsys.readouterr().out
    assert "fsdp2 on 2 devices" in text  # the default among several
    for label in ("base weights", "frozen factors", "optimizer", "activations", "logits", "reserve", "host memory"):
        assert label in text
    assert re.search(r"PMSS r=32 +LoRA r=\d+ +full", text)
    assert re.search(r"PMSS: fits 24 GB, 2\d\.\d+ GB of head room", text)


def test_json_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = write_config(tmp_path), tmp_path / "estimate.json"
    call(folder, "--json", "--output", str(file), "--rank-pattern", "v_proj=16", "--exclude-modules", "down_proj")
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads(file.read_text())
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".estimate")]
    pmss = record["methods"]["pmss"]
    assert pmss["total"] == sum(pmss[name] for name in COLUMNS)
    assert pmss["trainable"] == 4 * (16**2 + 5 * 256**2) - 4 * (256**2 - 128**2)  # k_proj has 128 outputs only
    assert record["run"]["config"]["exclude_modules"] == ["down_proj"]


def test_all_columns_train_a_number_per_output_and_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(write_config(tmp_path), "--json", "--target-modules", "k_proj", "--columns", "all", "--rank", "8")
    assert json.loads(capsys.readouterr().out)["methods"]["pmss"]["trainable"] == 4 * 128 * 8  # 4 layers of 128 outputs


def test_another_estimate_is_replaced_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = write_config(tmp_path), tmp_path / "estimate.json"
    for _ in range(2):
        call(folder, "--output", str(file))
    for name, content in (("thesis.txt", "mine"), ("other.json", '{"methods": 1}'), ("list.json", "[]")):
        (tmp_path / name).write_text(content)
        with pytest.raises(SystemExit):
            call(folder, "--output", str(tmp_path / name))
        assert f"{name} is no estimate, and writing there would destroy it" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == content


def test_the_config_file_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_config(tmp_path)
    call(folder)
    one = capsys.readouterr().out
    call(str(tmp_path / "config.json"))
    assert capsys.readouterr().out == one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-modules", "q_pro"], "target_modules: 'q_pro' matches no module; closest names: .*q_proj"),
        (["--rank", "0"], "rank=0 is not a rank"),
        (["--rank-pattern", "v_proj"], "is not NAME=RANK"),
        (["--strategy", "single", "--devices", "2"], "strategy 'single' has one device, not 2"),
        (["--micro-batch", "0"], "micro_batch=0 must be at least 1"),
        (["--output", "nowhere/at/all.json"], "nowhere/at does not exist"),
        (["--gpu", "big"], "'big' is no size in GB"),
    ],
)
def test_refusals(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        call(write_config(tmp_path), *options)
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert re.search(message, said.err)
    assert said.out == ""


def test_refusals_about_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, message in (
        (None, "config.json does not exist"),
        ("{]", "is not a model configuration"),
        ('{"model_type": "no_such"}', "is not a model configuration"),
        ('{"model_type": "t5"}', "no causal language model can be built of this t5 config"),
    ):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(SystemExit) as stop:
            call(str(tmp_path))
        assert stop.value.code == 2
        assert message in (said := capsys.readouterr().err)
        assert len(said.splitlines()) == 1, said


def test_remedies_make_it_fit(tmp_path: Path) -> None:
    folder = write_config(tmp_path)
    run = Run(folder, config=pmss_config(rank=128), micro_batch=64, sequence_length=512)
    needed = estimate(run, ("pmss",), both=False).methods["pmss"].total
    found = remedies(run, needed - 50_000_000)
    assert {"--gradient-checkpointing", "--micro-batch 1 (and accumulate gradients)"} <= {r.change for r in found}
    assert all(remedy.total <= needed - 50_000_000 for remedy in found)
    (rank,) = [int(r.change.split()[1]) for r in found if r.change.startswith("--rank")]
    lower = Run(folder, config=pmss_config(rank=rank), micro_batch=64, sequence_length=512)
    higher = Run(folder, config=pmss_config(rank=rank + 16), micro_batch=64, sequence_length=512)
    totals = [estimate(r, ("pmss",), both=False).methods["pmss"].total for r in (lower, higher)]
    assert totals[0] <= needed - 50_000_000 < totals[1]
    assert remedies(run, 1.0) == []


def test_advice_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_config(tmp_path)
    options = ["--micro-batch", "64", "--rank", "32", "--gpu", "1.2"]
    call(folder, *options)
    text = capsys.readouterr().out
    assert "PMSS: does not fit 1.2 GB" in text
    assert re.search(r"PMSS fits with one of these changes:\n  --gradient-checkpointing: [\d.]+ GB", text)
