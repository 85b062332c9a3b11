"""A model whose submodules were converted separately before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightning_pmss import PMSSConfig, PMSSLinear, convert, export_lora, load_adapter, merge, save_adapter, unmerge
from lightning_pmss.conversion.convert import adapted_layers, conversion_of
from lightning_pmss.files import write_merged
from lightning_pmss.files.skeleton_file import save_skeleton
from lightning_pmss.layers.adapted import AdaptedLinear
from lightning_pmss.named import disable_adapter, load_adapters

CONFIG = PMSSConfig(rank=4)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = body(), body()

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(x)))


def body() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)).double()


def train(model: nn.Module) -> None:
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.core.weight)


def dense(layer: PMSSLinear) -> Tensor:
    w = layer.base_weight()
    return w + w[:, layer.cols] @ layer.core_update() @ w[layer.rows]


X = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a_part_and_then_the_whole_converts_the_rest_and_keeps_what_was_learned(tmp_path: Path) -> None:
    model = Whole()
    part = convert(model.encoder, CONFIG)
    train(model.encoder)
    learned = model.encoder[0].core.weight.clone()
    report = convert(model, CONFIG)
    assert report is not part
    assert [layer.name for layer in report.layers] == ["encoder.0", "encoder.2", "decoder.0", "decoder.2"]
    assert torch.equal(model.encoder[0].core.weight, learned)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{layer.name}.core.weight" for layer in report.layers}
    assert report.trainable == 4 * 16
    assert conversion_of(model) is report
    assert conversion_of(model.encoder) is None
    assert convert(model, CONFIG) is report

    train(model)
    plain = Whole()
    with torch.no_grad():
        for name, layer in adapted_layers(model).items():
            plain.get_submodule(name).weight.copy_(dense(layer))
        expected = model(X)
        torch.testing.assert_close(plain(X), expected)
        save_adapter(model, tmp_path / "adapter")
        loaded = Whole()
        load_adapter(loaded, tmp_path / "adapter")
        torch.testing.assert_close(loaded(X), expected)


@pytest.mark.parametrize("order", [("encoder", "decoder"), ("decoder", "encoder")])
def test_two_parts_are_joined(order: tuple[str, str], tmp_path: Path) -> None:
    model = Whole()
    for name in order:
        convert(model.get_submodule(name), CONFIG)
    assert conversion_of(model) is None
    train(model)
    expected = model(X)
    with pytest.raises(ValueError, match=r"`encoder`, `decoder` of this Whole.*save them one by one, or call convert"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    convert(model, CONFIG)
    torch.testing.assert_close(model(X), expected)
    save_adapter(model, tmp_path / "adapter")
    loaded = Whole()
    load_adapter(loaded, tmp_path / "adapter")
    torch.testing.assert_close(loaded(X), expected)


def test_parts_can_be_saved_one_by_one(tmp_path: Path) -> None:
    model = Whole()
    for name in ("encoder", "decoder"):
        convert(model.get_submodule(name), CONFIG)
    train(model)
    loaded = Whole()
    for name in ("encoder", "decoder"):
        save_adapter(model.get_submodule(name), tmp_path / name)
        load_adapter(loaded.get_submodule(name), tmp_path / name)
    torch.testing.assert_close(loaded(X), model(X))


def test_every_way_out_asks_for_the_whole(tmp_path: Path) -> None:
    model = Whole()
    convert(model.encoder, CONFIG)
    for refused in (
        lambda: save_adapter(model, tmp_path / "a"),
        lambda: export_lora(model, tmp_path / "a"),
        lambda: save_skeleton(model, tmp_path / "a"),
        lambda: disable_adapter(model).__enter__(),
    ):
        with pytest.raises(ValueError, match=r"`encoder` of this Whole were converted separately"):
            refused()
    convert(model, CONFIG)
    with pytest.raises(ValueError, match=r"\(`0`, `2`\) belong to the conversion of a larger model: save that one"):
        save_adapter(model.encoder, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_not_loaded_around_a_converted_part(tmp_path: Path) -> None:
    model = Whole()
    convert(model, CONFIG)
    save_adapter(model, tmp_path / "adapter")
    half = Whole()
    convert(half.encoder, CONFIG)
    before = {key: value.clone() for key, value in half.state_dict().items()}
    with pytest.raises(ValueError, match="converted already"):
        load_adapter(half, tmp_path / "adapter")
    with pytest.raises(ValueError, match="converted already"):
        load_adapters(half, {"a": tmp_path / "adapter"})
    assert before.keys() == half.state_dict().keys()


CONFLICTS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"rank": 4}, {"rank": 6}, r"with another config \(differs in rank\)"),
    ({"rank": 4}, {"rank": 4, "scale": 2.0, "edit": "input"}, r"with another config \(differs in scale, edit\)"),
    ({"rank": 4}, {"rank": 4, "coordinates": "raw"}, r"with another config \(differs in coordinates\)"),
    ({"rank": 4, "target_modules": ["0"]}, {"rank": 4}, r"with another config \(differs in target_modules\)"),
]


@pytest.mark.parametrize(("first", "second", "message"), CONFLICTS)
def test_another_config_is_refused_and_nothing_is_touched(
    first: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    model = Whole()
    convert(model.encoder, PMSSConfig(**first))
    before = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match=rf"`encoder` was converted separately before, {message}.*fresh model"):
        convert(model, PMSSConfig(**second))
    assert before == {name: type(m) for name, m in model.named_modules()}
    assert conversion_of(model.encoder) is not None


def test_a_part_that_the_whole_would_leave_out_is_refused() -> None:
    model = nn.ModuleDict({"body": body(), "head": body()})
    convert(model["head"], CONFIG)
    with pytest.raises(
        ValueError, match=r"`head` was converted separately before.*now its `head\.0` would be left out \(output head\)"
    ):
        convert(model, CONFIG)
    assert not adapted_layers(model["body"])


def test_a_part_that_is_excluded_is_left_alone() -> None:
    model = Whole()
    part = convert(model.encoder, PMSSConfig(rank=6))
    train(model.encoder)
    before = model(X)
    report = convert(model, PMSSConfig(rank=4, exclude_modules=["encoder"]))
    assert [layer.name for layer in report.layers] == list(adapted_layers(model)) == ["decoder.0", "decoder.2"]
    torch.testing.assert_close(model(X), before)
    assert conversion_of(model.encoder) is part


def test_an_excluded_part_is_in_the_merged_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = Whole()
    convert(model.encoder, PMSSConfig(rank=6))
    convert(model, PMSSConfig(rank=4, exclude_modules=["encoder"]))
    for layer in (m for m in model.modules() if isinstance(m, PMSSLinear)):
        nn.init.normal_(layer.core.weight)
    write_merged(model, tmp_path / "merged")
    plain = Whole()
    plain.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    torch.testing.assert_close(plain(X), model(X))


def test_rank_pattern_that_resolves_otherwise_is_refused() -> None:
    config = PMSSConfig(rank=4, rank_pattern={"0": 2})
    model = nn.ModuleDict({"a": nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))})
    convert(model["a"], PMSSConfig(rank=4, rank_pattern={r"0\.0": 2}))
    with pytest.raises(ValueError, match="differs in rank_pattern"):
        convert(model, config)


def test_a_deep_copy_of_a_converted_part_is_joined(tmp_path: Path) -> None:
    first = body()
    convert(first, CONFIG)
    train(first)
    model = nn.Sequential(first, copy.deepcopy(first))
    expected = model(X)
    report = convert(model, CONFIG)
    assert [layer.name for layer in report.layers] == ["0.0", "0.2", "1.0", "1.2"]
    torch.testing.assert_close(model(X), expected)


def test_a_layer_out_of_another_conversion_is_refused_by_name() -> None:
    donor = body()
    convert(donor, CONFIG)
    model = nn.Sequential(donor[0], nn.Linear(24, 16).double())
    with pytest.raises(
        ValueError, match=r"`0` is converted already, but no conversion inside this Sequential includes it"
    ):
        convert(model, CONFIG)


def test_the_inside_of_a_converted_model_is_refused() -> None:
    model = Whole()
    convert(model, CONFIG)
    with pytest.raises(ValueError, match="belongs to a larger model"):
        convert(model.encoder, CONFIG)


def test_adopting_twice_is_refused() -> None:
    model = Whole()
    convert(model, CONFIG)
    layer = model.encoder[0]
    assert isinstance(layer, PMSSLinear)
    with pytest.raises(ValueError, match="converted already"):
        AdaptedLinear.adopt(layer, layer.method, 4, {}, {}, 1.0)
    assert type(layer).__mro__.count(PMSSLinear) == 1


def test_merged_parts_are_unmerged_first() -> None:
    model = Whole()
    convert(model.encoder, CONFIG)
    train(model.encoder)
    merge(model.encoder)
    with pytest.raises(ValueError, match=r"`encoder` was converted separately before.*is merged: call `unmerge`"):
        convert(model, CONFIG)
    unmerge(model.encoder)
    assert len(convert(model, CONFIG).layers) == 4


def test_converting_a_merged_model_again_changes_nothing() -> None:
    model = Whole()
    report = convert(model, CONFIG)
    train(model)
    merge(model)
    before = model(X)
    assert convert(model, CONFIG) is report
    torch.testing.assert_close(model(X), before)
    with pytest.raises(ValueError, match="differs in rank"):
        convert(model, PMSSConfig(rank=6))


@pytest.mark.parametrize("rank", [4, 6])
def test_the_body_of_a_hugging_face_model_and_then_all_of_it(rank: int, tiny_llama: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    convert(model.model, PMSSConfig(rank=4))
    if rank == 6:
        with pytest.raises(ValueError, match=r"`model` was converted separately before.*differs in rank"):
            convert(model, PMSSConfig(rank=rank))
        return
    report = convert(model, PMSSConfig(rank=rank))
    assert len(report.layers) == 14
    assert all(layer.name.startswith("model.layers.") for layer in report.layers)


def test_what_stands_beside_a_converted_hugging_face_model_is_converted_too(tiny_llama: str) -> None:
    inner = AutoModelForCausalLM.from_pretrained(tiny_llama)
    config = PMSSConfig(rank=4, target_modules=["q_proj"])
    convert(inner, config)
    model = nn.ModuleDict({"inner": inner, "beside": nn.ModuleDict({"q_proj": nn.Linear(8, 8)})})
    report = convert(model, config)
    assert {layer.name for layer in report.layers} == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "beside.q_proj",
    }
    assert convert(model, config) is report
