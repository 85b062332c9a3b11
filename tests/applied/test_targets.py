"""Which convolutions and embeddings are converted, and what is said where one is not fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_pmss import BATConfig, CURLoRAConfig, LoRAConfig, MiSSConfig, PMSSConfig, convert
from lightning_pmss.conversion.convert import adapted_layers
from tests.applied.toys import net


def converted(model: nn.Module, **options: Any) -> list[str]:
    return [layer.name for layer in convert(model, LoRAConfig(rank=4, **options)).layers]


def test_all_linear_has_none_of_them_and_says_how_to_have_them() -> None:
    model = nn.Sequential(nn.Embedding(99, 8), nn.Conv1d(8, 8, 3), nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match=r"To convert convolutions and embeddings, name them in target_modules"):
        report = convert(model, LoRAConfig(rank=4))
    assert [layer.name for layer in report.layers] == ["2", "3"]
    assert report.left_out["0.weight"] == "embedding"
    assert report.left_out["1.weight"] == "3-dimensional parameter of Conv1d"


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        ("along", ["along"]),
        (["embed", "head"], ["embed", "head"]),
        (".*", ["embed", "along", "image", "head"]),
        (r"(along|image)", ["along", "image"]),
    ],
)
def test_what_is_named_is_converted(targets: Any, wanted: list[str]) -> None:
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert converted(model, target_modules=targets) == wanted
        assert converted(net(), target_modules=".*", exclude_modules=["embed"]) == ["along", "image", "head"]
    assert all(not layer.weight.requires_grad for layer in adapted_layers(model).values())


def test_an_expression_leaves_out_what_cannot_be_converted() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    report = convert(model, LoRAConfig(rank=4, target_modules=".*"))
    assert [layer.name for layer in report.layers] == ["1"]
    assert report.left_out["0"] == "has groups=8, so that no one matrix is applied to its patches"


def test_ranks_are_clipped_and_figures_are_of_places() -> None:
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.Conv2d(6, 16, 3), nn.Embedding(23, 8))
    report = convert(model, LoRAConfig(rank=40, target_modules=["0", "1", "2"], rank_pattern={"1": 5}))
    ranks = {layer.name: (layer.shape, layer.rank, layer.requested_rank) for layer in report.layers}
    assert ranks == {"0": ((8, 54), 8, 40), "1": ((16, 54), 5, 5), "2": ((8, 23), 8, 40)}
    assert "8 (asked 40)" in str(report)
    # Of each place: the channels of the input, which autograd keeps once, and r numbers; of an id r numbers.
    assert [layer.kept_bytes_per_token for layer in report.layers] == [4 * (6 + 8), 4 * (6 + 5), 4 * 8]


class Scaled(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Standardised(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight, self.bias)


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "groups": (lambda: nn.Conv2d(8, 8, 3, groups=4), LoRAConfig, r"`0` \(Conv2d\) has groups=4.*also_train=\['0'\]"),
    "depthwise": (lambda: nn.Conv1d(8, 8, 3, groups=8), PMSSConfig, r"`0` \(Conv1d\) has groups=8.*exclude_modules"),
    "transposed": (lambda: nn.ConvTranspose2d(8, 8, 3), LoRAConfig, r"is a ConvTranspose2d.*nn\.Conv2d, nn\.Conv3d"),
    "bag": (lambda: nn.EmbeddingBag(8, 8), LoRAConfig, r"is a EmbeddingBag.*nn\.Embedding"),
    "lazy": (lambda: nn.LazyConv2d(8, 3), LoRAConfig, r"is a LazyConv2d"),
    "a forward of its own": (lambda: Scaled(8, 8), LoRAConfig, r"has a forward of its own, in which Scaled may do more"),
    "a weight of its own": (lambda: Standardised(3, 8, 3), PMSSConfig, r"has a forward of its own, in which Standardised"),
    "max_norm": (lambda: nn.Embedding(8, 8, max_norm=1.0), LoRAConfig, r"has max_norm=1, which changes the frozen weight"),
    "frequencies": (lambda: nn.Embedding(8, 8, scale_grad_by_freq=True), PMSSConfig, r"has scale_grad_by_freq=True"),
    "parametrised": (lambda: weight_norm(nn.Conv2d(3, 8, 3)), LoRAConfig, r"its weight is computed by a parametrisation"),
    "whole numbers": (
        lambda: nn.Embedding.from_pretrained(torch.ones(8, 8, dtype=torch.int64)), LoRAConfig, "floating-point matrix",
    ),
    "LoRA's dropout on ids": (
        lambda: nn.Embedding(8, 8), lambda **k: LoRAConfig(dropout=0.1, **k), r"an embedding, whose input are ids.*dropout=0",
    ),
    "MiSS's dropout on ids": (
        lambda: nn.Embedding(8, 8), lambda **k: MiSSConfig(dropout=0.1, **k), r"an embedding, whose input are ids.*dropout=0",
    ),
    "BAT on ids": (lambda: nn.Embedding(8, 8), BATConfig, r"is an embedding, of which BAT would mix.*such as MiSS or HiRA"),
    "row BAT on ids": (lambda: nn.Embedding(8, 8), lambda **k: BATConfig(form="row", **k), r"of which BAT would mix"),
    "input edit": (lambda: nn.Conv2d(3, 8, 3), lambda **k: PMSSConfig(edit="input", **k), r"no edit='input'; type edit='auto'"),
    "weight edit": (lambda: nn.Embedding(8, 8), lambda **k: PMSSConfig(edit="weight", **k), r"has no edit='weight'"),
    "kept columns": (
        lambda: nn.Conv2d(3, 8, 3), lambda **k: CURLoRAConfig(memory="keep", **k), r"never kept; type memory='regather'",
    ),
    "mini_rank": (lambda: nn.Conv2d(3, 9, 3), lambda **k: MiSSConfig(mini_rank=4, **k), r"9 outputs, which mini_rank=4"),
    "the meta device": (lambda: nn.Conv2d(3, 8, 3, device="meta"), PMSSConfig, r"`0` .*meta device"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_converted_is_refused_before_any_change(case: str) -> None:
    make, config, message = REFUSED[case]
    model = nn.Sequential(make(), nn.Linear(8, 8))
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        convert(model, config(rank=2, target_modules=["0", "1"]))
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters() if p.is_floating_point() and not p.is_meta)


def test_an_embedding_tied_to_the_head_is_refused() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes, tie_word_embeddings=True))
    for kind in (LoRAConfig, PMSSConfig):
        with pytest.raises(ValueError, match=r"`model.embed_tokens` shares its weight with `lm_head`.*exclude it"):
            convert(model, kind(rank=4, target_modules=["embed_tokens", "q_proj"]))


def test_a_parameter_of_a_convolution_is_answered_by_its_module() -> None:
    with pytest.raises(ValueError, match=r"'along.weight' is no module but a parameter.*type 'along'"):
        convert(net(), LoRAConfig(target_modules=["along.weight"]))
    with pytest.raises(ValueError, match=r"target_parameters.*`along`.*target_modules: type 'along'"):
        convert(net(), LoRAConfig(target_modules=[], target_parameters=["along.weight"]))
    with pytest.raises(ValueError, match=r"closest names: along"):
        convert(net(), LoRAConfig(target_modules=["alogn"]))
