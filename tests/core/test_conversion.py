"""Which layers are converted, what is refused before anything is touched, and what the report says."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from lightning_pmss import PMSSConfig, PMSSLinear, convert
from lightning_pmss.conversion.convert import adapted_layers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.q_proj = nn.Linear(16, 16)
        self.v_proj = nn.Linear(16, 16)
        self.up = nn.Linear(16, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.v_proj(torch.tanh(self.q_proj(self.norm(x)))) + self.up(x)[..., :16]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def converted(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, PMSSLinear)}


def unchanged(model: nn.Module) -> bool:
    return not converted(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {},
            {"blocks.0.q_proj", "blocks.0.v_proj", "blocks.0.up", "blocks.1.q_proj", "blocks.1.v_proj", "blocks.1.up"},
        ),
        ({"target_modules": ["q_proj", "1.up"]}, {"blocks.0.q_proj", "blocks.1.q_proj", "blocks.1.up"}),
        (
            {"target_modules": r".*\.(q|v)_proj", "exclude_modules": ["blocks.0"]},
            {"blocks.1.q_proj", "blocks.1.v_proj"},
        ),
        ({"target_modules": ["head"]}, {"head"}),
        ({"exclude_modules": r".*proj"}, {"blocks.0.up", "blocks.1.up"}),
        ({"target_modules": "q_proj"}, {"blocks.0.q_proj", "blocks.1.q_proj"}),
        ({"target_modules": "1.up"}, {"blocks.1.up"}),
        ({"target_modules": "blocks.0.up"}, {"blocks.0.up"}),
        ({"target_modules": "head"}, {"head"}),
        ({"target_modules": ["q_proj", "up"], "exclude_modules": "up"}, {"blocks.0.q_proj", "blocks.1.q_proj"}),
        ({"target_modules": "blocks.0.*proj"}, {"blocks.0.q_proj", "blocks.0.v_proj"}),
    ],
)
def test_targets(options: dict[str, Any], expected: set[str]) -> None:
    model = Net()
    report = convert(model, PMSSConfig(rank=4, **options))
    assert converted(model) == expected
    assert {layer.name for layer in report.layers} == expected
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.core.weight" for name in expected}


def test_all_linear_says_what_it_leaves_out() -> None:
    report = convert(Net(), PMSSConfig(rank=4, exclude_modules=["0.up"]))
    assert report.left_out == {"head": "output head", "blocks.0.up": "excluded", "embed.weight": "embedding"}
    assert "left out (output head): head" in str(report)
    assert "also_train" in str(report)


def test_also_train_unfreezes_and_is_reported() -> None:
    model = Net()
    report = convert(model, PMSSConfig(rank=4, also_train=["head"]))
    assert model.head.weight.requires_grad
    assert model.head.bias.requires_grad
    assert not model.embed.weight.requires_grad
    assert report.also_train == ["head"]
    assert report.left_out["head"] == "trained in full"
    assert report.trainable == 6 * 16 + 16 * 3 + 3
    assert report.also_train_bytes == 4 * (16 * 3 + 3)


def test_rank_pattern_and_clip() -> None:
    model = Net()
    report = convert(model, PMSSConfig(rank=64, rank_pattern={"q_proj": 3, r"blocks\.1\.up": 5}))
    ranks = {layer.name: layer.rank for layer in report.layers}
    assert ranks == {
        "blocks.0.q_proj": 3,
        "blocks.1.q_proj": 3,
        "blocks.1.up": 5,
        "blocks.0.v_proj": 16,
        "blocks.1.v_proj": 16,
        "blocks.0.up": 16,
    }
    assert "16 (asked 64)" in str(report)


def test_report_figures_are_those_of_the_model() -> None:
    model = Net()
    total = sum(p.numel() for p in model.parameters())
    report = convert(model, PMSSConfig(rank=4))
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad) == 6 * 16
    assert report.total == total + report.trainable
    assert report.share == pytest.approx(96 / (total + 96))
    assert report.adapter_bytes == 6 * (16 * 4 + 2 * 4 * 4)
    assert report.kept_bytes_per_token == 6 * 4 * 4
    assert [layer.edit for layer in report.layers] == ["input", "input", "input"] * 2
    first = report.layers[0]
    weight, cols = model.blocks[0].q_proj.weight.detach(), model.blocks[0].q_proj.cols
    c = weight[:, cols]
    expected = (weight - c @ torch.linalg.pinv(c) @ weight).norm() / weight.norm()
    assert first.residual == pytest.approx(float(expected), rel=1e-4)
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["name"] == "blocks.0.q_proj"


def test_a_lone_name_is_a_list_of_one_everywhere() -> None:
    net, ranks = Net(), {"q_proj": 2}
    reports = [
        convert(
            deepcopy(net), PMSSConfig(rank=4, target_modules=a, exclude_modules=b, also_train=c, rank_pattern=ranks)
        )
        for a, b, c in (("q_proj", "blocks.1", "head"), (["q_proj"], ["blocks.1"], ["head"]))
    ]
    assert reports[0].layers == reports[1].layers
    assert [(layer.name, layer.rank) for layer in reports[0].layers] == [("blocks.0.q_proj", 2)]
    assert reports[0].left_out == reports[1].left_out
    assert reports[0].also_train == ["head"]


def test_a_name_takes_all_modules_that_end_in_it() -> None:
    """Also where one of them is called so in full, which a regular expression would match alone."""
    model = nn.ModuleDict({"up": nn.Linear(16, 16), "block": nn.ModuleDict({"up": nn.Linear(16, 16)})})
    convert(model, PMSSConfig(rank=4, target_modules="up"))
    assert converted(model) == {"up", "block.up"}


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["q_proj", "v_prj"]}, r"'v_prj' matches no module; closest names: v_proj"),
    ({"target_modules": r".*\.qq_proj"}, r"matches no module; closest names: .*q_proj"),
    ({"target_modules": "("}, "is not a regular expression .* nor the name of a module"),
    ({"target_modules": "norm"}, "is a LayerNorm whose weight cannot be read"),
    ({"target_modules": "q_prj"}, "'q_prj' matches no module; closest names: q_proj"),
    ({"target_modules": "q_proj,v_proj"}, r"matches no module; for several names type \[q_proj, v_proj\]"),
    ({"target_modules": "q_proj v_proj"}, r"for several names type \[q_proj, v_proj\]"),
    ({"target_modules": [r".*q_proj"]}, "a list contains names; type a regular expression alone, not in a list"),
    ({"target_modules": ["all-linear"]}, "type all-linear alone, not in a list"),
    ({"also_train": "haed"}, "also_train: 'haed' matches no module; closest names: head"),
    ({"target_modules": ["norm"]}, "is a LayerNorm whose weight cannot be read"),
    ({"target_modules": r".*norm"}, "matches only LayerNorm"),
    ({"exclude_modules": ["qproj"]}, "exclude_modules: 'qproj' matches no module; closest names: q_proj"),
    ({"also_train": ["haed"]}, "also_train: 'haed' matches no module; closest names: head"),
    ({"rank_pattern": {"k_proj": 2}}, "rank_pattern: 'k_proj' matches no module"),
    ({"target_modules": ["head"], "also_train": ["head"]}, "match both target_modules and also_train"),
    ({"target_modules": ["up"], "exclude_modules": ["up"]}, "every layer that target_modules matches is left out"),
]


@pytest.mark.parametrize(("options", "message"), REFUSALS)
def test_refusals_touch_nothing(options: dict[str, Any], message: str) -> None:
    model = Net()
    with pytest.raises(ValueError, match=message):
        convert(model, PMSSConfig(rank=4, **options))
    assert unchanged(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0 is not a rank; type a whole number of at least 1"),
        ({"rank": 8.5}, "rank=8.5 is not a rank"),
        ({"rank": True}, "rank=True is not a rank"),
        ({"rank_pattern": {"q_proj": -1}}, r"rank_pattern\['q_proj'\]=-1"),
        ({"selection": "qr"}, "selection='qr' is not known; choose one of"),
        ({"row_mode": "both"}, "row_mode='both' is not known"),
        ({"coordinates": "polar"}, "coordinates='polar' is not known"),
        ({"edit": "both"}, "edit='both' is not known"),
        ({"memory": "none"}, "memory='none' is not known"),
        ({"dropout": 1.0}, "must lie in"),
        ({"scale": 0.0}, "must be finite and not zero"),
        ({"scale": float("nan")}, "must be finite"),
        ({"scale": "automatic"}, "type 'auto' or a number"),
        ({"oversample": -1}, "oversample=-1"),
        ({"target_modules": []}, "target_modules is empty"),
    ],
)
def test_config_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PMSSConfig(**options)


def test_bad_weights_are_named_and_nothing_is_half_converted() -> None:
    for value, message in ((float("nan"), "NaN or infinite"), (0.0, "all zeros")):
        model = Net()
        with torch.no_grad():
            model.blocks[1].up.weight.fill_(value)  # the last target: all others were planned before
        with pytest.raises(ValueError, match=rf"`blocks\.1\.up`.*{message}"):
            convert(model, PMSSConfig(rank=4))
        assert unchanged(model)


def test_rank_deficient_weight_names_the_rank_that_fits() -> None:
    model = Net()
    with torch.no_grad():
        model.blocks[0].up.weight.copy_(torch.randn(40, 3) @ torch.randn(3, 16))
    with pytest.raises(ValueError, match=r"`blocks\.0\.up`.*rank_pattern=\{'blocks\.0\.up': 3\}"):
        convert(model, PMSSConfig(rank=8))
    assert unchanged(model)
    convert(model, PMSSConfig(rank=8, rank_pattern={"blocks.0.up": 3}))


def test_converting_twice() -> None:
    model = Net()
    report = convert(model, PMSSConfig(rank=4))
    with torch.no_grad():
        model.blocks[0].up.core.weight.normal_()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert convert(model, PMSSConfig(rank=4)) is report
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match=r"already converted with another config \(differs in rank, scale\)"):
        convert(model, PMSSConfig(rank=5, scale=2.0))


def test_tied_weights_are_refused_and_left_out() -> None:
    model = Net()
    model.blocks[1].q_proj.weight = model.blocks[0].q_proj.weight
    with pytest.raises(ValueError, match=r"`blocks\.0\.q_proj` shares its weight with `blocks\.1\.q_proj`"):
        convert(model, PMSSConfig(rank=4))
    assert unchanged(model)


def test_meta_weights_need_a_skeleton() -> None:
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ValueError, match=r"on the meta device: its rows and columns cannot be chosen"):
        convert(model, PMSSConfig(rank=4))


def test_skeleton_file_replaces_the_selection(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    chosen = Net()
    convert(chosen, PMSSConfig(rank=4, selection="random", seed=7))
    file = tmp_path / "skeleton.safetensors"
    save_file(
        {f"{n}.{k}": getattr(x, k).int() for n, x in adapted_layers(chosen).items() for k in ("rows", "cols")}, file
    )
    model = Net()
    convert(model, PMSSConfig(rank=4, skeleton_file=str(file)))
    for name, layer in adapted_layers(model).items():
        assert torch.equal(layer.cols, adapted_layers(chosen)[name].cols)
        assert torch.equal(layer.rows, adapted_layers(chosen)[name].rows)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        convert(Net(), PMSSConfig(rank=4, skeleton_file=str(tmp_path / "none")))
    with pytest.raises(ValueError, match=r"no rows and columns for `head`"):
        convert(Net(), PMSSConfig(rank=4, target_modules=["head"], skeleton_file=str(file)))


def test_hugging_face_names_do_not_depend_on_the_wrapper(tiny_llama: str) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    wrapped = nn.ModuleDict({"inner": AutoModelForCausalLM.from_pretrained(tiny_llama), "extra": nn.Linear(4, 4)})
    names = {layer.name for layer in convert(plain, PMSSConfig(rank=4)).layers}
    report = convert(wrapped, PMSSConfig(rank=4))
    assert {layer.name for layer in report.layers} == names
    assert "model.layers.0.self_attn.q_proj" in names
    assert len(names) == 14
    assert report.left_out == {"lm_head": "shares the embedding's weight", "extra": "output head"}
    assert wrapped["inner"].training == plain.training


def test_gpt2_conv1d() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50, n_positions=16))
    model.eval()
    ids = torch.arange(8)[None]
    before = model(ids).logits
    report = convert(model, PMSSConfig(rank=4))
    assert {layer.name.rsplit(".", 2)[-2:][1] for layer in report.layers} == {"c_attn", "c_proj", "c_fc"}
    assert {layer.shape for layer in report.layers} == {(96, 32), (32, 32), (128, 32), (32, 128)}
    assert torch.allclose(model(ids).logits, before, atol=1e-5)


def test_fresh_classification_head_of_a_hugging_face_model(tiny_llama: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=3)
    report = convert(model, PMSSConfig(rank=4, also_train=["score"]))
    assert model.score.weight.requires_grad
    assert report.also_train == ["score"]
    assert report.left_out["score"] == "trained in full"


def test_quantised_and_lazy_layers_are_refused() -> None:
    class Packed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)

    for layer in (Packed(), nn.LazyLinear(4)):
        with pytest.raises(ValueError, match=f"`0` is a {type(layer).__name__} whose weight cannot be read"):
            convert(nn.Sequential(layer), PMSSConfig(rank=2))


def test_no_linear_layer_says_where_to_build_it() -> None:
    with pytest.raises(ValueError, match=r"no linear layer was found in Conv2d.*configure_model"):
        convert(nn.Conv2d(1, 1, 1), PMSSConfig(rank=2))


def test_scale_auto_falls_with_the_rank_of_each_layer() -> None:
    """One learning rate for all ranks: Adam's steps on V make an update that grows with the rank."""
    model = nn.Sequential(nn.Linear(96, 128), nn.Linear(128, 20))
    convert(model, PMSSConfig(rank=80, rank_pattern={"1": 40}))
    assert [layer.scale for layer in adapted_layers(model).values()] == [64 / 80, 64 / 20]  # of the rank after clipping
    fixed = nn.Sequential(nn.Linear(96, 128), nn.Linear(128, 20))
    convert(fixed, PMSSConfig(rank=80, scale=0.5))
    assert [layer.scale for layer in adapted_layers(fixed).values()] == [0.5, 0.5]
