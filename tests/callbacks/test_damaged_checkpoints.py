"""A checkpoint that Lightning would believe: what a resumed fit takes besides the weights is looked at before any of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_pmss import PMSSCallback
from lightning_pmss.callbacks.nonfinite import NonFiniteError
from lightning_pmss.checkpoints.extract import extract_files, merge_checkpoint
from lightning_pmss.modules.reloading import Reloading
from tests.callbacks.toys import Numbers, Toy, make_net, plain_loader, trainer


def _callback(folder: Path) -> PMSSCallback:
    return PMSSCallback(target_modules=["0"], rank=5, also_train=["2"], output_dir=folder, merge_on_save=None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer(folder, _callback(folder), saver, max_steps=2).fit(Toy(), Numbers())
    return folder / "step=2.ckpt"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    file = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(make_net().state_dict(), file)
    return file


def _moments(content: dict[str, Any]) -> list[dict[str, Any]]:
    return list(content["optimizer_states"][0]["state"].values())


def _group(content: dict[str, Any]) -> dict[str, Any]:
    group: dict[str, Any] = content["optimizer_states"][0]["param_groups"][0]
    return group


RESUMED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no optimizers": (lambda c: c.pop("optimizer_states"), "has no `optimizer_states`, so a run cannot resume"),
    "no schedulers": (lambda c: c.pop("lr_schedulers"), "has no `lr_schedulers`, so a run cannot resume"),
    "number": (lambda c: c.update(optimizer_states=[5]), "`optimizer_states.0` is no state"),
    "scheduler": (lambda c: c.update(lr_schedulers=[5]), "`lr_schedulers.0` is no state"),
    "nan": (lambda c: _moments(c)[0]["exp_avg"].fill_(float("nan")), r"NaN or infinite values in `optimizer_states\.0\.state"),
    "rate": (lambda c: _group(c).update(lr=float("inf")), r"NaN or infinite .*`optimizer_states\.0\.param_groups\.0\.lr`"),
    "none": (lambda c: c.update(optimizer_states=[]), "has the states of 0 optimizers, this run has 1"),
    "two": (lambda c: c["optimizer_states"].append(c["optimizer_states"][0]), "has the states of 2 optimizers, this run has 1"),
    "empty": (lambda c: c.update(optimizer_states=[{}]), "the state of its optimizers does not fit this run's"),
    "groups": (lambda c: c["optimizer_states"][0].update(param_groups=[]), "different number of parameter groups"),
    "shape": (lambda c: _moments(c)[0].update(exp_avg=torch.ones(3)), r"exp_avg of parameter 0 is \[3\], not"),
    "gone": (lambda c: [m.pop("exp_avg_sq") for m in _moments(c)], "parameter 0 has no exp_avg_sq"),
    "text": (lambda c: _group(c).update(lr="x"), "lr='x' of a parameter group"),
    "betas": (lambda c: _group(c).pop("betas"), "betas=None of a parameter group"),
    "range": (lambda c: _group(c).update(betas=(1.5, 2.5)), "Invalid beta parameter at index 0: 1.5"),
    "no loops": (lambda c: c.pop("loops"), "it has no `loops.fit_loop`"),
    "no loop": (lambda c: c["loops"].pop("fit_loop"), "it has no `loops.fit_loop`"),
    "loop": (lambda c: c["loops"].update(fit_loop="x"), "`loops.fit_loop` is not what Lightning writes"),
    "progress": (
        lambda c: c["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"].update(ready="x"),
        r"`loops\.fit_loop\.epoch_loop\.batch_progress\.current\.ready` is not",
    ),
    "negative": (
        lambda c: c["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"].update(completed=-3),
        r"`loops\.fit_loop\.epoch_loop\.batch_progress\.total\.completed` is not",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RESUMED)
def test_a_fit_that_would_go_on_from_it(checkpoint: Path, tmp_path: Path, case: str) -> None:
    change, message = RESUMED[case]
    content = torch.load(checkpoint)
    change(content)
    torch.save(content, bad := tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=f"the checkpoint {bad}.*{message}"):
        trainer(tmp_path, _callback(tmp_path), max_steps=3).fit(Toy(), Numbers(), ckpt_path=bad)
    assert not (tmp_path / "adapter").exists()


def test_one_without_optimizers_still_gives_its_adapter(checkpoint: Path, base: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint)
    del content["optimizer_states"], content["lr_schedulers"]
    torch.save(content, tmp_path / "weights.ckpt")
    extract_files(tmp_path / "weights.ckpt", base, tmp_path / "adapter", progress=False)
    assert (tmp_path / "adapter").is_dir()
    trainer(tmp_path, _callback(tmp_path)).test(Toy(), plain_loader(), ckpt_path=tmp_path / "weights.ckpt")


V, HEAD = "net.0.core.weight", "net.2.weight"
ANYWHERE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "sparse": (lambda c: c["state_dict"].update({V: c["state_dict"][V].to_sparse()}), "`state_dict` has another form"),
    "meta": (lambda c: c["state_dict"].update({HEAD: c["state_dict"][HEAD].to("meta")}), "`state_dict` has another form"),
    "twice": (lambda c: c["state_dict"].update({f"_orig_mod.{V}": torch.ones(5, 5)}), f"it has two values for `{V}`"),
    "complex": (lambda c: c["state_dict"].update({HEAD: c["state_dict"][HEAD].to(torch.complex64)}), "complex64, and the"),
    "whole": (lambda c: c["state_dict"].update({HEAD: c["state_dict"][HEAD].long()}), "int64, and the model's is"),
    "logical": (lambda c: c["state_dict"].update({HEAD: c["state_dict"][HEAD].bool()}), "bool, and the model's is"),
    "nan": (lambda c: c["state_dict"].update({HEAD: torch.full((16, 32), float("nan"))}), "NaN or infinite"),
    "too large": (
        lambda c: c["state_dict"].update({HEAD: torch.full((16, 32), 1e300, dtype=torch.float64)}),
        "is torch.float64 and too large for torch.float32, the model's",
    ),
    "old": (lambda c: c.update({"pytorch-lightning_version": "0.1.0"}), "`pytorch-lightning_version` has another form"),
    "no version": (lambda c: c.pop("pytorch-lightning_version"), "`pytorch-lightning_version` has another form"),
    "epoch": (lambda c: c.update(epoch=-1), "`epoch` has another form"),
}  # fmt: skip


class Reloaded(Toy, Reloading):
    """A toy of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.keep_arguments({})


