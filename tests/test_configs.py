"""Every recipe in configs/ parses, alone and with every overlay, says how it is launched, and names existing options."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_pmss.cli import PMSSCLI, main
from lightning_pmss.cli.estimate import CONVERSION, add_arguments
from lightning_pmss.methods.pmss.config import PMSSConfig

FOLDER = Path(__file__).resolve().parents[1] / "configs"
OVERLAYS = sorted((FOLDER / "strategy").glob("*.yaml"))
MUON = FOLDER / "optimizer" / "muon.yaml"
METHODS = sorted((FOLDER / "method").glob("*.yaml"))
TRAINING = [FOLDER / "training" / "flat_lora.yaml"]
SHARPNESS = [FOLDER / "training" / "sam.yaml", FOLDER / "training" / "bsam.yaml"]
SPACES = sorted((FOLDER / "tune").glob("*.yaml"))  # of searches
CONFIGS = sorted(set(FOLDER.rglob("*.yaml")) - {*OVERLAYS, *METHODS, *TRAINING, *SHARPNESS, *SPACES, MUON})
SMALL = sorted((FOLDER / "smollm2").glob("*.yaml"))  # on one CPU core; these are run
RECIPES = [path for path in CONFIGS if path.parent != FOLDER and path not in SMALL]


def _name(path: Path) -> str:
    return str(path.relative_to(FOLDER))


def test_there_are_recipes() -> None:
    assert FOLDER / "quickstart.yaml" in CONFIGS
    assert {path.stem for path in SMALL} == {"arc_easy", "chat", "gsm8k", "drop"}
    models = ("llama2_7b", "llama2_13b", "mistral_7b", "gemma_7b", "llama32_3b")
    assert {_name(path) for path in RECIPES} == {
        f"{task}/{model}.yaml" for task in ("gsm8k", "drop", "commonsense") for model in models
    } | {"gsm8k/llama2_13b_nf4.yaml"}
    assert {path.stem for path in OVERLAYS} == {"ddp", "fsdp", "fsdp2", "zero2", "zero3", "zero3_offload"}


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize("path", CONFIGS, ids=_name)
def test_recipe_parses(path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--config", str(path), "--print_config"])
    assert stop.value.code in (0, None), capsys.readouterr().err
    printed = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert printed["pmss"]["rank"] == written["pmss"]["rank"]
    assert printed["model"]["class_path"] == written["model"]["class_path"]


@pytest.mark.parametrize("path", [*CONFIGS, *OVERLAYS], ids=_name)
def test_first_lines_say_how_to_launch_on_what_and_what_it_took(path: Path) -> None:
    head = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        head.append(line)
    text = "\n".join(head)
    for word in ("# Launch:", "# Hardware:", "# Took:"):
        assert word in text
    assert path.name in text
    if path in RECIPES or path in OVERLAYS:
        assert "torchrun --nnodes" in text
        assert "srun --nodes" in text
        assert "not run here" in text
        assert f"configs/{_name(path)}" in text


@pytest.fixture(scope="module")
def parser() -> Any:
    """The command line's parser of ``fit``, made once: making it takes longer than parsing."""

    class Parsers(PMSSCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise _MadeError(self._subcommand_parsers["fit"])

    with pytest.raises(_MadeError) as made:
        Parsers(args=["fit"])
    return made.value.args[0]


class _MadeError(Exception):
    """Carries the parser out of the constructor, which would go on to parse and to run."""


STRATEGIES = {
    "ddp": "DDPStrategy",
    "fsdp": "FSDPStrategy",
    "fsdp2": "ModelParallelStrategy",
    "zero2": "DeepSpeedStrategy",
    "zero3": "DeepSpeedStrategy",
    "zero3_offload": "DeepSpeedStrategy",
}


def check_within(expected: Any, found: Any) -> None:
    """Whether a parsed configuration has what a file says."""
    if not isinstance(expected, dict):
        assert found == expected
        return
    for name, value in expected.items():
        if name == "class_path":
            assert found[name].rpartition(".")[2] == value.rpartition(".")[2]
        else:
            check_within(value, found[name])


def check_model_kept(recipe: Path, both: Any) -> None:
    """Whether the numbers of a recipe's model are there behind an overlay."""
    alone = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    for name, value in alone["model"]["init_args"].items():
        if not isinstance(value, (dict, str)):
            assert both.model.init_args[name] == value, name


@pytest.mark.parametrize("method", METHODS, ids=_name)
@pytest.mark.parametrize("recipe", CONFIGS, ids=_name)
def test_methods_behind_recipes_and_strategies(recipe: Path, method: Path, parser: Any) -> None:
    files = [recipe, method, FOLDER / "strategy" / "fsdp2.yaml"]
    both = parser.parse_args([part for file in files for part in ("--config", str(file))])
    alone = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert both.pmss.target_modules == alone["pmss"]["target_modules"]
    check_within(yaml.safe_load(method.read_text(encoding="utf-8")), both)


@pytest.mark.parametrize("overlay", TRAINING, ids=_name)
@pytest.mark.parametrize("recipe", CONFIGS, ids=_name)
def test_callbacks_of_an_overlay_stand_behind_those_of_the_recipe(recipe: Path, overlay: Path, parser: Any) -> None:
    files = [recipe, overlay, FOLDER / "strategy" / "fsdp2.yaml"]
    both = parser.parse_args([part for file in files for part in ("--config", str(file))])
    *own, last = [callback.class_path for callback in both.trainer.callbacks]
    alone = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert own == [callback["class_path"] for callback in alone["trainer"]["callbacks"]]
    (added,) = yaml.safe_load(overlay.read_text(encoding="utf-8"))["trainer"]["callbacks+"]
    assert last == added["class_path"]
    check_within(added["init_args"], both.trainer.callbacks[-1].init_args)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=_name)
