"""Rules that combine updates: against peft's own combination, and what must hold of LoRA-LEGO."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_pmss.methods.method import Factors
from lightning_pmss.named.rules import UNITS, Rule, lego

peft = pytest.importorskip("peft")
OUT, IN = 12, 10


def part(rank: int, seed: int) -> Factors:
    made = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*shape, generator=made, dtype=torch.float64) for shape in ((rank, IN), (OUT, rank)))
    return Factors(a, b)


def change(factors: Factors) -> Tensor:
    return factors.b @ factors.a


PARTS = [(0.7, part(4, 1)), (-0.3, part(4, 2)), (1.2, part(4, 3))]


@pytest.mark.parametrize(
    "options",
    [
        {"name": "linear"},
        {"name": "cat"},
        {"name": "svd", "rank": 5},
        {"name": "ties", "density": 0.5},
        {"name": "dare_linear", "density": 0.6},
        {"name": "dare_ties", "density": 0.6},
        {"name": "magnitude_prune", "density": 0.4},
    ],
    ids=lambda options: options["name"],
)
def test_equals_peft(options: dict[str, Any]) -> None:
    model: Any = nn.Sequential(nn.Linear(IN, OUT, bias=False, dtype=torch.float64))
    for number, (_, factors) in enumerate(PARTS):
        config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"])
        if number == 0:
            model = peft.get_peft_model(model, config, "a0", autocast_adapter_dtype=False)
        else:
            model.add_adapter(f"a{number}", config)
        layer = model.base_model.model[0]
        layer.lora_A[f"a{number}"].weight.data = factors.a.clone()
        layer.lora_B[f"a{number}"].weight.data = factors.b.clone()
    wanted = {"rank": "svd_rank"}
    more = {wanted.get(k, k): v for k, v in options.items() if k != "name"}
    names, weights = [f"a{n}" for n in range(3)], [w for w, _ in PARTS]
    if options["name"].startswith(
        "dare"
    ):  # peft draws a new adapter first, so its draws are compared one step further in
        torch.manual_seed(Rule(seed=7, **options).seed_of("layer"))
        a, b = model.base_model._generalized_task_arithmetic_weighted_adapter(
            options["name"], names, weights, layer, options["density"], "total"
        )
        expected = b @ a
    else:
        model.add_weighted_adapter(names, weights, "all", options["name"], **more)
        expected = layer.lora_B["all"].weight @ layer.lora_A["all"].weight * layer.scaling["all"]
    found = change(Rule(seed=7, **options).combined(PARTS, "layer"))
    assert float(expected.norm()) > 0
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)  # peft keeps weights in float32


def test_dare_draws_from_its_seed_and_leaves_the_global_state() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, same, other = (change(Rule("dare_linear", density=0.5, seed=s).combined(PARTS)) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_lego_with_as_many_clusters_as_units_is_the_sum() -> None:
    parts = [(0.7, part(3, 1)), (-0.3, part(5, 2))]
    expected = sum(weight * change(factors) for weight, factors in parts)
    for units in UNITS:
        torch.testing.assert_close(change(lego(parts, 8, units=units)), expected)
        assert len(lego(parts, 20, units=units).a) == 8


def test_lego_by_hand() -> None:
    """Two clusters far apart: means of the units, with the mean of their largest entries, times sqrt(r / k)."""
    a = torch.tensor([[10.0, 0.0], [0.0, 8.0]], dtype=torch.float64)
    b = torch.tensor([[6.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    near = [Factors(a, b), Factors(a + 0.5, b - 0.5)]
    found = lego([(1.0, near[0]), (1.0, near[1])], 2, units="raw")
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for i in range(2):
        units = [torch.cat([f.a[i], f.b[:, i]]) for f in near]
        mean = (units[0] + units[1]) / 2
        mean = mean * (sum(float(u.abs().max()) for u in units) / 2 / float(mean.abs().max()))
        expected += torch.outer(mean[2:], mean[:2])
    torch.testing.assert_close(change(found), expected)  # r = k = 2
    single = lego([(1.0, near[0])], 1, units="raw")
    assert len(single.a) == 1


def test_lego_scales_the_output_by_the_root_of_source_rank_over_rank() -> None:
    same = part(1, 1)
    parts = [(1.0, Factors(same.a.repeat(4, 1), same.b.repeat(1, 4)))]  # four equal units: one cluster has no spread
    torch.testing.assert_close(change(lego(parts, 1, units="raw")), math.sqrt(4 / 1) * change(same))


def test_alignment_makes_signs_and_scales_of_units_irrelevant() -> None:
    one, two = part(4, 1), part(4, 2)
    flips = torch.tensor([1.0, -3.0, 0.5, -1.0], dtype=torch.float64)
    changed = Factors(one.a * flips[:, None], one.b / flips)
    plain, moved = ([(1.0, factors), (1.0, two)] for factors in (one, changed))
    torch.testing.assert_close(change(lego(plain, 3)), change(lego(moved, 3)))
    assert not torch.allclose(change(lego(plain, 3, units="raw")), change(lego(moved, 3, units="raw")))


def test_normalised_units_are_clustered_by_direction_and_averaged_as_they_are() -> None:
    """A long and a short unit of one direction belong together, though the short one is nearer to another."""
    a = torch.tensor([[9.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([[9.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    found, raw = (change(lego([(1.0, Factors(a, b))], 2, units=units)) for units in ("normalised", "raw"))
    # The first two: mean (5, 0 | 5, 0), whose largest entry is the mean of theirs. sqrt(3 / 2) on the output.
    torch.testing.assert_close(found, math.sqrt(3 / 2) * torch.diag(torch.tensor([25.0, 1.0], dtype=torch.float64)))
    assert float(raw[0, 0]) == pytest.approx(
        math.sqrt(3 / 2) * (81 + 1)
    )  # the first alone; the others (1, 1 | 1, 1) / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "best"}, "rule='best' is not known; choose one of lego, cat, svd"),
        ({"name": "lego"}, "rule lego needs a rank: type --rank"),
        ({"name": "cat", "rank": 4}, "rule cat has no rank: leave --rank out"),
        ({"name": "svd", "rank": 0}, "rank=0 is not a rank; type a whole number of at least 1"),
        ({"name": "ties"}, "rule ties needs a density: type --density"),
        ({"name": "linear", "density": 0.5}, "rule linear has no density: leave --density out"),
        ({"name": "cat", "units": "raw"}, "rule cat clusters no units: leave --units out"),
        (
            {"name": "lego", "rank": 2, "units": "row"},
            "units='row' is not known; choose one of aligned, raw, normalised",
        ),
        ({"name": "ties", "density": 0.0}, "density=0.0 must be above 0 and at most 1"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Rule(**options)


def test_other_ranks_are_refused_where_entries_are_combined() -> None:
    with pytest.raises(
        ValueError, match=r"rule linear combines factors of one rank, and these have \[3, 4\]; take lego, svd"
    ):
        Rule("linear").combined([(1.0, part(3, 1)), (1.0, part(4, 2))])
