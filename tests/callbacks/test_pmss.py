"""When the callback converts, what it checks, what checkpoints hold, and what it writes."""

from __future__ import annotations

import pickle
import types
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_pmss import PMSSCallback, PMSSConfig, PMSSLinear, convert, load_adapter, merge
from lightning_pmss.conversion.convert import adapted_layers
from tests.callbacks.toys import LateToy, Toy, make_net, plain_loader, trainer


def callback(folder: Path, **options: Any) -> PMSSCallback:
    return PMSSCallback(**{"rank": 4, "output_dir": folder / "out"} | options)


@pytest.mark.parametrize("module_class", [Toy, LateToy])
def test_converts_trains_only_u_and_learns(tmp_path: Path, module_class: type[Toy]) -> None:
    module = module_class()
    runner = trainer(tmp_path, callback(tmp_path, rank=12), max_epochs=30)
    runner.fit(module, plain_loader(), plain_loader())
    assert all(isinstance(module.net[i], PMSSLinear) for i in (0, 2))
    fresh = make_net()
    assert torch.equal(module.net[0].weight, fresh[0].weight)  # the base is frozen
    assert torch.equal(module.net[2].bias, fresh[2].bias)
    assert module.losses[-1] < 0.8 * module.losses[0]


@pytest.mark.parametrize("module_class", [Toy, LateToy])
def test_several_trainer_calls_on_one_module(tmp_path: Path, module_class: type[Toy]) -> None:
    module = module_class()
    first = callback(tmp_path)
    trainer(tmp_path, first).validate(module, plain_loader(), verbose=False)
    layer = module.net[0]
    runner = trainer(tmp_path, first)
    runner.fit(module, plain_loader(), plain_loader())
    after = runner.validate(module, plain_loader(), verbose=False)
    other = trainer(tmp_path, callback(tmp_path))
    assert other.validate(module, plain_loader(), verbose=False) == after  # nothing was selected or reset again
    other.test(module, plain_loader(), verbose=False)
    other.predict(module, plain_loader())
    other.fit(module, plain_loader())
    assert module.net[0] is layer
    with pytest.raises(ValueError, match=r"already converted with another config \(differs in rank\)"):
        trainer(tmp_path, callback(tmp_path, rank=5)).validate(module, plain_loader(), verbose=False)


def test_module_stays_picklable_after_setup(tmp_path: Path) -> None:
    module = LateToy()
    trainer(tmp_path, callback(tmp_path), max_epochs=1).fit(module, plain_loader())
    assert "configure_model" not in module.__dict__
    module.trainer = None
    module.net[0].core.weight.data.normal_()
    again = pickle.loads(pickle.dumps(module.net))  # noqa: S301
    x = torch.randn(3, 16)
    assert torch.equal(again(x), module.net(x))


