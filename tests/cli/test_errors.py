"""What is typed wrong ends in a few lines and exit code 2; bugs keep their traceback."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file

from lightning_pmss.cli import main
from tests import forks

REPOSITORY = Path(__file__).resolve().parents[2]
QUICKSTART = str(REPOSITORY / "configs" / "quickstart.yaml")
WRONG = "tests.cli.wrong_modules"

Said = Callable[..., str]


@pytest.fixture(autouse=True)
def _unchanged_environment() -> Iterator[None]:
    """A strategy that is refused has set variables by which another process would take itself for one of several."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Runs a command that must be refused; returns what it says."""

    def run(*args: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(list(args))
        assert stop.value.code == 2
        errors = capsys.readouterr().err
        assert "Traceback" not in errors
        block = errors[errors.index("tip: JSONARGPARSE_DEBUG=1 in front of the command shows the traceback") :]
        assert "\npython -m lightning_pmss" in block
        assert block.count("\n") <= 15
        return block

    return run


def recipe(model: str, folder: Path, *more: str) -> list[str]:
    """A run of one step on the quickstart's data."""
    options = [
        f"--model.model_name_or_path={model}",
        "--model.generate_in=[]",
        "--data.train_size=16",
        "--data.val_size=4",
        f"--data.cache_dir={folder / 'cache'}",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=1",
        "--trainer.val_check_interval=2",
        "--trainer.logger=false",
        "--trainer.callbacks=null",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={folder}",
        "--pmss.rank=4",
        "--pmss.merge_on_save=null",
    ]
    return ["--config", QUICKSTART, *options, *more]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "error: no command was given."),
        (
            ["fti"],
            "error: there is no command 'fti'; did you mean fit?\nThe commands are fit, validate, test, predict,",
        ),
        (["mergee"], "did you mean merge?"),
        (["fit"], "the following arguments are required: fit.model"),
        (["fit", "--config", "nope.yaml"], "File does not exist: "),
        (["fit", "--config", QUICKSTART, "--pmss.rnak=3"], "--pmss.rnak=3. Did you mean --pmss.rank?"),
        (["fit", "--config", QUICKSTART, "--pmss.rank=many"], "Got value: many"),
        (["fit", "--config", QUICKSTART, "--data=NoSuchData"], "NoSuchData"),
        (["fit", "--config", QUICKSTART, "--model=no.such.Module"], "No module named 'no'"),
        (["fit", "--config", QUICKSTART, "--model=torch.nn.Linear"], "subclass of LightningModule"),
        (["fit", "--config", QUICKSTART, "--model.warmup_ratio=2"], "fit: error: warmup_ratio=2.0 is a share"),
        (["fit", "--config", QUICKSTART, "--data.batch_size=0"], "fit: error: `ArithmeticDataModule(batch_size=0)`"),
        (["fit", "--config", QUICKSTART, "--trainer.logger=WandbLogger"], "'wandb>=0.12.10' not met"),
        (["fit", "--config", QUICKSTART, "--trainer.max_epochs=-5"], "`max_epochs` must be a non-negative integer"),
        (["fit", "--config", QUICKSTART, "--trainer.accelerator=cpu", "--trainer.devices=-3"], "should be an int > 0"),
        (["fit", "--config", QUICKSTART, "--trainer.accumulate_grad_batches=0"], "must be at least 1, a batch per"),
        (["fit", "--config", QUICKSTART, "--seed_everything=-4"], "-4 is not in bounds"),
        (["test", "--config", QUICKSTART, "--trainer.accelerator=quantum"], "test: error: You selected an invalid acc"),
    ],
)
def test_before_anything_is_loaded(said: Said, args: list[str], message: str) -> None:
    assert message in said(*args)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"model: [1, 2\ntrainer: {", "bad.yaml, line 2, column 8: expected ',' or ']'"),
        (b"model:\n\tclass_path: x", "bad.yaml, line 2, column 1: found character '\\t'"),
        (b"- 1\n- 2", "bad.yaml holds list `[1, 2]`; a configuration holds `key: value` lines with seed_everything, "),
        (b"hello", "bad.yaml holds str `hello`"),
        (b"", "bad.yaml is empty"),
        (b"\x80\x02", "bad.yaml is no text"),
        (b"modle: {}", "bad.yaml: 'modle' is not known at the top of a configuration; did you mean 'model'?"),
        (b"trainer: {max_epoch: 2}", "'trainer.max_epoch'. Did you mean --trainer.max_epochs?"),
    ],
)
def test_configuration_files(said: Said, tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "bad.yaml").write_bytes(text)
    assert message in said("fit", "--config", QUICKSTART, "--config", str(tmp_path / "bad.yaml"))
    assert message in said("fit", "--config", QUICKSTART, f"--config={tmp_path / 'bad.yaml'}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--pmss.target_modules=nope"],
            "fit: error: target_modules: 'nope' matches no module; closest names: o_proj.",
        ),
        (["--pmss.target_modules=q_proj,v_proj"], "for several names type [q_proj, v_proj]"),
        (["--pmss.also_train=nope"], "also_train: 'nope' matches no module"),
        (["--pmss.skeleton_file=nope.safetensors"], "skeleton_file='nope.safetensors' does not exist"),
        (["--model.optimizer.lr=-1"], "Invalid learning rate: -1.0 (ValueError of torch.optim.adam)"),
        (
            ["--model.optimizer=SAM", "--model.optimizer.rho=-1"],
            "SAM: rho=-1.0 must be a positive number, such as 0.05",
        ),
        (["--model.optimizer=BSAM", "--model.optimizer.lr=1"], "options: --model.optimizer.base_optimizer.lr"),
        (["--model.dtype=float31"], "dtype='float31' is not known"),
        (["--model.model_name_or_path=/nope"], "'/nope'"),
        (["--data.max_length=3"], "All 16 training examples are longer than max_length 3"),
        (["--data=GSM8KDataModule", "--data.path=/nope"], "There is no file '/nope'. Give --data.path"),
        (["--ckpt_path=nope.ckpt"], "nope.ckpt"),
        (["--ckpt_path=best"], '`.fit(ckpt_path="best")` is set'),
        (["--trainer.val_check_interval=500"], "must be less than or equal to the number of the training batches"),
        (["--trainer.strategy=deepspeed"], "The DeepSpeed strategy is only supported on CUDA GPUs"),
    ],
)
def test_in_a_run(tiny_llama: str, tmp_path: Path, said: Said, options: list[str], message: str) -> None:
    assert message in said("fit", *recipe(tiny_llama, tmp_path, *options))


