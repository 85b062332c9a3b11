"""What else averages walk over (constants, index tables), and averages that come as state dicts, casts or too late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LambdaCallback, WeightAveraging
from torch import Tensor

from lightning_pmss import PMSSCallback, load_adapter
from lightning_pmss.conversion.convert import adapted_layers
from tests.callbacks.toys import Toy, plain_loader, trainer


def run(folder: Path, module: Toy, *more: L.Callback, first: bool = False) -> Toy:
    callback = PMSSCallback(rank=6, output_dir=folder / "out")
    trainer(folder, None, *([*more, callback] if first else [callback, *more])).fit(module, plain_loader())
    return module


class Constants(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(64).roll(7))
        self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
        self.register_buffer("grid", torch.linspace(0.1, 0.9, 100), persistent=False)
        self.register_buffer("moving", torch.zeros(1))

    def loss(self, batch: Any) -> Tensor:
        self.moving.add_(1)  # type: ignore[operator]
        return super().loss(batch)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("averager", [lambda: EMAWeightAveraging(decay=0.9), lambda: WeightAveraging(use_buffers=True)])
def test_constants_stay_bit_for_bit_and_statistics_are_averaged(tmp_path: Path, averager: Any, first: bool) -> None:
    module, reference = run(tmp_path, Constants(), averager(), first=first), Constants()
    for name in ("table", "mask", "grid"):
        assert torch.equal(getattr(module, name), getattr(reference, name))
    assert 1 < module.moving.item() < 18  # type: ignore[operator]


class StateAverage(L.Callback):
    """Of all floating tensors of the state dict, loaded at the end."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.mean = {k: v.clone() for k, v in pl_module.state_dict().items()}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        for key, value in pl_module.state_dict().items():
            if value.is_floating_point():
                self.mean[key] = 0.9 * self.mean[key] + 0.1 * value

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.load_state_dict(self.mean)


def test_the_adapter_of_a_loaded_average_belongs_to_the_base_as_it_was(tmp_path: Path) -> None:
    average = StateAverage()
    with pytest.warns(UserWarning, match="frozen weights of .* were changed during the training"):
        run(tmp_path, Toy(), average)
    fresh = Toy()
    load_adapter(fresh, tmp_path / "out" / "adapter")
    for name, layer in adapted_layers(fresh).items():
        torch.testing.assert_close(layer.core.weight, average.mean[f"{name}.core.weight"], rtol=1e-4, atol=1e-6)


def test_moved_indices_are_an_error(tmp_path: Path) -> None:
    def move(trainer: L.Trainer, module: Any) -> None:
        module.net[0].rows.copy_(torch.tensor([i for i in range(32) if i not in module.net[0].rows.tolist()][:6]))

    with pytest.raises(RuntimeError, match=r"frozen weights of `net\.0` were changed"):
        run(tmp_path, Toy(), LambdaCallback(on_train_end=move))


def test_a_cast_at_the_end_is_no_change(tmp_path: Path) -> None:
    run(tmp_path, Toy(), LambdaCallback(on_train_end=lambda trainer, module: module.bfloat16()))
    assert (tmp_path / "out" / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end"])
def test_a_change_behind_the_results_is_said(tmp_path: Path, hook: str, recwarn: pytest.WarningsRecorder) -> None:
    halve = LambdaCallback(**{hook: lambda trainer, module: module.net[0].core.weight.data.mul_(0.5)})
    module, fresh = run(tmp_path, Toy(), halve), Toy()
    late = [str(w.message) for w in recwarn if "after the results of this fit were written" in str(w.message)]
    assert len(late) == (hook == "on_fit_end")
    assert all("`net.0.core.weight` were changed" in text and "save_adapter" in text for text in late)
    load_adapter(fresh, tmp_path / "out" / "adapter")
    factor = 2 if late else 1
    torch.testing.assert_close(fresh.net[0].core.weight, factor * module.net[0].core.weight, rtol=1e-4, atol=1e-6)
