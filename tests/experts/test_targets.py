"""Which experts are converted, and what is said where a name, an option or a kind of experts is not fit."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lightning_pmss import BATConfig, HiRAConfig, LoRAConfig, MiSSConfig, PMSSConfig, convert
from lightning_pmss.conversion.convert import adapted_layers, conversion_of
from lightning_pmss.layers.experts import AdaptedExperts
from tests.experts.toys import MIXTURES, experts_of, mixture, tokens, train

UP, DOWN = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"


def parameters(model: nn.Module) -> set[str]:
    """Names of the converted parameters of experts, with a star for each layer."""
    names = [n for n in adapted_layers(model) if ".experts." in n]
    return {".".join("*" if p.isdigit() else p for p in n.split(".")[:-1]) for n in names}


@pytest.mark.parametrize("name", list(MIXTURES))
def test_all_linear_has_every_expert(name: str) -> None:
    model = mixture(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = convert(model, LoRAConfig(rank=4, exclude_modules=["gate"] if name == "deepseek" else []))
    layers = adapted_layers(model)
    assert {f"{UP}.{i}" for i in range(4)} | {f"{DOWN}.{i}" for i in range(4)} <= set(layers)
    assert layers[f"{DOWN}.2"].weight.shape == (32, 48 if name in ("mixtral", "gpt_oss") else 24)
    assert all(not key.endswith(("gate_up_proj", "down_proj")) for key in report.left_out)
    routers = [p for n, p in model.named_parameters() if n.endswith(("gate.weight", "router.weight"))]
    assert routers
    assert not any(p.requires_grad for p in routers)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(n.endswith((".core.A", ".core.B")) for n in trained)
    assert "model.layers.1.mlp.experts.down_proj_adapter.core.A" in trained
    assert "experts.down_proj.*" in str(report)
    assert report.children == {"model": len(layers)}
    again = convert(model, LoRAConfig(rank=4, exclude_modules=["gate"] if name == "deepseek" else []))
    assert again is report


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"target_modules": ["q_proj"], "target_parameters": "down_proj"}, {"down_proj"}),
        ({"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}, {"gate_up_proj"}),
        ({"target_modules": [], "target_parameters": r".*\.experts\..*_proj"}, {"gate_up_proj", "down_proj"}),
        ({"exclude_modules": ["down_proj"]}, {"gate_up_proj"}),
        ({"exclude_modules": ["experts"]}, set()),
        ({"target_modules": ["q_proj"]}, set()),
    ],
)
def test_what_is_named_is_converted(options: dict[str, Any], wanted: set[str]) -> None:
    model = mixture("mixtral")
    report = convert(model, PMSSConfig(rank=4, **options))
    assert parameters(model) == {f"model.layers.*.mlp.experts.{key}" for key in wanted}
    for key in ("gate_up_proj", "down_proj"):
        assert (f"model.layers.0.mlp.experts.{key}" in report.left_out) is (key not in wanted)


def test_ranks_are_of_parameters_and_clipped() -> None:
    model = mixture("qwen3_moe")
    report = convert(model, LoRAConfig(rank=8, rank_pattern={"down_proj": 40, r".*layers\.0\..*gate_up_proj": 2}))
    ranks = {layer.name: (layer.rank, layer.requested_rank) for layer in report.layers}
    assert ranks[f"{DOWN}.3"] == (24, 40)
    assert ranks[f"{UP}.3"] == (8, 8)
    assert ranks["model.layers.0.mlp.experts.gate_up_proj.0"] == (2, 2)
    assert "24 (asked 40)" in str(report)
    with pytest.raises(ValueError, match=r"experts of the ranks \[2, 8\].*type 'gate_up_proj'"):
        convert(mixture("qwen3_moe"), LoRAConfig(rank=8, rank_pattern={r".*gate_up_proj\.1": 2}))


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["q_proj"], r"'q_proj' is a module, not a parameter\. Name it in target_modules: type 'model\.layers\.0\.self_attn"),
        (["q_proj.weight"], r"a parameter \[32, 32\] of the Linear.*Name that in target_modules: type 'model\.layers\.0\.self"),
        (["gate_up_prj"], r"matches no parameter; closest names: .*gate_up_proj"),
        (r".*\.nothing", r"matches no parameter; closest names: .*down_proj"),
        (["input_layernorm.weight"], r"a parameter \[32\] of the .*RMSNorm.*has 1 dimension\(s\), so take it out"),
        (["embed_tokens.weight"], r"a parameter \[64, 32\] of the Embedding.*target_modules: type 'model\.embed_tokens'"),
        (["gate_up_proj_bias"], r"matches no parameter; closest names"),
    ],
)  # fmt: skip
def test_names_that_are_no_parameters_of_experts(patterns: Any, message: str) -> None:
    model = mixture("mixtral")
    with pytest.raises(ValueError, match=message):
        convert(model, PMSSConfig(rank=4, target_parameters=patterns))
    assert not adapted_layers(model)
    assert not any(isinstance(m, AdaptedExperts) for m in model.modules())


def test_a_model_without_experts_and_other_refusals() -> None:
    with pytest.raises(ValueError, match=r"the model has no fused experts\. Type a parameter"):
        convert(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(rank=2, target_parameters=["down_proj"]))
    with pytest.raises(ValueError, match=r"expert 1 of gate_up_proj cannot be trained in full"):
        dict(adapted_layers(converted()))[f"{UP}.1"].requires_grad_()
    with pytest.raises(ValueError, match=r"target_modules is empty"):
        LoRAConfig(target_modules=[])
    with pytest.raises(ValueError, match=r"match both target_modules and also_train"):
        convert(
            mixture("mixtral"), LoRAConfig(target_parameters=["down_proj"], target_modules=[], also_train=["experts"])
        )


def converted(**options: Any) -> Any:
    model = mixture("mixtral")
    convert(model, LoRAConfig(rank=4, **options))
    return train(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PMSSConfig(rank=4, coordinates="rotation"), r"no coordinates='rotation'; type coordinates='orthonormal', or"),
        (PMSSConfig(rank=4, edit="weight"), r"no edit='weight'; type edit='auto', or type exclude_modules=\['gate_up_proj'\]"),
        (PMSSConfig(rank=4, memory="keep"), r"never kept; type memory='regather'"),
        (MiSSConfig(rank=4, mini_rank=5), r"gate_up_proj\.0` has 96 outputs, which mini_rank=5 does not divide"),
    ],
)  # fmt: skip
def test_options_that_experts_do_not_have(config: Any, message: str) -> None:
    model = mixture("mixtral")
    with pytest.raises(ValueError, match=message):
        convert(
            model, config.__class__(**config.to_dict() | {"target_modules": [], "target_parameters": ["gate_up_proj"]})
        )
    assert not adapted_layers(model)


def test_codes_processes_and_the_meta_device_are_refused() -> None:
    for change, message in (
        (lambda experts: setattr(experts, "down_proj", codes(experts)), r"in codes \(float8_e4m3fn\).*exclude_modules=\['down"),
        (lambda experts: setattr(experts, "_is_expert_parallel", True), r"over several processes \(expert parallelism\)"),
    ):  # fmt: skip
        model = mixture("mixtral")
        change(experts_of(model)[0][1])
        with pytest.raises(ValueError, match=message):
            convert(model, LoRAConfig(rank=4))
        assert not adapted_layers(model)
    with pytest.raises(ValueError, match=r"is on the meta device; load its weights before it is converted"):
        convert(mixture("mixtral").to("meta"), LoRAConfig(rank=4))


def codes(experts: Any) -> nn.Parameter:
    return nn.Parameter(experts.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)


def test_shared_experts_are_refused() -> None:
    model = mixture("mixtral")
    first, second = (experts for _, experts in experts_of(model))
    second.down_proj = first.down_proj
    with pytest.raises(ValueError, match=r"is shared by .*a change to one would change both"):
        convert(model, LoRAConfig(rank=4))


@pytest.mark.parametrize("method", [LoRAConfig, PMSSConfig, BATConfig, HiRAConfig])
def test_copies_pickles_and_casts_keep_the_adapters(method: Any) -> None:
    model = mixture("gpt_oss")
    convert(model, method(rank=4))
    train(model)
    wanted = model(tokens()).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        torch.testing.assert_close(other(tokens()).logits, wanted)
        with torch.no_grad():
            for layer in adapted_layers(other).values():
                for tensor in layer.core.trained().values():
                    tensor.zero_()
        assert not torch.equal(other(tokens()).logits, wanted)
        assert conversion_of(other) is not None
    torch.testing.assert_close(model(tokens()).logits, wanted)
    model.bfloat16()
    stack = experts_of(model)[0][1].stacks()["down_proj"]
    assert {t.dtype for t in stack.core.trained().values()} == {torch.float32}
    assert torch.dist(model(tokens()).logits.float(), wanted) < 0.1 * wanted.norm()


def test_the_weight_of_a_layer_is_a_view_of_the_parameter() -> None:
    for name in ("mixtral", "gpt_oss"):
        model = mixture(name)
        convert(model, LoRAConfig(rank=4))
        layer = adapted_layers(model)[f"{UP}.2"]
        _, experts = experts_of(model)[1]
        with torch.no_grad():
            layer.weight[5, 7] = 3.0
        assert (experts.gate_up_proj[2, 7, 5] if name == "gpt_oss" else experts.gate_up_proj[2, 5, 7]) == 3