class BuiltInSetup(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def setup(self, stage: str) -> None:
        self.net = make_net()


def test_layers_built_too_late_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no linear layer was found in BuiltInSetup.*`configure_model`"):
        trainer(tmp_path, callback(tmp_path)).fit(BuiltInSetup(), plain_loader())


class EarlyOptimizer(Toy):
    """What LightningCLI does by default: the optimizer exists before the callback converts."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer


class Unfreezing(Toy):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.net[2].bias.requires_grad_(True)
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_optimizer_without_u_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"2 of 2 trainable.*`net\.0\.core\.weight`.*auto_configure_optimizers"
    ):
        trainer(tmp_path, callback(tmp_path)).fit(EarlyOptimizer(), plain_loader())


def test_anything_else_that_trains_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"1 parameters train although only U should: `net\.2\.bias`.*also_train"
    ):
        trainer(tmp_path, callback(tmp_path)).fit(Unfreezing(), plain_loader())


class Muon(Toy):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Muon([p for p in self.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.0)


def test_muon_trains_whole_cores_and_refuses_packed_ones(tmp_path: Path) -> None:
    module = Muon()
    trainer(tmp_path, callback(tmp_path)).fit(module, plain_loader())
    for layer in adapted_layers(module).values():
        # Whatever the gradient's singular values, the first steps move V alike in all directions.
        values = torch.linalg.svdvals(layer.core.weight.detach())
        assert values[-1] > 0.1 * values[0]
    with pytest.raises(MisconfigurationException, match=r"Muon orthogonalises.*`net\.0`.*coordinates='orthonormal'"):
        trainer(tmp_path, callback(tmp_path, coordinates="rotation")).fit(Muon(), plain_loader())


def test_merged_model_is_refused_for_fit(tmp_path: Path) -> None:
    module = Toy()
    convert(module, PMSSConfig(rank=4))
    merge(module)
    with pytest.raises(MisconfigurationException, match=r"call `unmerge\(model\)` before `fit`"):
        trainer(tmp_path, callback(tmp_path)).fit(module, plain_loader())


class Detached(Toy):
    """No gradient gets past the second layer."""

    def loss(self, batch: Any) -> Tensor:
        (x,) = batch
        with torch.no_grad():
            hidden = self.net[1](self.net[0](x))
        return (self.net[2](hidden) - x).square().mean()


class Reentrant(Toy):
    def loss(self, batch: Any) -> Tensor:
        (x,) = batch
        y = torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=True)
        return (y - x).square().mean() + 0.0 * self.dummy

    def __init__(self) -> None:
        super().__init__()
        self.dummy_holder = nn.Module()
        self.dummy_holder.value = nn.Parameter(torch.zeros(()))

    @property
    def dummy(self) -> Tensor:
        return self.dummy_holder.value


class Sparse(Toy):
    """Has a layer that its forward never uses, like an expert without tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.net.append(nn.Linear(16, 16))

    def loss(self, batch: Any) -> Tensor:
        (x,) = batch
        return (self.net[:3](x) - x).square().mean()


class NaNLoss(Toy):
    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) * float("nan")


def test_silent_layers_are_found_after_the_first_backward(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"No gradient reached U of 1 of 2 converted layers: `net\.0`"):
        trainer(tmp_path, callback(tmp_path)).fit(Detached(), plain_loader())
    options = {"also_train": ["dummy_holder"]}
    with pytest.raises(MisconfigurationException, match=r"No gradient reached U of 2 of 2.*use_reentrant=False"):
        trainer(tmp_path, callback(tmp_path, **options)).fit(Reentrant(), plain_loader())
    with pytest.raises(MisconfigurationException, match=r"NaN or infinite gradients in the first step: `net\.0`"):
        trainer(tmp_path, callback(tmp_path)).fit(NaNLoss(), plain_loader())


def test_unused_layer_is_reported_and_not_refused(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning,
        match=r"U of 1 converted layers got no gradient, since the layers did not run in the first two steps: `net\.3`",
    ):
        trainer(tmp_path, callback(tmp_path)).fit(Sparse(), plain_loader())


