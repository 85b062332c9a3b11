"""Which parameters `target_parameters` converts, and what is said of those that it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_pmss import AdapterConfig, HiRAConfig, LoRAConfig, MiSSConfig, PMSSConfig, convert
from lightning_pmss.conversion.convert import adapted_layers
from tests.experts.toys import mixture
from tests.matrices.toys import Attention, Encoder, Own, inputs, made, matrices


class Cube(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cube = nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.cube


class Odd(nn.Module):
    """Parameters that cannot be converted, each for another reason."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(4, 4))
        self.list = nn.ParameterList([nn.Parameter(torch.randn(4, 4))])
        self.table = nn.Embedding(5, 4)
        self.bag = nn.EmbeddingBag(5, 4)
        self.cubes = Cube()
        self.line = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.image = nn.Conv2d(2, 2, 3)
        self.computed = parametrizations.orthogonal(nn.Linear(4, 4))
        self.part = Own().part


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("own", r"'own' is a parameter \[4, 4\] of the Odd\. It belongs to the model itself, not to a module in it, so take"),
        ("list.0", r"\[4, 4\] of the ParameterList `list`\. Its module is a container.*also_train=\['list'\]"),
        ("table.weight", r"\[5, 4\] of the Embedding `table`, which is converted as a layer\. Name that.*type 'table'"),
        ("line.weight", r"\[4, 4\] of the Linear `line`, a linear layer\. Name that in target_modules: type 'line'"),
        ("line.bias", r"\[4\] of the Linear `line`, a linear layer\. Name that in target_modules: type 'line'"),
        ("norm.weight", r"\[4\] of the LayerNorm `norm`\. An update changes a matrix; this has 1 dimension\(s\), so"),
        ("image.weight", r"of the Conv2d `image`, which is converted as a layer\. Name that in target_modules: type 'image'"),
        ("bag.weight", r"\[5, 4\] of the EmbeddingBag `bag`\. It is a table of which rows are read.*also_train=\['bag'\]"),
        ("cube", r"\[2, 3, 4\] of the Cube `cubes`\. Of parameters with more than two dimensions, those of transformers'"),
        ("weight.original", r"of the _?ParametrizationList.*Its module is a container|of the .*ParametrizationList"),
        ("part", r"'part' is a module, not a parameter\. Name it in target_modules"),
        ("nothing", r"matches no parameter, and the model has no fused experts\. Type a parameter's full name or its end"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused_by_name(pattern: str, message: str) -> None:
    model = Odd()
    with pytest.raises(ValueError, match=message):
        convert(model, LoRAConfig(rank=2, target_modules=["line"], target_parameters=[pattern]))
    assert not adapted_layers(model)
    assert not any(p.requires_grad is False for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"target_parameters": "in_proj_weight"}, {0, 1}),
        ({"target_parameters": ["layers.1.self_attn.in_proj_weight"]}, {1}),
        ({"target_parameters": r".*layers\.0.*in_proj.*"}, {0}),  # the bias is no matrix
        ({"target_parameters": ["in_proj_weight"], "exclude_modules": ["layers.0.self_attn"]}, {1}),
        ({"target_parameters": ["in_proj_weight"], "exclude_modules": ["layers.1.self_attn.in_proj_weight"]}, {0}),
        ({}, set()),
    ],
)
def test_what_is_named_is_converted(options: dict[str, Any], wanted: set[int]) -> None:
    model = Encoder()
    report = convert(model, PMSSConfig(rank=3, **{"target_modules": ["linear1"]} | options))
    names = {f"encoder.layers.{i}.self_attn.in_proj_weight" for i in wanted}
    assert set(matrices(model)) == names
    assert {layer.name for layer in report.layers} == names | {f"encoder.layers.{i}.linear1" for i in (0, 1)}
    again = convert(model, PMSSConfig(rank=3, **{"target_modules": ["linear1"]} | options))
    assert again is report
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.partition("_matrix")[0] for n in trained if "_matrix" in n} == names


def test_a_parameter_among_the_modules_is_refused_with_the_option_that_converts_it() -> None:
    with pytest.raises(
        ValueError, match=r"target_modules: 'in_proj_weight' is no module.*by target_parameters=\['in_proj_weight'\]"
    ):
        convert(Encoder(), LoRAConfig(rank=3, target_modules=["linear1", "in_proj_weight"]))


