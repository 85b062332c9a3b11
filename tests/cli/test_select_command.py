"""``python -m lightning_pmss select``."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_pmss.cli import main
from lightning_pmss.files.select import select_files
from lightning_pmss.methods.pmss.config import PMSSConfig
from lightning_pmss.methods.pmss.skeleton import read_skeleton
from tests import forks

REPOSITORY = Path(__file__).resolve().parents[2]


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["select", *args])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_every_option_reaches_the_file(tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "s.safetensors"
    command = ["select", "--model", tiny_llama, "--output", str(output), "--target-modules", "q_proj", "up_proj"]
    command += ["--exclude-modules", r".*layers\.1\..*", "--rank", "6", "--rank-pattern", "up_proj=4", "--selection"]
    command += ["pivoted_qr", "--row-mode", "nested", "--oversample", "5", "--seed", "7", "--coordinates", "spectral"]
    main([*command, "--workers", "1"])
    printed = capsys.readouterr()
    assert "2 matrices of LlamaForCausalLM" in printed.out
    assert "with 1 worker;" in printed.out
    assert "selecting rows and columns" in printed.err
    skeleton = read_skeleton(output)
    assert skeleton.options == {
        "target_modules": ["q_proj", "up_proj"],
        "exclude_modules": r".*layers\.1\..*",
        "target_parameters": [],
        "rank": 6,
        "rank_pattern": {"up_proj": 4},
        "selection": "pivoted_qr",
        "row_mode": "nested",
        "oversample": 5,
        "seed": 7,
        "coordinates": "spectral",
        "columns": "selected",
    }
    assert {name: len(layer.tensors["rows"]) for name, layer in skeleton.layers.items()} == {
        "model.layers.0.self_attn.q_proj": 6,
        "model.layers.0.mlp.up_proj": 4,
    }


def test_columns_all_selects_rows_only(tiny_llama: str, tmp_path: Path) -> None:
    output = tmp_path / "s.safetensors"
    main(["select", "--model", tiny_llama, "--output", str(output), "--columns", "all", "--rank", "4"])
    skeleton = read_skeleton(output, columns="all")
    assert {frozenset(layer.tensors) for layer in skeleton.layers.values()} == {frozenset({"rows", "right"})}
    assert {len(layer.tensors["rows"]) for layer in skeleton.layers.values()} == {4}


def test_defaults_are_the_configs(tiny_llama: str, tmp_path: Path) -> None:
    by_command, in_python = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    main(["select", "--model", tiny_llama, "--output", str(by_command)])
    select_files(tiny_llama, in_python, PMSSConfig(), progress=False)
    assert by_command.read_bytes() == in_python.read_bytes()
    assert len(read_skeleton(by_command).layers) == 14


@pytest.mark.parametrize(
    ("words", "means"),
    [
        (["all-linear"], "all-linear"),
        (["q_proj"], ["q_proj"]),
        (["model.layers.0.self_attn.q_proj"], ["model.layers.0.self_attn.q_proj"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        ([r".*\.[qv]_proj"], r".*\.[qv]_proj"),
    ],
)
def test_names_and_regular_expressions(tiny_llama: str, tmp_path: Path, words: list[str], means: object) -> None:
    output = tmp_path / "s.safetensors"
    main(["select", "--model", tiny_llama, "--rank", "4", "--output", str(output), "--target-modules", *words])
    assert read_skeleton(output).options["target_modules"] == means


def test_refusals_are_one_line(tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "s.safetensors"
    given = ("--model", tiny_llama, "--output", str(output))
    for args, message in (
        (("--model", str(tmp_path / "none"), "--output", str(output)), "is not a folder"),
        ((*given, "--rank", "0"), "rank=0 is not a rank"),
        ((*given, "--rank-pattern", "up_proj"), "'up_proj' is not NAME=RANK"),
        ((*given, "--target-modules", "query", "key"), "matches no module"),
        ((*given, "--workers", "0"), "workers=0"),
        (("--model", tiny_llama, "--output", str(tmp_path)), "is a folder"),
    ):
        error = refused(capsys, *args)
        assert error.startswith("python -m lightning_pmss select: error: ")
        assert message in error
        assert error.count("\n") == 1
    assert not output.exists()


def test_unknown_choices_name_the_known(tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--model", tiny_llama, "--output", str(tmp_path / "s"))
    assert "pivoted_qr" in refused(capsys, *given, "--selection", "best")
    assert "--output" in refused(capsys, "--model", tiny_llama)


def test_as_a_program(tiny_llama: str, tmp_path: Path) -> None:
    output = tmp_path / "s.safetensors"
    command = ["-m", "lightning_pmss", "select", "--model", tiny_llama, "--rank", "8", "--output"]
    for code, says in ((0, "14 matrices"), (2, "To replace it give --overwrite")):
        result = forks.run([*command, str(output)])
        assert result.returncode == code, result.stderr
        assert says in result.stdout + result.stderr
        assert "Traceback" not in result.stderr