def test_batch_norm_outside_also_train_is_reported(tmp_path: Path) -> None:
    class Norm(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.net.insert(1, nn.BatchNorm1d(32))

    with pytest.warns(UserWarning, match=r"`net\.1` \(1 such\) updates its running statistics"):
        trainer(tmp_path, callback(tmp_path)).fit(Norm(), plain_loader())


def test_unsupported_strategy_is_refused(tmp_path: Path) -> None:
    class Pipelines(L.pytorch.strategies.ParallelStrategy):
        pass

    Pipelines.__abstractmethods__ = frozenset()
    fake: Any = types.SimpleNamespace(strategy=Pipelines())
    with pytest.raises(MisconfigurationException, match="does not support `Pipelines`; use one device, 'ddp', FSDP"):
        callback(tmp_path).setup(fake, Toy(), "fit")


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoint_holds_only_what_is_trained(tmp_path: Path, weights_only: bool) -> None:
    module = Toy()
    module.net.append(nn.Linear(16, 16))
    saver = ModelCheckpoint(tmp_path / "checkpoints", "{epoch}", save_weights_only=weights_only)
    runner = trainer(tmp_path, callback(tmp_path, also_train=["net.3"]), saver, max_epochs=1)
    runner.fit(module, plain_loader())
    checkpoint = torch.load(tmp_path / "checkpoints" / "epoch=0.ckpt")  # weights_only=True is torch's default
    own = {f"net.{i}.{key}" for i in (0, 2) for key in ("rows", "cols", "core.weight")}
    assert set(checkpoint["state_dict"]) == own | {"net.3.weight", "net.3.bias"}
    assert {v.dtype for k, v in checkpoint["state_dict"].items() if k.endswith(("rows", "cols"))} == {torch.int32}
    assert module.net[0].rows.dtype == torch.int64
    assert checkpoint["pmss"]["config"]["rank"] == 4
    assert set(module.state_dict()) > set(checkpoint["state_dict"])  # users still see the whole state dict
    other = Toy()
    other.net.append(nn.Linear(16, 16))
    scores = trainer(tmp_path, callback(tmp_path, also_train=["net.3"])).validate(
        other, plain_loader(), ckpt_path=str(tmp_path / "checkpoints" / "epoch=0.ckpt"), verbose=False
    )
    assert scores == runner.validate(module, plain_loader(), verbose=False)


def saved_checkpoint(folder: Path, module: Toy | None = None, **options: Any) -> dict[str, Any]:
    saver = ModelCheckpoint(folder / "saved", "{epoch}")
    trainer(folder, callback(folder, **options), saver, max_epochs=1).fit(module or Toy(), plain_loader())
    return torch.load(folder / "saved" / "epoch=0.ckpt")


def other_base() -> Toy:
    module = Toy()
    with torch.no_grad():
        module.net[0].weight.mul_(1.01)
    return module


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["state_dict"].pop("net.0.core.weight"), r"it lacks `net\.0\.core\.weight`"),
        (
            lambda c: c["state_dict"].update({"net.9.core.weight": torch.zeros(1)}),
            r"it contains `net\.9\.core\.weight`, which",
        ),
        (
            lambda c: c["state_dict"].update({"net.0.rows": torch.arange(5)}),
            r"of shape \(5,\) where this run has \(4,\)",
        ),
        (lambda c: c["pmss"]["config"].update(coordinates="raw"), r"made with coordinates='raw', this run has"),
        (lambda c: c["pmss"]["config"].update(scale=2.0), r"made with scale=2.0, this run has 'auto'"),
        (lambda c: c.update(state_dict=Toy().state_dict()), "contains no PMSS adapter"),
    ],
)
def test_misfit_checkpoint_is_refused_before_loading(tmp_path: Path, change: Any, message: str) -> None:
    checkpoint = saved_checkpoint(tmp_path)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    module = Toy()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, callback(tmp_path)).fit(module, plain_loader(), ckpt_path=str(tmp_path / "bad.ckpt"))
    assert not module.losses
    assert all((layer.core.weight == 0).all() for layer in adapted_layers(module).values())


def test_checkpoint_of_another_base_is_refused(tmp_path: Path) -> None:
    saved_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"belongs to another base model: the weights of `net\.0` are not those"):
        trainer(tmp_path, callback(tmp_path)).fit(
            other_base(), plain_loader(), ckpt_path=str(tmp_path / "saved" / "epoch=0.ckpt")
        )


def test_stored_indices_win_over_the_selection(tmp_path: Path) -> None:
    checkpoint = saved_checkpoint(tmp_path, selection="random", seed=1)
    module = Toy()
    runner = trainer(tmp_path, callback(tmp_path, selection="random", seed=2))
    runner.validate(module, plain_loader(), ckpt_path=str(tmp_path / "saved" / "epoch=0.ckpt"), verbose=False)
    layer = module.net[0]
    assert torch.equal(layer.rows, checkpoint["state_dict"]["net.0.rows"])
    r, c = layer.weight_rows().double(), layer.weight_columns().double()
    v = layer.core.weight.double()
    norm = (c @ layer.core_update().double() @ r).norm()
    assert torch.isclose(norm, layer.scale * v.norm(), rtol=1e-5)  # the frame was recomputed for these indices