def test_a_lone_name_is_taken(tiny_llama: str, tmp_path: Path) -> None:
    options = ["--pmss.target_modules", "q_proj", "--pmss.exclude_modules", "layers.1", f"--pmss.output_dir={tmp_path}"]
    main(["fit", *recipe(tiny_llama, tmp_path, *options)])
    updates = [key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if key.endswith(".U")]
    assert updates == ["model.layers.0.self_attn.q_proj.U"]


def boring(name: str, folder: Path, *more: str) -> list[str]:
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", f"--trainer.default_root_dir={folder}"]
    return ["fit", f"--model={WRONG}.{name}", *quiet, "--trainer.max_steps=1", "--pmss.rank=2", *more]


def test_what_a_module_of_yours_refuses_is_no_crash(said: Said, tmp_path: Path) -> None:
    assert f"this module wants another folder (ValueError of {WRONG})" in said(*boring("Refusing", tmp_path))


@pytest.mark.parametrize(("name", "kind"), [("Unpacking", ValueError), ("Stepping", ValueError), ("Missing", KeyError)])
def test_bugs_keep_their_traceback(name: str, kind: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(kind):
        main(boring(name, tmp_path, "--pmss.target_modules=layer"))


@pytest.mark.parametrize("value", ["1", "true"])
def test_the_switch_shows_all_tracebacks(monkeypatch: pytest.MonkeyPatch, value: str, tmp_path: Path) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEBUG", value)
    with pytest.raises(ValueError, match="this module wants another folder"):
        main(boring("Refusing", tmp_path))
    with pytest.raises(Exception, match="rnak"):
        main(boring("Refusing", tmp_path, "--pmss.rnak=3"))
    with pytest.raises(MisconfigurationException):
        main(boring("Refusing", tmp_path, "--trainer.max_epochs=-5"))
    with pytest.raises(OSError, match="nowhere"):
        main(["inspect", "nowhere"])


@pytest.mark.slow
def test_the_program_ends_with_code_two(tiny_llama: str, tmp_path: Path) -> None:
    done = forks.run(["-m", "lightning_pmss", "fit", *recipe(tiny_llama, tmp_path, "--pmss.target_modules=nope")])
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "fit: error: target_modules: 'nope' matches no module; closest names: o_proj." in done.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_on_two_processes_rank_0_is_read(tiny_llama: str, tmp_path: Path) -> None:
    options = recipe(
        tiny_llama, tmp_path, "--pmss.target_modules=nope", "--trainer.devices=2", "--trainer.strategy=ddp"
    )
    done = forks.run(["-m", "lightning_pmss", "fit", *options])
    assert done.returncode != 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "lightning_pmss fit: error: target_modules: 'nope' matches no module; closest names: o_proj." in done.stderr


# -- what a configuration may name ----------------------------------------------------------------------------------------


def test_the_mark_of_a_call_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tests.cli import wrong_modules

    monkeypatch.chdir(tmp_path)
    wrong_modules.Trap()
    assert (tmp_path / "called").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"class_path": "os.system", "init_args": {"command": "touch called"}},
            "'os' entry of the import path denylist",
        ),
        ("os.system", "'os' entry of the import path denylist"),
        ({"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "called"]}}, "denylist"),
        ({"class_path": f"{WRONG}.trap"}, f"optimizer of Derived: {WRONG}.trap is no subclass of torch.optim."),
        (
            {"class_path": f"{WRONG}.annotated", "init_args": {"params": []}},
            f"{WRONG}.annotated is no subclass of torch.optim.optimizer.Optimizer",
        ),
        (
            f"{WRONG}.annotated",
            f"{WRONG}.annotated is no subclass of torch.optim.optimizer.Optimizer, and was not called",
        ),
        ({"class_path": f"{WRONG}.Trap"}, "to be a subclass of"),
        ({"class_path": "torch.load", "init_args": {"f": "called"}}, "torch.serialization.load is no subclass of"),
        (
            {"class_path": f"{WRONG}.Holding", "init_args": {"inner": {"class_path": f"{WRONG}.Trap"}}},
            f"optimizer of Derived: {WRONG}.Trap is no subclass of",
        ),
    ],
)
def test_an_optimizer_is_a_subclass(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: object, message: str
) -> None:
    config = {"model": {"class_path": f"{WRONG}.Derived", "init_args": {"model_name_or_path": "m", "optimizer": value}}}
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config | {"data": {"class_path": "ArithmeticDataModule"}}))
    monkeypatch.chdir(tmp_path)
    assert message in said("fit", "--config", str(file))
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    "option",
    [
        f"--model.metric={WRONG}.Trap",
        f"--trainer.callbacks=[{WRONG}.Trap]",
        f"--trainer.logger={WRONG}.Trap",
        f"--data={WRONG}.Trap",
        f"--model={WRONG}.trap",
        '--trainer.strategy={"class_path": "FSDPStrategy", "init_args": {"auto_wrap_policy": {"class_path": '
        f'"lightning_pmss.PMSSWrapPolicy", "init_args": {{"policy": {{"class_path": "{WRONG}.Trap"}}}}}}}}}}',
    ],
)
def test_other_classes_are_what_their_arguments_take(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"{WRONG}.trap".lower() in said("fit", "--config", QUICKSTART, option).lower()
    assert not (tmp_path / "called").exists()


def test_a_checkpoint_names_no_other_optimizer(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LightningCLI takes hyper-parameters of a checkpoint for options."""
    monkeypatch.chdir(tmp_path)
    optimizer = {"class_path": f"{WRONG}.trap"}
    torch.save({"state_dict": {}, "hyper_parameters": {"optimizer": optimizer}}, tmp_path / "their.ckpt")
    with pytest.raises(SystemExit) as stop:
        main(["fit", *recipe(tiny_llama, tmp_path, f"--ckpt_path={tmp_path / 'their.ckpt'}")])
    assert stop.value.code == 2
    assert not (tmp_path / "called").exists()