@pytest.mark.parametrize("recipe", CONFIGS, ids=_name)
def test_every_pair(recipe: Path, overlay: Path, parser: Any) -> None:
    both = parser.parse_args(["--config", str(recipe), "--config", str(overlay)])
    alone = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    # The recipe survives ...
    assert both.pmss.rank == alone["pmss"]["rank"]
    assert both.pmss.target_modules == alone["pmss"]["target_modules"]
    for part in ("model", "data"):
        assert both[part].class_path == alone[part]["class_path"]
        for name, value in alone[part]["init_args"].items():
            if not isinstance(value, (dict, str)):
                assert both[part].init_args[name] == value, name
    assert both.data.init_args.tokenizer == alone["model"]["init_args"]["model_name_or_path"]
    assert both.model.init_args.optimizer.init_args.lr == alone["model"]["init_args"]["optimizer"]["init_args"]["lr"]
    for name in ("precision", "max_epochs", "accumulate_grad_batches", "gradient_clip_val"):
        assert both.trainer[name] == alone["trainer"].get(name, both.trainer[name])
    assert len(both.trainer.callbacks) == len(alone["trainer"]["callbacks"])
    assert both.trainer.logger.class_path.endswith("CSVLogger")
    # ... and so does the overlay.
    strategy = both.trainer.strategy
    assert strategy.class_path == f"lightning.pytorch.strategies.{STRATEGIES[overlay.stem]}"
    assert (both.trainer.devices, both.trainer.num_nodes) == (8, 1)
    init = strategy.get("init_args", {})
    if overlay.stem == "fsdp":
        assert init.auto_wrap_policy.class_path == "lightning_pmss.PMSSWrapPolicy"
    elif overlay.stem == "fsdp2":
        assert (init.data_parallel_size, init.tensor_parallel_size) == (8, 1)
        assert both.trainer.inference_mode is False
    elif overlay.stem.startswith("zero"):
        assert init.exclude_frozen_parameters is True
        assert init.config["zero_optimization"]["stage"] == int(overlay.stem[4])
        assert ("offload_param" in init.config["zero_optimization"]) == overlay.stem.endswith("offload")


