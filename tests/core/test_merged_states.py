"""State dicts, casts and copies of a merged model: the pristine W is what is saved, and an update never counts twice."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from dense import COORDINATES, KINDS, adopted, base_layer, dense_weight, pmss_layer, random_like, relative, train
from torch import Tensor, nn

from lightning_pmss import PMSSCallback, PMSSConfig, convert, merge, merged, unmerge
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.merging import merged_state_dict
from lightning_pmss.methods.pmss.layer import PMSSLinear
from tests.callbacks.toys import Toy, plain_loader, trainer


class Net(nn.Module):
    """A converted layer inside a submodule and one of its own, with a norm between them."""

    def __init__(self, kind: str = "linear", dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> None:
        super().__init__()
        self.block = nn.Sequential(
            pmss_layer(kind, 14, 10, 4, dtype=dtype, seed=seed, **options), nn.LayerNorm(14, dtype=dtype)
        )
        self.last = pmss_layer(kind, 8, 14, 4, dtype=dtype, seed=seed + 1, **options)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.block(x)))
        return out


X = random_like(7, 10)
WHOLE: Callable[[Net], nn.Module] = lambda net: net  # noqa: E731
PARTS = {"root": WHOLE, "submodule": lambda net: net.block, "layer": lambda net: net.last}


def clones(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        a.dtype == second[k].dtype and torch.equal(a, second[k]) for k, a in first.items()
    )


def merged_by_hand(net: nn.Module) -> dict[str, Tensor]:
    return {n: dense_weight(x, x.core.weight.detach()) for n, x in adapted_layers(net).items()}


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", PARTS)
def test_a_state_dict_holds_the_pristine_weight(part: str, kind: str, coordinates: str) -> None:
    net, fresh = Net(kind, coordinates=coordinates), Net(kind, coordinates=coordinates, seed=5)
    expected, of = net(X), PARTS[part]
    before = clones(of(net))
    with merged(net):
        state = of(net).state_dict()
        assert same(state, before)
        assert list(state) == list(before)
        file = io.BytesIO()
        torch.save(net.state_dict(), file)
        assert relative(net(X), expected) < 1e-12
    assert same(state, before), "also after the model is unmerged"
    file.seek(0)
    fresh.load_state_dict(torch.load(file))
    assert relative(fresh(X), expected) < 1e-12


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", PARTS)
def test_loading_into_a_merged_model(part: str, kind: str, assign: bool) -> None:
    """As if it had been unmerged, loaded and merged again: another W, other indices, another U."""
    net, other, twin = Net(kind), Net(kind, seed=9), Net(kind)
    of = PARTS[part]
    with torch.no_grad():  # other indices than those of selection, too
        for layer in adapted_layers(other).values():
            layer.set_indices(layer.weight.device, rows=layer.rows.flip(0), cols=layer.cols.flip(0))
            layer.rederive()
    state = clones(of(other))
    given = {key: value.clone() for key, value in state.items()}
    of(twin).load_state_dict(given)
    exact = merged_by_hand(twin)
    merge(net)
    result = of(net).load_state_dict(state, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(layer.merged for layer in adapted_layers(net).values())
    for name, layer in adapted_layers(net).items():
        weight = layer.weight.detach().T if layer.transposed else layer.weight.detach()
        assert relative(weight, exact[name]) < 1e-13
    assert relative(net(X), twin(X)) < 1e-12
    assert same(clones(of(net)), given)
    unmerge(net)
    assert same(clones(net), clones(twin))
    assert torch.equal(net(X), twin(X))
    assert same(state, given), "what was given is never written into"


@pytest.mark.parametrize("keys", ["core.weight", "weight", "bias", "rows cols core.weight"])
def test_loading_a_part_of_a_merged_layer(keys: str) -> None:
    net, other, twin = Net(), Net(seed=9), Net()
    state = {k: v for k, v in clones(other).items() if k in {f"last.{key}" for key in keys.split()}}
    assert len(state) == len(keys.split())
    twin.load_state_dict(state, strict=False)
    merge(net)
    net.load_state_dict(state, strict=False)
    assert relative(net(X), twin(X)) < 1e-12
    unmerge(net)
    assert same(clones(net), clones(twin))


def test_what_does_not_fit_changes_nothing_of_a_merged_layer() -> None:
    net = Net()
    before = clones(net)
    merge(net)
    live = net.last.weight.detach().clone()
    with pytest.raises(RuntimeError, match="size mismatch for last.weight"):
        net.load_state_dict({"last.weight": torch.zeros(3, 3)}, strict=False)
    assert torch.equal(net.last.weight, live)
    unmerge(net)
    assert same(clones(net), before)


def test_a_diverged_u_loaded_while_merged_is_told() -> None:
    net = Net()
    merge(net)
    with pytest.warns(UserWarning, match="`last`: the merged weight of what was loaded is not finite"):
        net.load_state_dict({"last.core.weight": torch.full((4, 4), float("nan"))}, strict=False)
    unmerge(net)
    assert bool(net.last.weight.isfinite().all())


def test_assigning_another_dtype_while_merged() -> None:
    net, other, twin = Net(), Net(dtype=torch.bfloat16, seed=9), Net()
    state = clones(other)
    twin.load_state_dict(state, assign=True)
    merge(net)
    net.load_state_dict(state, assign=True)
    assert net.last.weight.dtype == torch.bfloat16
    unmerge(net)
    assert same(clones(net), clones(twin))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_casts_of_a_merged_model(kind: str, dtype: torch.dtype) -> None:
    net, plain = Net(kind, torch.float32), Net(kind, torch.float32)
    expected = net(X.float())
    merge(net)
    net.to(dtype)
    plain.to(dtype)
    assert same(clones(net), clones(plain))
    assert (
        relative(net(X.to(dtype)), expected) < {torch.float16: 0.01, torch.bfloat16: 0.05, torch.float64: 1e-5}[dtype]
    )
    for layer, other in zip(adapted_layers(net).values(), adapted_layers(plain).values(), strict=True):
        assert torch.equal(layer.base_weight(), other.base_weight())
    unmerge(net)
    assert same(clones(net), clones(plain))
    assert torch.equal(net(X.to(dtype)), plain(X.to(dtype)))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_merged_model_unmerge_on_their_own(way: str) -> None:
    net = Net()
    before, expected = clones(net), net(X)
    merge(net)
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(net) if way == "deepcopy" else pickle.loads(pickle.dumps(net))  # noqa: S301
    assert same(clones(other), before)
    unmerge(other)
    assert same(clones(other), before)
    assert all(layer.merged for layer in adapted_layers(net).values())
    assert relative(net(X), expected) < 1e-12
    merge(other)
    other.load_state_dict(clones(Net(seed=3)))  # loading merges again in a copy too
    assert relative(other(X), Net(seed=3)(X)) < 1e-12
    unmerge(net)
    assert same(clones(net), before)


@pytest.mark.parametrize("callback", [False, True])
def test_lightning_checkpoints_taken_while_merged(callback: bool, tmp_path: Path) -> None:
    def module() -> Toy:
        made = Toy()
        if not callback:
            convert(made, PMSSConfig(rank=6))
        return made

    def runner() -> L.Trainer:
        ours = PMSSCallback(rank=6, output_dir=tmp_path / "out", merge_on_save=None) if callback else None
        return trainer(tmp_path, ours, max_epochs=1)

    trained, run = module(), runner()
    run.fit(trained, plain_loader())
    x = random_like(5, 16, dtype=torch.float32)
    expected = trained.net(x)
    with merged(trained):
        run.save_checkpoint(tmp_path / "merged.ckpt")
    run.save_checkpoint(tmp_path / "plain.ckpt")
    states = [torch.load(tmp_path / f"{name}.ckpt")["state_dict"] for name in ("merged", "plain")]
    assert same(*states)
    fresh = module()
    runner().test(fresh, plain_loader(), ckpt_path=str(tmp_path / "merged.ckpt"), verbose=False)
    assert torch.equal(fresh.net(x), expected)
    merge(fresh)  # and into a merged module
    runner().test(fresh, plain_loader(), ckpt_path=str(tmp_path / "plain.ckpt"), verbose=False)
    assert relative(fresh.net(x), expected) < 1e-5
    unmerge(fresh)
    assert torch.equal(fresh.net(x), expected)


def test_ddp_around_a_merged_model() -> None:
    net = Net()
    before, expected = clones(net), net(X)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        merge(net)
        wrapped = nn.parallel.DistributedDataParallel(net)
        assert relative(wrapped(X), expected) < 1e-12
        assert same({k.removeprefix("module."): v for k, v in clones(wrapped).items()}, before)
        unmerge(net)
        assert torch.equal(wrapped(X), expected)
        del wrapped
    finally:
        torch.distributed.destroy_process_group()
    assert same(clones(net), before)


# -- merged weights that are taken for a base --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_not_taken_for_the_base(kind: str, dtype: torch.dtype) -> None:
    net = Net(kind, dtype)
    before, plain = clones(net), {k: v.clone() for k, v in merged_state_dict(net).items()}
    for state in (plain, before | plain):  # the second one: as versions before 0.2 wrote it while merged
        with pytest.raises(
            ValueError, match=r"`block.0.weight` of the state dict is this very weight with an update merged"
        ):
            net.load_state_dict(state, strict=False)
        assert same(clones(net), before)
        with merged(net), pytest.raises(ValueError, match="`block.0.weight` of the state dict"):
            net.load_state_dict(state, strict=False)
    # with U taken away beside it, W' is a base like any other
    zero = {f"{name}.core.weight": torch.zeros_like(x.core.weight) for name, x in adapted_layers(net).items()}
    net.load_state_dict(plain | zero, strict=False)
    assert all(torch.equal(v, plain[k]) for k, v in net.state_dict().items() if k in plain)


def test_other_weights_are_loaded_as_a_base() -> None:
    layer = pmss_layer(out=24, inp=20, rank=4, dtype=torch.float32)
    for change in (
        random_like(24, 20).float(),
        1e-3 * random_like(24, 20).float(),
        random_like(24, 2).float() @ random_like(2, 20).float(),  # of low rank, as a LoRA's
        -2 * layer.weight.detach(),
        layer.weight.detach().bfloat16().float() - layer.weight.detach(),
    ):
        weight = layer.weight.detach() + change
        layer.load_state_dict({"weight": weight}, strict=False)
        assert torch.equal(layer.weight, weight)
        layer.load_state_dict({"weight": pmss_layer(out=24, inp=20, rank=4, dtype=torch.float32).weight}, strict=False)


# -- quantised bases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requantise", [False, True])
def test_quantised_layers_keep_their_codes_in_the_state_dict(requantise: bool) -> None:
    bnb = pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is not installed: pip install lightning-pmss[quantised]"
    )

    def make(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        layer = bnb.nn.Linear4bit(64, 48, quant_type="nf4", compute_dtype=torch.float32)
        net = nn.Sequential(layer).to("cpu")
        convert(net, PMSSConfig(rank=8))
        train(net[0])
        return net

    net, x = make(0), random_like(6, 64, dtype=torch.float32)
    expected, before = net(x), clones(net)
    assert any("quant" in key for key in before)
    merge(net, requantise=requantise, dequantise=not requantise)
    shown = net(x)
    assert 0 < relative(shown, expected) < (0.2 if requantise else 1e-4)
    assert same(clones(net), before)
    other = copy.deepcopy(net)
    v = 2 * net[0].core.weight.detach()
    net.load_state_dict({"0.core.weight": v}, strict=False)
    assert (net[0].weight.dtype == torch.uint8) is requantise
    twin = make(0)
    twin.load_state_dict({"0.core.weight": v}, strict=False)
    assert relative(net(x), twin(x)) < (0.2 if requantise else 1e-4)
    net.half().float(), twin.half().float()
    unmerge(net)
    assert torch.equal(net(x), twin(x))
    unmerge(other)
    assert torch.equal(other(x), expected)
    assert same(clones(other), before)


def test_adopted_by_hand_and_never_trained() -> None:
    layer = adopted(base_layer("linear", 12, 10), 4)
    assert isinstance(layer, PMSSLinear)
    before = clones(layer)
    merge(nn.ModuleDict({"a": layer}))
    layer.load_state_dict(before)
    assert same(clones(layer), before)