@pytest.mark.parametrize("case", ANYWHERE)
def test_whatever_reads_it(checkpoint: Path, base: Path, tmp_path: Path, case: str) -> None:
    change, message = ANYWHERE[case]
    content = torch.load(checkpoint)
    change(content)
    torch.save(content, bad := tmp_path / "bad.ckpt")
    output = tmp_path / "output"
    acts: list[Callable[[], Any]] = [
        lambda: extract_files(bad, base, output, progress=False),
        lambda: merge_checkpoint(bad, base, output, progress=False),
        lambda: Reloaded.load_from_checkpoint(bad),
        lambda: trainer(tmp_path, _callback(tmp_path), max_steps=3).fit(Toy(), Numbers(), ckpt_path=bad),
        lambda: trainer(tmp_path, _callback(tmp_path)).test(Toy(), plain_loader(), ckpt_path=bad),
    ]
    for act in acts:
        with pytest.raises(ValueError, match=message):
            act()
    assert not output.exists()


def test_values_that_nothing_can_be_trained_from(checkpoint: Path, tmp_path: Path) -> None:
    """They are finite, so they are loaded; the first step names what they give."""
    content = torch.load(checkpoint)
    content["state_dict"][HEAD].fill_(1e30)
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(
        (NonFiniteError, L.fabric.utilities.exceptions.MisconfigurationException), match="NaN or infinite"
    ):  # type: ignore[attr-defined]
        trainer(tmp_path, _callback(tmp_path), max_steps=3).fit(Toy(), Numbers(), ckpt_path=tmp_path / "bad.ckpt")


class Other(L.LightningModule):
    """Nothing of it is in the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Linear(3, 3)


def test_load_from_checkpoint_of_another_class_and_with_unknown_arguments(
    tiny_llama: str, checkpoint: Path, tmp_path: Path
) -> None:
    from tests.files.test_extract import Wrapped, _ids

    trainer(
        tmp_path, PMSSCallback(rank=4, output_dir=tmp_path, merge_on_save=None),
        ModelCheckpoint(tmp_path, "last", every_n_train_steps=1), max_steps=1,
    ).fit(Wrapped(tiny_llama), _ids())  # fmt: skip
    with pytest.raises(ValueError, match="which this Other does not have: it belongs to another module"):
        Other.load_from_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="Reloaded has no argument `widht`"):
        Reloaded.load_from_checkpoint(checkpoint, widht=3)
