"""What the report says was left out: weights that no linear layer owns, and networks that nobody means to train."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics import Metric
from transformers import AutoModelForCausalLM

from lightning_pmss import PMSSConfig, PMSSLinear, convert
from lightning_pmss.conversion.convert import adapted_layers
from tests.experts.toys import MIXTURES


def frozen_matrices(model: nn.Module) -> set[str]:
    """Frozen parameters of two and more dimensions outside of converted layers."""
    inside = {id(p) for layer in adapted_layers(model).values() for p in layer.parameters()}
    return {n for n, p in model.named_parameters() if p.dim() > 1 and not p.requires_grad and id(p) not in inside}


def accounted_for(model: nn.Module, left_out: dict[str, str]) -> set[str]:
    return {n for n in frozen_matrices(model) if n in left_out or n.rpartition(".")[0] in left_out}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_fused_experts_that_nobody_asked_for_are_listed_with_their_share_and_warned_about(name: str) -> None:
    model = MIXTURES[name]()
    experts = sum(p.numel() for n, p in model.named_parameters() if "experts." in n and p.dim() == 3)
    message = r"belong to no linear layer.*`model\.layers\.\*\.mlp\.experts\.gate_up_proj`.*target_parameters"
    with pytest.warns(UserWarning, match=message):
        report = convert(model, PMSSConfig(rank=4, target_modules=["q_proj"]))
    assert frozen_matrices(model) == accounted_for(model, report.left_out)
    fused = [n for n in report.left_out if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(fused) == 4
    assert sum(report.shares[n] for n in fused) == pytest.approx(experts / report.total)
    assert "model.layers.*.mlp.experts.gate_up_proj (2)" in str(report)
    assert report.to_dict()["shares"]["model.layers.0.mlp.experts.down_proj"] > 0.05


@pytest.mark.parametrize("pattern", [["experts.gate_up_proj"], ["q_proj", "gate_up_proj"], r".*\.gate_up_proj"])
def test_a_parameter_that_is_named_is_answered_as_one(pattern: Any) -> None:
    model = MIXTURES["mixtral"](intermediate_size=64)
    with pytest.raises(
        ValueError,
        match=r"is no module but a parameter \[4, 128, 32\] of the MixtralExperts `model\.layers\.0\.mlp\.experts`.*"
        r"Experts are converted by target_parameters=\['gate_up_proj'\]",
    ):
        convert(model, PMSSConfig(rank=4, target_modules=pattern))
    assert not adapted_layers(model)


class Mixed(nn.Module):
    """A parameter of each kind of module that is not converted."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 9, width))
        self.attention = nn.MultiheadAttention(width, 2)
        self.bilinear = nn.Bilinear(width, width, 4)
        self.image, self.sound = nn.Conv2d(3, 8, 3), nn.Conv1d(3, 8, 3)
        self.embed = nn.Embedding(10, width)
        self.recurrent = nn.LSTM(width, width)
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, 16)


def test_every_frozen_matrix_is_in_the_report() -> None:
    model = Mixed()
    with pytest.warns(
        UserWarning, match=r"85% of the model's parameters belong to no linear layer.*`bilinear\.weight`"
    ):
        report = convert(model, PMSSConfig(rank=4))
    assert frozen_matrices(model) == accounted_for(model, report.left_out)
    assert set(report.left_out) == {
        "position", "attention.in_proj_weight", "attention.out_proj", "bilinear.weight", "image.weight", "sound.weight",
        "embed.weight", "recurrent.weight_ih_l0", "recurrent.weight_hh_l0",
    }  # fmt: skip
    assert report.shares["image.weight"] == pytest.approx(8 * 3 * 9 / report.total)