def test_ranks_are_clipped_and_patterns_name_parameters() -> None:
    model = Encoder()
    options = {"target_modules": [], "target_parameters": ["in_proj_weight"]}
    pattern = {"layers.0.self_attn.in_proj_weight": 40}
    report = convert(model, LoRAConfig(rank=3, rank_pattern=pattern, **options))
    assert [(layer.rank, layer.requested_rank) for layer in report.layers] == [(16, 40), (3, 3)]
    assert "16 (asked 40)" in str(report)
    assert report.kept_bytes_per_token == 0
    assert isinstance(model.encoder.layers[0].self_attn, nn.MultiheadAttention)


def test_a_regular_expression_leaves_biases_of_experts() -> None:
    model = mixture("gpt_oss")
    convert(model, LoRAConfig(rank=3, target_modules=[], target_parameters=r".*\.mlp\..*"))
    names = {n.rpartition("layers.")[2].partition(".")[2] for n in adapted_layers(model)}
    assert "mlp.router.weight" in names
    assert not any("bias" in n for n in names)
    with pytest.raises(ValueError, match=r"gate_up_proj_bias.*It belongs to fused experts, of which"):
        convert(mixture("gpt_oss"), LoRAConfig(rank=3, target_parameters=["gate_up_proj_bias"]))


@pytest.mark.parametrize("config", [LoRAConfig, MiSSConfig, PMSSConfig])
def test_dropout_has_no_input_to_act_on(config: Any) -> None:
    options = {"target_modules": [], "target_parameters": ["in_proj_weight"], "rank": 3}
    with pytest.raises(
        ValueError,
        match=r"in_proj_weight` \(MultiheadAttention\) has no input that dropout=0\.1 could act on; type drop",
    ):
        convert(Attention(), config(dropout=0.1, **options))


@pytest.mark.parametrize("config", [
    PMSSConfig(rank=3, coordinates="rotation", target_parameters=["in_proj_weight"], target_modules=[]),
    PMSSConfig(rank=3, edit="weight", target_parameters=["in_proj_weight"], target_modules=[]),
    PMSSConfig(rank=3, memory="keep", target_parameters=["in_proj_weight"], target_modules=[]),
])  # fmt: skip
def test_options_of_products_do_not_matter(config: AdapterConfig) -> None:
    """W' is formed in any case."""
    model = made("attention")
    convert(model, config)
    layer = matrices(model)["attention.in_proj_weight"]
    with torch.no_grad():
        for tensor in layer.core.trained().values():
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    plain = made("attention")
    with torch.no_grad():
        plain.attention.in_proj_weight += layer.update().delta(layer.base_weight())  # type: ignore[union-attr]
    torch.testing.assert_close(model(inputs()), plain(inputs()), rtol=1e-9, atol=1e-10)


def test_shared_meta_and_codes_are_refused() -> None:
    options = {"target_modules": [], "target_parameters": ["in_proj_weight"], "rank": 2}
    model = Encoder()
    first, second = (layer.self_attn for layer in model.encoder.layers)
    second.in_proj_weight = first.in_proj_weight
    with pytest.raises(
        ValueError, match=r"is shared by .*a change to one would change both; take it out of target_parameters"
    ):
        convert(model, LoRAConfig(**options))
    with pytest.raises(ValueError, match=r"is on the meta device; load its weights before it is converted"):
        convert(Encoder().to("meta"), LoRAConfig(**options))
    model = Attention()
    codes = model.attention.in_proj_weight.detach().to(torch.float8_e4m3fn)
    model.attention.in_proj_weight = nn.Parameter(codes, requires_grad=False)
    with pytest.raises(ValueError, match=r"is kept in codes \(float8_e4m3fn\), which lightning-pmss does not read"):
        convert(model, HiRAConfig(**options))
    model = Attention()
    model.attention.in_proj_weight = nn.Parameter(model.attention.in_proj_weight.detach())
    model.head.weight = nn.Parameter(model.attention.in_proj_weight.detach()[:3])
    with pytest.raises(ValueError, match="shares the memory"):
        convert(model, LoRAConfig(**options))