def test_results_at_the_end_of_fit(tmp_path: Path) -> None:
    module = Toy()
    trainer(tmp_path, callback(tmp_path, rank=8), max_epochs=5).fit(module, plain_loader())
    module.eval()
    x = torch.randn(5, 16)
    plain = make_net()
    state = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    plain.load_state_dict({k.removeprefix("net."): v for k, v in state.items()})
    assert torch.allclose(plain(x), module.net(x), atol=1e-5)
    assert not torch.allclose(plain(x), make_net()(x), atol=1e-3)
    other = Toy()
    load_adapter(other, tmp_path / "out" / "adapter")
    assert torch.allclose(other.net(x), module.net(x), atol=1e-5)


def test_merge_on_save_none_and_fast_dev_run(tmp_path: Path) -> None:
    trainer(tmp_path, callback(tmp_path, merge_on_save=None), max_epochs=1).fit(Toy(), plain_loader())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"adapter"}
    trainer(tmp_path, callback(tmp_path / "dev"), fast_dev_run=True).fit(Toy(), plain_loader())
    assert not (tmp_path / "dev" / "out").exists()
    with pytest.raises(ValueError, match="merge_on_save='always' is not known"):
        PMSSCallback(merge_on_save="always")


def test_merged_beside_each_checkpoint_comes_and_goes(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "saved", "{epoch}", monitor="loss", save_top_k=2)
    module = Toy()
    trainer(tmp_path, callback(tmp_path, merge_on_save="checkpoint"), saver, max_epochs=4).fit(module, plain_loader())
    checkpoints = {p.stem for p in (tmp_path / "saved").glob("*.ckpt")}
    assert len(checkpoints) == 2
    assert {p.name for p in (tmp_path / "saved").iterdir() if p.is_dir()} == {f"{name}-merged" for name in checkpoints}


def test_logged_values(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    module = Toy()
    runner = trainer(tmp_path, callback(tmp_path, log_u_norm=True), logger=logger, log_every_n_steps=2)
    runner.fit(module, plain_loader())
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    assert {
        "pmss/trainable_parameters",
        "pmss/step_seconds",
        "pmss/peak_memory_gb",
        "pmss/u_norm/net.0",
        "pmss/u_norm/net.2",
    } <= set(names)
    norms = [float(v) for v in (row.split(",")[names.index("pmss/u_norm/net.0")] for row in rows[1:]) if v]
    assert len(norms) >= 8
    assert norms[-1] > norms[0] > 0
    quiet = trainer(
        tmp_path, callback(tmp_path, log_throughput=False), logger=CSVLogger(tmp_path / "quiet"), log_every_n_steps=2
    )
    quiet.fit(Toy(), plain_loader())
    assert "step_seconds" not in (Path(quiet.logger.log_dir) / "metrics.csv").read_text().splitlines()[0]


def test_bf16_true_keeps_u_in_float32(tmp_path: Path) -> None:
    module = Toy()
    module.loss = types.MethodType(
        lambda self, b: (self.net(b[0].bfloat16()) - b[0].bfloat16().flip(-1)).float().square().mean(), module
    )  # type: ignore[method-assign]
    trainer(tmp_path, callback(tmp_path, rank=12, merge_on_save=None), precision="bf16-true", max_epochs=30).fit(
        module, plain_loader()
    )
    assert module.net[0].weight.dtype == torch.bfloat16
    assert module.net[0].core.weight.dtype == torch.float32
    assert module.losses[-1] < 0.85 * module.losses[0]