@pytest.mark.parametrize(
    ("field", "name", "message"),
    [
        ("target_modules", "position", r"a parameter \[1, 9, 16\] of the Mixed itself.*it stays frozen\.$"),
        (
            "target_modules",
            "in_proj_weight",
            r"of the MultiheadAttention `attention`.*target_parameters=\['in_proj_weight'\]",
        ),
        ("target_modules", "linear.weight", r"Patterns name modules: type 'linear'"),
        ("also_train", "weight_ih_l0", r"also_train: 'weight_ih_l0'.*Patterns name modules: type 'recurrent'"),
        ("exclude_modules", "image.weight", r"Patterns name modules: type 'image'"),
    ],
)
def test_parameters_in_patterns(field: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(Mixed(), PMSSConfig(rank=4, **{field: [name]}))


def test_little_is_listed_and_not_warned_about() -> None:
    model = Mixed(16)
    model.linear = nn.Linear(16, 4000)  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = convert(model, PMSSConfig(rank=4))
    assert 0 < sum(report.shares[n] for n in report.unowned) < 0.1


def test_what_was_not_asked_for_is_listed_and_not_warned_about() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 64), nn.Linear(64, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = convert(model, PMSSConfig(rank=4, target_modules=["0"], exclude_modules=["2"]))
    assert report.left_out == {"1": "not in target_modules", "2": "excluded"}


def test_an_embedding_tied_to_a_head_that_was_not_asked_for_is_the_heads(tiny_llama: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = convert(model, PMSSConfig(rank=4, target_modules=["q_proj"]))
    assert report.left_out["lm_head"] == "not in target_modules"
    assert "model.embed_tokens.weight" not in report.left_out


def test_trained_in_full_is_not_left_out() -> None:
    report = convert(Mixed(), PMSSConfig(rank=4, also_train=["recurrent", "embed", "bilinear", "attention"]))
    assert not {n for n in report.left_out if n.startswith(("recurrent", "embed", "bilinear"))}


def body(width: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def rest(module: nn.Module) -> Any:
    return module.requires_grad_(False).eval()


class Distance(Metric):
    """A metric with a network in it, as FID has."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def update(self) -> None: ...

    def compute(self) -> None: ...


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.policy, self.teacher = body(), rest(body())
        self.perceptual = rest(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)))
        self.distance = Distance(body())


@pytest.mark.parametrize("targets", ["all-linear", ["0", "2"], r".*\.[02]"])
def test_frozen_networks_in_eval_mode_and_metrics_are_left_out(targets: Any) -> None:
    model = Several()
    report = convert(model, PMSSConfig(rank=4, target_modules=targets))
    assert set(adapted_layers(model)) == {"policy.0", "policy.2"}
    asleep, metric = "frozen and in eval mode", "inside a torchmetrics Metric"
    assert {n: why for n, why in report.left_out.items() if n.startswith("teacher")} == {
        "teacher.0": asleep,
        "teacher.2": asleep,
    }
    assert [why for n, why in report.left_out.items() if n.startswith("perceptual")] == [asleep, asleep]
    assert report.left_out["distance.network.0"] == report.left_out["distance.network.2"] == metric
    assert report.children == {"policy": 2}
    assert "converted in: policy (2)" in str(report)
    assert "left out (frozen and in eval mode): teacher.*, perceptual" in str(report).replace(
        "teacher.* (2)", "teacher.*"
    )
    assert not report.unowned  # nobody is warned about the teacher's convolutions


def test_a_full_name_is_meant_as_it_stands() -> None:
    model = Several()
    convert(model, PMSSConfig(rank=4, target_modules=["teacher.0"]))
    assert set(adapted_layers(model)) == {"teacher.0"}


@pytest.mark.parametrize("change", [lambda m: m.eval(), lambda m: m.requires_grad_(False)])
def test_frozen_alone_and_eval_alone_are_converted(change: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.ModuleDict({"policy": body(), "other": change(body())})
    convert(model, PMSSConfig(rank=4))
    assert len(adapted_layers(model)) == 4


def test_a_tower_inside_the_model_is_left_out() -> None:
    """As in a vision language model whose image encoder is kept."""
    model = nn.Sequential(body(), nn.ModuleDict({"tower": rest(body()), "text": body()}))
    report = convert(model, PMSSConfig(rank=4))
    assert set(adapted_layers(model)) == {"0.0", "0.2", "1.text.0", "1.text.2"}
    assert report.asleep == ["1.tower"]


def test_where_all_is_frozen_and_in_eval_mode_all_is_converted(tiny_llama: str) -> None:
    """A habit from elsewhere, and what a model for inference is."""
    model = rest(AutoModelForCausalLM.from_pretrained(tiny_llama))
    assert len(convert(model, PMSSConfig(rank=4)).layers) == 14
    assert len(convert(nn.ModuleDict({"a": rest(body()), "b": rest(body())}), PMSSConfig(rank=4)).layers) == 4
    outer = nn.ModuleDict({"only": rest(body())})  # itself in training mode
    assert len(convert(outer, PMSSConfig(rank=4)).layers) == 2


def test_nothing_left_to_convert_says_why_and_what_to_do() -> None:
    model = nn.ModuleDict({"features": rest(body()), "head": nn.Linear(16, 2)})
    with pytest.raises(ValueError, match=r"left out \(features\.0: frozen and in eval mode.*`train\(\)`.*root="):
        convert(model, PMSSConfig(rank=4))
    assert not any(isinstance(m, PMSSLinear) for m in model.modules())
    convert(model, PMSSConfig(rank=4, root="features"))
    assert set(adapted_layers(model)) == {"0", "2"}


def test_a_network_that_a_metric_only_looks_at_is_converted() -> None:
    network = body()
    model = nn.ModuleDict({"policy": network, "distance": Distance(network)})
    assert len(convert(model, PMSSConfig(rank=4)).layers) == 2