@pytest.mark.parametrize("recipe", CONFIGS, ids=_name)
def test_every_recipe_with_muon(recipe: Path, parser: Any) -> None:
    overlay = FOLDER / "strategy" / "fsdp2.yaml"
    given = ["--config", str(recipe), "--config", str(MUON), "--config", str(overlay)]
    both = parser.parse_args(given)
    check_model_kept(recipe, both)
    made = both.model.init_args.optimizer
    assert (made.class_path, made.init_args.lr, made.init_args.weight_decay) == ("torch.optim.Muon", 1.5e-2, 0.0)
    assert made.init_args.adjust_lr_fn == "match_rms_adamw"
    assert str(MUON.relative_to(FOLDER.parent)) in MUON.read_text(encoding="utf-8")


@pytest.mark.parametrize("overlay", SHARPNESS, ids=_name)
@pytest.mark.parametrize("recipe", CONFIGS, ids=_name)
def test_every_recipe_with_several_passes(recipe: Path, overlay: Path, parser: Any) -> None:
    files = [recipe, overlay, FOLDER / "strategy" / "fsdp2.yaml"]
    both = parser.parse_args([part for file in files for part in ("--config", str(file))])
    check_model_kept(recipe, both)
    check_within(yaml.safe_load(overlay.read_text(encoding="utf-8")), both)
    assert str(overlay.relative_to(FOLDER.parent)) in overlay.read_text(encoding="utf-8")


def test_the_lines_for_several_nodes_parse(parser: Any) -> None:
    overlay = FOLDER / "strategy" / "fsdp2.yaml"
    given = ["--config", str(FOLDER / "gsm8k" / "llama2_13b.yaml"), "--config", str(overlay)]
    more = ["--trainer.num_nodes", "2", "--trainer.accumulate_grad_batches", "2"]
    both = parser.parse_args([*given, *more, "--trainer.strategy.data_parallel_size", "16"])
    assert both.trainer.strategy.init_args.data_parallel_size == 16
    assert both.trainer.strategy.init_args.tensor_parallel_size == 1
    assert (both.trainer.num_nodes, both.trainer.accumulate_grad_batches) == (2, 2)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=_name)
def test_strategies_can_be_made(overlay: Path, parser: Any) -> None:
    if overlay.stem.startswith("zero"):
        pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    both = parser.parse_args(["--config", str(FOLDER / "quickstart.yaml"), "--config", str(overlay)])
    strategy = _make(both.trainer.strategy)
    if overlay.stem.startswith("zero"):
        zero = strategy.config["zero_optimization"]
        assert zero["stage"] == int(overlay.stem[4])
        assert strategy.exclude_frozen_parameters


def _make(spec: Any) -> Any:
    module, _, name = spec.class_path.rpartition(".")
    init = {key: value for key, value in (spec.get("init_args") or {}).items() if value is not None}
    if "auto_wrap_policy" in init:
        init["auto_wrap_policy"] = _make(init["auto_wrap_policy"])
    init = {key: value.as_dict() if hasattr(value, "as_dict") else value for key, value in init.items()}
    return getattr(importlib.import_module(module), name)(**init)


def test_metrics_and_data_of_recipes_can_be_made(parser: Any) -> None:
    for path in [*RECIPES, *SMALL]:
        spec = parser.parse_args(["--config", str(path)])
        data = _make(spec.data)
        if path.stem == "chat":  # conversations have no metric and no styles
            assert (spec.model.init_args.metric, type(data).__name__) == (None, "ChatDataModule")
            continue
        metric = _make(spec.model.init_args.metric)
        assert data.prompt_style in ("plain", *data.styles)
        # What separates spans is written twice; they must agree.
        assert getattr(metric, "separator", None) == getattr(data, "separator", None)


@pytest.mark.parametrize("path", RECIPES, ids=_name)
def test_the_line_for_the_estimate_parses_and_is_that_of_the_recipe(path: Path) -> None:
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    head = path.read_text(encoding="utf-8").replace("\\\n#", "")
    words = next(line for line in head.splitlines() if "lightning_pmss estimate" in line).split()
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = parser.parse_args(words[words.index("estimate") + 1 :])
    conversion = PMSSConfig(**CONVERSION.take(vars(given)))
    assert conversion.rank == recipe["pmss"]["rank"]
    assert conversion.target_modules == recipe["pmss"]["target_modules"]
    assert given.micro_batch == recipe["data"]["init_args"]["batch_size"]
    assert given.sequence_length == recipe["data"]["init_args"]["max_length"]
