"""``load_from_checkpoint`` gives the module that was trained, of ours and of anyone, for inference and to go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

from lightning_pmss import PMSSCallback
from lightning_pmss.conversion.convert import adapted_layers, conversion_of
from lightning_pmss.datamodules import ArithmeticDataModule
from lightning_pmss.modules import CausalLMModule
from tests.callbacks.toys import LateToy, Toy, inputs, make_net, plain_loader, trainer
from tests.compatibility import run

FORMAT_1 = Path(__file__).parent.parent / "compatibility" / "format1" / "checkpoint.ckpt"


class Sized(Toy):
    """With hyper-parameters, saved in Lightning's way."""

    def __init__(self, factor: float, name: str = "none") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.factor, self.name = factor, name


class Compiled(Toy):
    """Whose keys have ``_orig_mod`` in them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


class Boxed(Toy):
    """With all hyper-parameters in one argument."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.save_hyperparameters(options)


def _fit(folder: Path, module: L.LightningModule, data: Any = None, **options: Any) -> tuple[PMSSCallback, Path]:
    callback = PMSSCallback(**{"rank": 5, "output_dir": folder, "merge_on_save": None} | options)
    saver = ModelCheckpoint(folder / "saved", "last", save_top_k=1)
    trainer(folder, callback, saver, max_epochs=1).fit(module, data or plain_loader())
    return callback, folder / "saved" / "last.ckpt"


def _again(callback: PMSSCallback, folder: Path) -> PMSSCallback:
    return PMSSCallback(**callback.config.to_dict(), output_dir=folder, merge_on_save=None)


@pytest.mark.parametrize("kind", [Toy, LateToy, Compiled])
@pytest.mark.parametrize("strict", [None, False])
def test_a_module_of_anyone(tmp_path: Path, kind: type[Toy], strict: bool | None) -> None:
    module = kind()
    callback, ckpt = _fit(tmp_path, module, selection="random", seed=7, also_train=["2"], target_modules=["0"])
    again = kind.load_from_checkpoint(ckpt, strict=strict)
    x = inputs().tensors[0]
    assert torch.equal(again.net(x), module.net(x))
    assert (make_net()(x) - module.net(x)).abs().max() > 0.01  # it was trained
    assert conversion_of(again) == conversion_of(module)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in module.named_parameters() if p.requires_grad
    }
    runs = [trainer(tmp_path, _again(callback, tmp_path / name), max_steps=6) for name in ("one", "other")]
    runs[0].fit(module, plain_loader())
    runs[1].fit(again, plain_loader())
    assert again.losses == module.losses[-len(again.losses) :]


def test_hyper_parameters_stay_those_of_the_module(tmp_path: Path) -> None:
    _, ckpt = _fit(tmp_path, Sized(0.5, name="first"))
    again = Sized.load_from_checkpoint(ckpt, name="typed")
    assert (again.factor, again.name, len(adapted_layers(again))) == (0.5, "typed", 2)
    assert dict(again.hparams) == {"factor": 0.5, "name": "typed"}
    _, ckpt = _fit(tmp_path / "boxed", Boxed({"a": 1}))
    assert torch.load(ckpt)["hyper_parameters"] == {"a": 1}


def test_hyper_parameters_that_lightning_cli_has_saved(tmp_path: Path) -> None:
    """With the class path and the instantiator of LightningCLI: its arguments are parsed again."""
    cli = LightningCLI(
        Sized, seed_everything_default=0, save_config_callback=None, run=False, args=["--model.factor=0.5"]
    )
    _, ckpt = _fit(tmp_path, cli.model)
    assert (
        torch.load(ckpt)["hyper_parameters"]["_instantiator"]
        == "lightning_pmss.checkpoints.restoring.instantiate_by_cli"
    )
    again = Sized.load_from_checkpoint(ckpt)
    assert (again.factor, again.name, len(adapted_layers(again))) == (0.5, "none", 2)


def test_another_base_is_refused(tmp_path: Path) -> None:
    _, ckpt = _fit(tmp_path, Toy())

    class Other(Toy):
        def __init__(self) -> None:
            super().__init__()
            with torch.no_grad():
                self.net[0].weight.mul_(1.01)

    with pytest.raises(ValueError, match=r"belongs to another base model: the weights of `net\.0` are not those"):
        Other.load_from_checkpoint(ckpt)


def test_a_process_without_this_library_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.core import saving

    _, ckpt = _fit(tmp_path, Toy())
    monkeypatch.setattr(saving, "_ALLOWED_INSTANTIATORS", set())
    with pytest.raises(ValueError, match=r"lightning_pmss\.checkpoints\.restoring\.instantiate"):
        Toy.load_from_checkpoint(ckpt)


def test_causal_lm_needs_no_arguments_and_overrides_none(tiny_llama: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lr_schedule": "constant", "warmup_ratio": 0.0, "generate_in": []}
    module = CausalLMModule(tiny_llama, dtype="float32", stop=("\n",), **options)
    data = ArithmeticDataModule(tiny_llama, train_size=8, val_size=4, test_size=4, batch_size=4)
    callback, ckpt = _fit(tmp_path, module, data, also_train=["norm"])
    ids = torch.arange(1, 11).reshape(1, 10)
    expected = module.eval()(ids)
    again = CausalLMModule.load_from_checkpoint(ckpt)
    assert torch.equal(again.eval()(ids), expected)
    assert (again.model_name_or_path, again.lr_schedule, again.dtype_name) == (tiny_llama, "constant", "float32")
    assert again.answering.generation.stop == ("\n",)
    typed = CausalLMModule.load_from_checkpoint(ckpt, lr_schedule="linear", optimizer=torch.optim.SGD)
    assert (typed.lr_schedule, typed.optimizer) == ("linear", torch.optim.SGD)
    content = torch.load(ckpt)
    assert set(content["hyper_parameters"]) == {"_instantiator"}  # LightningCLI takes nothing from it
    fresh = trainer(tmp_path, _again(callback, tmp_path / "on"), max_steps=4)
    fresh.fit(again, data)
    assert fresh.global_step == 4


def test_format_1_and_a_trainer_without_the_callback(tiny_llama: str, tmp_path: Path) -> None:
    module = CausalLMModule(tiny_llama, dtype="float32", lr_schedule="constant", warmup_ratio=0.0, generate_in=[])
    data = ArithmeticDataModule(tiny_llama, train_size=8, val_size=4, test_size=4, batch_size=4)
    _, ckpt = _fit(tmp_path, module, data)
    message = r"for which this module has no place: .*PMSSCallback with the options of the run.*extract"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, None).test(CausalLMModule(tiny_llama, dtype="float32"), data, ckpt_path=ckpt)
    content = torch.load(ckpt)
    old = {"format_version": 1, "config": content["pmss"]["config"]}
    old["fingerprints"] = {name: layer["fingerprint"] for name, layer in content["pmss"]["modules"].items()}
    del content["hyper_parameters"], content["made_with"]
    torch.save(content | {"pmss": old}, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match="does not say what its module was made with; give model_name_or_path="):
        CausalLMModule.load_from_checkpoint(tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match=message):
        CausalLMModule.load_from_checkpoint(tmp_path / "old.ckpt", model_name_or_path=tiny_llama)
    with pytest.raises(RuntimeError, match="core.weight"):
        run.Module.load_from_checkpoint(FORMAT_1)
