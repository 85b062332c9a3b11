"""What the studies add to PMSS: skeletons chosen with data, selection anew during training."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from experiments.calibrated import RULES, calibrate, choose, pursue
from experiments.frozen_a import DIRECTIONS
from experiments.gradients import share
from experiments.layer_scales import RULES as RULES_OF_SCALES
from experiments.layer_scales import LayerScales
from experiments.methods import METHODS, CalibratedSkeleton, Reselection, WeightedFrame
from experiments.optimizers import TensorAdam
from experiments.rectangular import KINDS as KINDS_OF_SIDES
from experiments.rectangular import RectangularFrame
from experiments.rotating import KINDS, RotatingFrame
from experiments.run import Places, run
from experiments.spectrum import spectra, summary
from lightning_pmss import PMSSConfig, convert
from lightning_pmss.conversion.convert import adapted_layers


def _held(vectors: Tensor, target: Tensor, chosen: Any) -> float:
    basis = torch.linalg.qr(vectors[:, list(chosen)]).Q
    return float((basis.T @ target).square().sum())


def test_pursuit_is_greedy_over_projections() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors, target = (torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    chosen: list[int] = []
    for _ in range(4):
        best = max((i for i in range(9) if i not in chosen), key=lambda i: _held(vectors, target, [*chosen, i]))
        chosen.append(best)
    assert pursue(vectors, target, 4).tolist() == chosen


def test_pursuit_takes_no_vector_twice_and_none_within_the_span() -> None:
    vectors = torch.eye(4)[:, [0, 0, 1, 2]] * torch.tensor([1.0, 2.0, 1.0, 1.0])
    target = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))
    assert set(pursue(vectors, target, 3).tolist()) in ({0, 2, 3}, {1, 2, 3})


def test_moments_are_those_of_autograd(tiny_llama: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    ids = torch.randint(0, 300, (2, 7), generator=torch.Generator().manual_seed(0))
    name = "model.layers.0.mlp.up_proj"
    layer = model.get_submodule(name)
    batches = [ids[:1], ids[1:]]

    def loss(batch: Tensor) -> Tensor:
        return model(input_ids=batch, labels=batch).loss

    for batch in batches:
        loss(batch).backward()
    expected = layer.weight.grad.clone()
    model.zero_grad()
    model.requires_grad_(False)
    found = calibrate({name: layer}, model.get_input_embeddings(), loss, batches)[name]
    torch.testing.assert_close(found.gradient, expected)
    assert all(p.grad is None for p in model.parameters())
    assert found.inputs.shape == (32, 32)
    assert torch.linalg.eigvalsh(found.outputs).min() > -1e-6
    for by in RULES:
        rows, cols = choose(layer.weight, found, 5, by)
        assert len(rows.unique()) == len(cols.unique()) == 5
    held = _held(layer.weight.detach(), found.gradient, choose(layer.weight, found, 5, "gradient")[1])
    others = [_held(layer.weight.detach(), found.gradient, c) for c in itertools.combinations(range(8), 5)]
    assert held > sum(others) / len(others)


def test_the_share_of_a_gradient_that_a_skeleton_holds() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, core = torch.randn(9, 7, generator=generator), torch.randn(3, 2, generator=generator)
    rows, cols = torch.tensor([1, 4]), torch.tensor([0, 2, 5])
    within = weight[:, cols] @ core @ weight[rows]
    assert share(within, weight, rows, cols) == pytest.approx(1.0, rel=1e-4)
    whole = torch.linalg.qr(weight[:, cols], mode="complete").Q
    outside = whole[:, 3:4] @ torch.linalg.qr(weight[rows].T).Q[:, :1].T
    assert share(outside, weight, rows, cols) == pytest.approx(0.0, abs=1e-6)
    both = within / within.norm() + outside / outside.norm()
    assert share(both, weight, rows, cols) == pytest.approx(0.5, rel=1e-4)


def test_unknown_rules_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reselect.by='gradients' is not known; choose one of"):
        Reselection(every=2, by="gradients")
    with pytest.raises(ValueError, match="skeleton.by='lupp' is not known; choose one of"):
        CalibratedSkeleton(PMSSConfig(rank=4), tmp_path / "file", None, by="lupp")


@pytest.mark.parametrize(("left", "right"), [(0, 0), (1, 0), (0.5, 1)])
def test_a_weighted_frame_is_the_svd_with_powers(tiny_llama: str, left: float, right: float) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    convert(model, PMSSConfig(rank=4, scale=1.0))
    WeightedFrame(left, right).on_fit_start(None, model)  # type: ignore[arg-type]
    layer = adapted_layers(model)["model.layers.0.mlp.up_proj"]
    v = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    layer.core.weight.data.copy_(v)
    found = layer.weight_columns() @ layer.core_update() @ layer.weight_rows()
    sides = []
    for matrix, power in ((layer.weight_columns(), left), (layer.weight_rows().T, right)):
        p, s, _ = torch.linalg.svd(matrix.detach(), full_matrices=False)
        weights = s**power
        sides.append(p * weights / weights.square().mean().sqrt())
    # Singular vectors are known up to their sign, so norms of entries are compared.
    expected = torch.linalg.pinv(sides[0]) @ found.detach() @ torch.linalg.pinv(sides[1]).T
    torch.testing.assert_close(expected.abs(), v.abs(), rtol=1e-3, atol=1e-4)


class _Loop:
    """The little of a Trainer that `Reselection` reads."""

    def __init__(self, model: nn.Module) -> None:
        self.global_step, self.max_steps = 2, 10
        self.optimizers = [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)]


@pytest.mark.parametrize("by", ["random", "gradient"])
def test_selecting_anew_changes_the_skeleton_and_not_the_function(tiny_llama: str, by: str) -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModelForCausalLM.from_pretrained(tiny_llama)
            self.device = torch.device("cpu")

        def response_loss(self, batch: Any) -> tuple[Tensor, int]:
            return self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss, 1

    module = Module()
    convert(module, PMSSConfig(rank=4))
    loop = _Loop(module)
    batch = {"input_ids": torch.randint(0, 300, (2, 7), generator=torch.Generator().manual_seed(0))}
    for _ in range(2):
        module.response_loss(batch)[0].backward()
        loop.optimizers[0].step()
        loop.optimizers[0].zero_grad()
    before = module.model(**batch).logits
    indices = {name: layer.rows.clone() for name, layer in adapted_layers(module).items()}
    Reselection(every=2, by=by).on_train_batch_end(loop, module, None, batch, 1)  # type: ignore[arg-type]
    torch.testing.assert_close(module.model(**batch).logits, before, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(layer.rows, indices[name]) for name, layer in adapted_layers(module).items())
    for layer in adapted_layers(module).values():
        assert not layer.core.weight.any()
        assert not loop.optimizers[0].state[layer.core.weight]["exp_avg"].any()


OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "pmss": {"rank": 4},
    "psoft": {"rank": 4},
    "frozen_a": {"rank": 2, "directions": "random", "scale": 8},
}
VARIANTS = [{"name": name, **OPTIONS.get(name, {"rank": 2})} for name in METHODS if name != "base"] + [
    {"name": "pmss", "rank": 4, "skeleton": {"by": "gradient", "batches": 2}},
    {"name": "pmss", "rank": 4, "layer_scales": "spectral"},
    {"name": "pmss", "rank": 4, "columns": "all"},
    {"name": "pmss", "rank": 4, "columns": "all", "whitened": 2},
    {"name": "pmss", "rank": 4, "columns": "all", "skeleton": {"by": "activation", "batches": 2}},
    {"name": "pmss", "rank": 4, "reselect": {"every": 1, "by": "random"}, "targets": "mlp"},
    {"name": "pmss", "rank": 4, "columns": "all", "reselect": {"every": 1, "by": "random"}},
    *({"name": "frozen_a", "rank": 2, "directions": name, "scale": "in", "batches": 2} for name in DIRECTIONS),
]


def _spec(model: str, batch_size: int) -> dict[str, Any]:
    """What all runs on pairs have in common; `lr` is that of a few steps."""
    return {
        "model": Path(model).name,
        "dtype": "float32",
        "precision": "32-true",
        "task": {"name": "pairs", "size": 8, "batch_size": batch_size},
        "lr": 3e-2,
        "seed": 1,
    }


@pytest.mark.parametrize("method", VARIANTS, ids=lambda m: "-".join(map(str, m)) + m["name"])
def test_every_method_runs_and_changes_the_loss(method: dict[str, Any], tiny_llama: str, tmp_path: Path) -> None:
    spec = _spec(tiny_llama, 4) | {
        "steps": 8,
        "evaluate": ["val", "test"],
        "method": method,
        "spectra": "reselect" not in method,
    }
    places = Places((str(Path(tiny_llama).parent),), str(tmp_path), str(tmp_path / "cache"))
    untrained = run(spec | {"method": {"name": "base"}, "steps": 0, "spectra": False}, places)
    assert untrained["train_loss"] == []
    record = run(spec, places)
    assert record["status"] == "finished"
    assert record["scores"]["val/loss"] == pytest.approx(record["scores"]["test/loss"])
    assert len(record["train_loss"]) == len(record["gradient_norms"]) == 8
    assert all(norm > 0 for norm in record["gradient_norms"])
    assert record["scores"]["val/loss"] < untrained["scores"]["val/loss"]
    assert record["saved_bytes"] > 0
    if spec["spectra"]:
        assert len(record["spectra"]["norm"]) == 14
        assert len(record["spectra"]["median"]) == 32
    if method["name"] == "lora":
        assert all(ranks[2] <= 2 for ranks in record["spectra"]["ranks"].values())


def test_clip_bounds_the_gradient_of_a_step(tiny_llama: str, tmp_path: Path) -> None:
    places = Places((str(Path(tiny_llama).parent),), str(tmp_path), str(tmp_path / "cache"))
    spec = _spec(tiny_llama, 4) | {"steps": 6, "evaluate": ["val"], "method": {"name": "pmss", "rank": 4}}
    usual, clipped = (run(spec | more, places) for more in ({}, {"clip": 1e-12}))
    assert usual["gradient_norms"][0] == clipped["gradient_norms"][0]  # noted before it is clipped
    assert usual["scores"]["val/loss"] < clipped["scores"]["val/loss"] - 0.01  # so far below Adam's eps nothing moves


def test_layer_scales_multiply_the_update(tiny_llama: str) -> None:
    layers = {}
    for by in RULES_OF_SCALES:
        module = L.LightningModule()
        module.model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        convert(module, PMSSConfig(rank=4, scale=2.0))
        LayerScales(by).on_fit_start(None, module)  # type: ignore[arg-type]
        layers[by] = adapted_layers(module)
    mlp, kv = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj"  # [32, 64] and [16, 32]
    ratio = {by: found[mlp].scale / found[kv].scale for by, found in layers.items()}
    norms = [float(layers["norm"][name].base_weight().norm()) for name in (mlp, kv)]
    assert ratio == pytest.approx({"spectral": 1.0, "outputs": 2**0.5, "area": 2.0, "norm": norms[0] / norms[1]})
    assert layers["spectral"][mlp].scale == pytest.approx(2 * 0.5**0.5)
    for by in ("outputs", "area", "norm"):
        assert sum(math.log(layer.scale / 2) for layer in layers[by].values()) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="choose one of"):
        LayerScales("width")


def test_tensor_adam_is_adam_with_one_second_moment() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, reference = (nn.Parameter(torch.zeros(3, 2)) for _ in range(2))
    optimizer = TensorAdam([ours], lr=0.1)
    mean, square = torch.zeros(3, 2), 0.0
    for step in range(1, 4):
        grad = torch.randn(3, 2, generator=generator)
        ours.grad = grad.clone()
        optimizer.step()
        mean = 0.9 * mean + 0.1 * grad
        square = 0.999 * square + 0.001 * float(grad.square().mean())
        with torch.no_grad():
            reference -= 0.1 * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)) ** 0.5 + 1e-8)
    torch.testing.assert_close(ours, reference)
    # With one entry it is Adam itself.
    one, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    steppers = TensorAdam([one], lr=0.1), torch.optim.AdamW([other], lr=0.1, weight_decay=0.0)
    for value in (1.0, -3.0, 0.5):
        for p, stepper in zip((one, other), steppers, strict=True):
            p.grad = torch.tensor([value])
            stepper.step()
    torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="weight_decay"):
        TensorAdam([one], weight_decay=0.1)


def test_muon_steps_in_all_directions_alike(tiny_llama: str, tmp_path: Path) -> None:
    places = Places((str(Path(tiny_llama).parent),), str(tmp_path), str(tmp_path / "cache"))
    spec = _spec(tiny_llama, 8) | {
        "steps": 1,
        "evaluate": [],
        "method": {"name": "pmss", "rank": 4},
        "spectra": True,
    }
    spread = {}
    for optimizer in ("adamw", "muon"):
        record = run(spec | {"optimizer": optimizer}, places)
        spread[optimizer] = sum(ranks[1] for ranks in record["spectra"]["ranks"].values())
    assert spread["muon"] > spread["adamw"]


def test_flat_minima_are_options_of_a_run(tiny_llama: str, tmp_path: Path) -> None:
    places = Places((str(Path(tiny_llama).parent),), str(tmp_path), str(tmp_path / "cache"))
    spec = _spec(tiny_llama, 8) | {"steps": 3, "evaluate": ["val"]}
    found: dict[str, list[float]] = {}
    changes: list[dict[str, Any]] = [
        {},
        {"optimizer": "sam"},
        {"optimizer": "bsam"},
        {"flat": 2.0},
        {"optimizer": "sam", "flat": 2.0},
    ]
    for name in ("pmss", "lora"):
        for change in changes if name == "pmss" else changes[:3]:
            record = run(spec | {"method": {"name": name, "rank": 4}} | change, places)
            assert record["status"] == "finished"
            assert len(record["train_loss"]) == len(record["gradient_norms"]) == 3  # a step is one, whatever its passes
            found[f"{name} {change}"] = [record["scores"]["val/loss"], record["train_loss"][0]]
    assert len({scores[0] for scores in found.values()}) == len(found)
    assert len({scores[1] for scores in found.values()}) == 1  # that of the first pass; the noise begins at 0
    with pytest.raises(ValueError, match="no layer of the model is converted"):
        run(spec | {"method": {"name": "lora", "rank": 4}, "flat": 0.05}, places)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model 'SmolLM3'"):
        Places((str(tmp_path),), "", "").model("SmolLM3")


def test_the_spectrum_is_that_of_the_dense_change(tiny_llama: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    convert(model, PMSSConfig(rank=4, scale=1.0))
    layer = adapted_layers(model)["model.layers.0.mlp.up_proj"]
    with torch.no_grad():
        layer.core.weight.normal_(generator=torch.Generator().manual_seed(0))
    found = spectra(model, tiny_llama)
    assert list(found) == ["model.layers.0.mlp.up_proj"]
    values = torch.tensor(found["model.layers.0.mlp.up_proj"])
    torch.testing.assert_close(values[:4], torch.linalg.svdvals(layer.core.weight.detach()), rtol=1e-3, atol=1e-4)
    assert values[4:].max() < 1e-5


def test_the_summary_of_spectra() -> None:
    found = summary({"a": [2.0, 1.0, 0.0], "b": [1.0, 1.0, 1.0], "c": [1.0, 0.5, 0.1], "narrow": [4.0, 3.0]})
    assert found["median"] == [1.0, 0.5, 0.1]
    assert found["norm"]["narrow"] == 5.0
    assert found["ranks"] == {"a": [1, 2, 2], "b": [2, 3, 3], "c": [1, 2, 2], "narrow": [1, 2, 2]}


@pytest.mark.parametrize("kind", KINDS)
def test_a_rotating_core_turns_what_w_has_between_columns_and_rows(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 7, generator=generator)
    rows, cols = torch.tensor([0, 3, 4, 8]), torch.tensor([1, 2, 5, 6])
    c, r = weight[:, cols], weight[rows]
    frame = RotatingFrame(weight, c, r, kind)
    assert not frame(torch.zeros(4, 4)).abs().max() > 1e-5
    v = torch.randn(4, 4, generator=generator)
    if "scales" not in kind:
        v.fill_diagonal_(0)
    q_c, q_r = torch.linalg.qr(c).Q, torch.linalg.qr(r.T).Q
    before = q_c.T @ weight @ q_r
    after = q_c.T @ (weight + c @ frame(v) @ r) @ q_r
    factors = torch.linalg.svdvals(after) / torch.linalg.svdvals(before)
    if "scales" in kind:
        torch.testing.assert_close(
            after.det().abs(), before.det().abs() * v.diagonal().sum().exp(), rtol=1e-3, atol=1e-4
        )
    else:
        torch.testing.assert_close(factors, torch.ones(4), rtol=1e-3, atol=1e-3)
    assert (after - before).norm() > 0.5
    used = sum(bool((frame(v + step) - frame(v)).abs().max() > 1e-6) for step in (1e-2 * torch.eye(16)).view(16, 4, 4))
    assert 16 - used == frame.unused


@pytest.mark.parametrize("kind", KINDS_OF_SIDES)
def test_a_rectangular_core_moves_so_many_directions_of_each_side(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    columns, rows, v = (torch.randn(*shape, generator=generator) for shape in ((9, 5), (5, 7), (5, 5)))
    frame = RectangularFrame(columns, rows, 2, 4, kind)
    assert frame.unused == 25 - 8
    update = columns @ frame(v) @ rows
    torch.testing.assert_close(torch.linalg.svdvals(update)[:2], torch.linalg.svdvals(v[:2, :4]))  # orthonormal sides
    assert torch.linalg.matrix_rank(update) == 2
    for side, vectors, count in ((update, columns, 2), (update.T, rows.T, 4)):
        if kind == "leading":
            span = torch.linalg.svd(vectors).U[:, :count]
            torch.testing.assert_close(span @ (span.T @ side), side)
        elif count == 4:  # in the span of four of the five vectors, and of no three
            held = [_held(vectors, side, chosen) for chosen in itertools.combinations(range(5), count)]
            assert max(held) == pytest.approx(float(side.square().sum()), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "numbers", "rank"),
    [({"sides": {"left": 2, "right": 5}}, 2 * 5, 2), ({"core": "right"}, 15, 6), ({"core": "both"}, 30, 6)],
)
def test_a_core_of_another_kind_trains(
    tiny_llama: str, tmp_path: Path, options: dict[str, Any], numbers: int, rank: int
) -> None:
    places = Places((str(Path(tiny_llama).parent),), str(tmp_path), str(tmp_path / "cache"))
    spec = _spec(tiny_llama, 8) | {"steps": 2, "evaluate": [], "spectra": True}
    record = run(spec | {"method": {"name": "pmss", "rank": 6, **options}}, places)
    assert record["trainable"] == 14 * numbers
    assert 1 <= max(ranks[2] for ranks in record["spectra"]["ranks"].values()) <= rank


def test_an_unknown_core_is_refused(tiny_llama: str, tmp_path: Path) -> None:
    places = Places((str(Path(tiny_llama).parent),), str(tmp_path), str(tmp_path / "cache"))
    for options, message in (
        ({"sides": {"left": 2, "right": 2, "kind": "tall"}}, "sides.kind"),
        ({"core": "up"}, "core="),
    ):
        with pytest.raises(ValueError, match=message):
            run(_spec(tiny_llama, 8) | {"steps": 1, "method": {"name": "pmss", "rank": 6, **options}}, places)
