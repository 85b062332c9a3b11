"""The command line, in process and as a program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lightning_pmss.cli import PMSSCLI, TOOLS, main, tools
from tests import forks

REPOSITORY = Path(__file__).resolve().parents[2]
QUICKSTART = str(REPOSITORY / "configs" / "quickstart.yaml")


def small(tiny_llama: str, tmp_path: Path, *more: str) -> list[str]:
    """Options that make the quickstart's recipe a matter of seconds."""
    return [
        "--config",
        QUICKSTART,
        f"--model.model_name_or_path={tiny_llama}",
        "--model.max_new_tokens=4",
        "--data.train_size=40",
        "--data.val_size=8",
        "--data.test_size=8",
        f"--data.cache_dir={tmp_path / 'cache'}",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=4",
        "--trainer.val_check_interval=2",
        "--trainer.enable_progress_bar=false",
        f"--trainer.logger.save_dir={tmp_path / 'runs'}",
        "--pmss.rank=8",
        *more,
    ]


def printed_config(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    assert stop.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


def test_overrides_on_top_of_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(
        capsys, "fit", "--config", QUICKSTART, "--pmss.rank", "64", "--model.optimizer.lr", "2e-3", "--data.steps=2"
    )
    assert config["pmss"]["rank"] == 64
    assert config["pmss"]["target_modules"] == "all-linear"
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 2e-3
    assert config["model"]["init_args"]["optimizer"]["init_args"]["weight_decay"] == 0.0
    assert config["data"]["init_args"]["steps"] == 2


def test_defaults_of_the_module_can_be_overridden_without_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    short = ("--model", "CausalLMModule", "--model.model_name_or_path", "m", "--data", "ArithmeticDataModule")
    config = printed_config(capsys, "fit", *short, "--model.optimizer.lr", "3e-3")
    optimizer = config["model"]["init_args"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.AdamW"
    assert (optimizer["init_args"]["lr"], optimizer["init_args"]["weight_decay"]) == (3e-3, 0.0)
    assert config["seed_everything"] == 0


def test_tokenizer_follows_the_model_and_callback_is_there(tiny_llama: str, tmp_path: Path) -> None:
    cli = PMSSCLI(small(tiny_llama, tmp_path), run=False)
    assert cli.datamodule.tokenizer_name == tiny_llama
    assert [type(c).__name__ for c in cli.trainer.callbacks].count("PMSSCallback") == 1


def test_module_without_a_model_name_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    demo = "lightning.pytorch.demos.boring_classes."
    config = printed_config(
        capsys, "fit", "--model", f"{demo}BoringModel", "--data", f"{demo}BoringDataModule", "--pmss.rank=2"
    )
    assert config["model"]["class_path"] == f"{demo}BoringModel"


def test_fit_in_several_passes(tiny_llama: str, tmp_path: Path) -> None:
    overlay = str(REPOSITORY / "configs" / "training" / "bsam.yaml")
    found = {}
    for name, more in {
        "plain": [],
        "bsam": ["--config", overlay],
        "published": ["--model.optimizer.published=true"],
    }.items():
        words = ["--config", overlay, *more] if name == "published" else more
        main(["fit", *small(tiny_llama, tmp_path, *words), f"--pmss.output_dir={tmp_path / name}"])
        found[name] = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
    key = next(key for key in found["plain"] if key.endswith(".U"))
    assert len({round(float(tensors[key].norm()), 6) for tensors in found.values()}) == 3


def test_fit_trains_u_and_writes_results(tiny_llama: str, tmp_path: Path) -> None:
    main(["fit", *small(tiny_llama, tmp_path)])
    run = tmp_path / "runs" / "quickstart" / "version_0"
    assert {"adapter", "merged", "loss.png", "config.yaml", "metrics.csv"} <= {path.name for path in run.iterdir()}
    trained = load_file(run / "adapter" / "adapter_model.safetensors")
    updates = [value for key, value in trained.items() if key.endswith(".U")]
    assert len(updates) == 14
    assert all(value.abs().max() > 0 for value in updates)
    # The written config alone starts the same run.
    assert yaml.safe_load((run / "config.yaml").read_text())["pmss"]["rank"] == 8

    checkpoint = run / "checkpoints" / "last.ckpt"
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert len([key for key in saved if "core" in key]) == 14
    assert not [key for key in saved if "embed_tokens" in key or key.endswith("proj.weight")]
    main(["test", *small(tiny_llama, tmp_path), f"--ckpt_path={checkpoint}"])
    rows = (tmp_path / "runs" / "quickstart" / "version_1" / "predictions-test.jsonl").read_text().splitlines()
    assert len(rows) == 8
    assert {"id", "prompt", "output", "extracted", "gold", "score"} <= set(json.loads(rows[0]))

    output = tmp_path / "by-command"
    merge = ["merge", "--base", tiny_llama, "--adapter", str(run / "adapter"), "--output", str(output)]
    main(merge)
    one, other = load_file(output / "model.safetensors"), load_file(run / "merged" / "model.safetensors")
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-5, atol=1e-6)
    with pytest.raises(SystemExit) as stop:
        main(merge)
    assert stop.value.code == 2
    main([*merge, "--overwrite", "--dtype", "bfloat16"])
    assert load_file(output / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_another_method_in_the_place_of_pmss(tiny_llama: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from lightning_pmss.files import read_adapter

    more = [
        "--adapter",
        "LoRAConfig",
        "--adapter.rank=4",
        "--adapter.alpha=8",
        "--pmss.target_modules=[q_proj, v_proj]",
    ]
    with caplog.at_level("INFO"):
        main(["fit", *small(tiny_llama, tmp_path, *more)])
    assert "LoRA takes the place of PMSS: --pmss.rank are not used." in caplog.text
    run = tmp_path / "runs" / "quickstart" / "version_0"
    adapter = read_adapter(run / "adapter")
    assert (adapter.options.method, adapter.options.rank) == ("lora", 4)
    assert sorted({name.rpartition(".")[2] for name in adapter.modules}) == ["q_proj", "v_proj"]
    assert all(bool(module.update.B.any()) for module in adapter.modules.values())  # type: ignore[attr-defined]
    assert (run / "merged" / "model.safetensors").exists()
    again = small(tiny_llama, tmp_path, *more)
    main(["test", *again, f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"])
    main(["test", *small(tiny_llama, tmp_path, *more, "--adapter.target_modules=[q_proj, v_proj]")])
    main(["inspect", str(run / "adapter"), "--base", tiny_llama])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pmss.rank", "0"], "rank=0 is not a rank"),
        (["--model.warmup_ratio", "1.5"], "warmup_ratio=1.5"),
        (["--pmss.rnak", "3"], "unrecognized arguments: --pmss.rnak"),
        (["--model.optimizer.lr", "fast"], "lr"),
    ],
)
def test_bad_options_end_with_a_message(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", QUICKSTART, *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_tool_refusals_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for error in (ValueError("no such dtype"), FileNotFoundError("no such folder"), FileExistsError("it exists")):

        def refuse(args: object, error: Exception = error) -> None:
            raise error

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(TOOLS, "refusing", (refuse, "refuses"))
            with pytest.raises(SystemExit) as stop:
                main(["refusing"])
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"{tools.PROGRAM} refusing: error: {error}\n"


def test_merge_names_the_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    with pytest.raises(SystemExit) as stop:
        main(["merge", "--base", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "out")])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert str(adapter) in message
    assert message.count("\n") == 1


def test_a_tools_crash_is_not_hidden() -> None:
    def crash(args: object) -> None:
        raise KeyError("a mistake of ours")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TOOLS, "crashing", (crash, "crashes"))
        with pytest.raises(KeyError):
            main(["crashing"])


def program(*args: str) -> subprocess.CompletedProcess[str]:
    return forks.run(["-m", "lightning_pmss", *args])


def test_program_shows_all_commands() -> None:
    result = program("--help")
    assert result.returncode == 0, result.stderr
    for command in ("fit", "validate", "test", "predict", *TOOLS):
        assert command in result.stdout


def test_program_merge_refuses_with_code_two(tmp_path: Path) -> None:
    result = program("merge", "--base", "x", "--adapter", str(tmp_path / "none"), "--output", str(tmp_path / "out"))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "error:" in result.stderr


def test_a_checkpoint_that_cannot_be_used_is_one_line(
    tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the model is loaded; LightningCLI reads the file itself, and left a traceback."""
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "folder.ckpt").mkdir()
    torch.save({"state_dict": {"a": torch.ones(1)}, "epoch": 0}, tmp_path / "other.ckpt")
    for name, message in (
        ("none.ckpt", "none.ckpt does not exist"),
        ("cut.ckpt", "cut.ckpt cannot be read: truncated, damaged, or no checkpoint"),
        ("folder.ckpt", "folder.ckpt was made without PMSSCallback (it has no pmss.json)"),
        ("other.ckpt", "other.ckpt contains no PMSS adapter"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["fit", *small(tiny_llama, tmp_path), f"--ckpt_path={tmp_path / name}"])
        assert left.value.code == 2
        printed = capsys.readouterr().err
        assert message in printed.strip().splitlines()[-1]
        assert "Traceback" not in printed


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tools_help_imports_neither_torch_nor_lightning(tool: str) -> None:
    """Both take seconds."""
    code = (
        f"import sys; from lightning_pmss.cli import main\ntry: main(['{tool}', '--help'])\nexcept SystemExit: pass\n"
    )
    code += "print(sorted({'torch', 'lightning', 'transformers'} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.splitlines()[-1] == "[]"
    assert f"usage: python -m lightning_pmss {tool}" in said
