"""Merging in memory: equal outputs, the way back bit for bit, refusals that change nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import KINDS, dense_weight, pmss_layer, random_like, relative, train, update
from torch import Tensor, nn

from lightning_pmss.conversion.convert import adapted_layers, convert
from lightning_pmss.files import save_adapter
from lightning_pmss.merging import merge, merged, merged_state_dict, unmerge
from lightning_pmss.methods.pmss.config import PMSSConfig
from lightning_pmss.methods.pmss.layer import PMSSLinear

BF16 = torch.bfloat16


def _model(dtype: torch.dtype = torch.float64, kind: str = "linear", **options: Any) -> nn.Sequential:
    first = pmss_layer(kind, 14, 10, 4, dtype=dtype, edit="input", seed=1, **options)
    second = pmss_layer(kind, 8, 14, 4, dtype=dtype, edit="output", seed=2, **options)
    return nn.Sequential(first, nn.GELU(), second)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """What the model computes with, and what its state dict holds."""
    live = {f"live {name}": p for name, p in model.named_parameters()}
    return {k: t.detach().clone() for k, t in (model.state_dict() | live).items()}


def _same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    now = _state(model)
    return now.keys() == state.keys() and all(_bits(now[k], t) for k, t in state.items())


def _bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit: also the sign of a zero and the payload of a NaN."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (BF16, 0.01), (torch.float16, 2e-3)]
)
def test_merged_model_gives_the_same_output(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    model = _model(dtype, kind)
    x = random_like(30, 10, dtype=dtype)
    state, expected = _state(model), model(x)
    with torch.no_grad():
        bare = copy.deepcopy(model)
        for layer in adapted_layers(bare).values():
            layer.core.weight.zero_()
        assert relative(bare(x), expected) > 0.1
    report = merge(model)
    assert all(layer.merged for layer in adapted_layers(model).values())
    assert relative(model(x), expected) < tolerance
    assert set(report.layers) == {"0", "2"}
    unmerge(model)
    assert _same(model, state)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weight_is_the_dense_one(kind: str) -> None:
    layer = pmss_layer(kind, 12, 10, scale=0.5)
    expected = dense_weight(layer, layer.core.weight.detach())
    weight, _ = layer.merged_weight()
    assert weight.shape == layer.weight.shape
    assert weight.is_contiguous()
    assert relative(weight.T if kind == "conv1d" else weight, expected) < 1e-14


def test_a_thousand_cycles_leave_every_bit() -> None:
    model = _model(BF16)
    with torch.no_grad():
        model[0].weight[0, :3] = torch.tensor([0.0, -0.0, 1e-40])  # type: ignore[index, operator]
    state = _state(model)
    optimizer_step = random_like(4, 4, dtype=torch.float32)
    for i in range(1000):
        merge(model)
        if i in (0, 999):
            assert not _same(model, state)
        unmerge(model)
    assert _same(model, state)
    # and U may move between the cycles
    before = model[2].weight.detach().clone()
    for _ in range(20):
        model[2].core.weight.data.add_(optimizer_step)  # type: ignore[union-attr, operator]
        merge(model)
        unmerge(model)
    assert _bits(model[2].weight.detach(), before)  # type: ignore[operator, arg-type]


def test_merged_block_restores_also_after_an_exception() -> None:
    model = _model()
    state = _state(model)
    with merged(model) as report:
        assert len(report.layers) == 2
        assert not _same(model, state)
    assert _same(model, state)
    with pytest.raises(KeyError, match="from within"), merged(model):
        raise KeyError("from within")
    assert _same(model, state)
    assert not any(layer.merged for layer in adapted_layers(model).values())


def test_refusals() -> None:
    model = _model()
    state = _state(model)
    with pytest.raises(ValueError, match="the model is not merged, so there is nothing to unmerge"):
        unmerge(model)
    merge(model)
    with pytest.raises(ValueError, match="`0` is merged already; .*`unmerge` first"):
        merge(model)
    with pytest.raises(ValueError, match="is merged already"), merged(model):
        pass
    unmerge(model)
    assert _same(model, state)
    for act in (merge, unmerge, merged_state_dict):
        with pytest.raises(ValueError, match="Linear has no converted layer; `convert` or `load_adapter` comes first"):
            act(nn.Linear(3, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 2])
def test_a_diverged_update_is_refused_and_nothing_changes(value: float, place: int) -> None:
    model = _model(torch.float32, coordinates="raw")
    model[place].core.weight.data[1, 2] = value  # type: ignore[union-attr, operator, index]
    state = _state(model)
    with pytest.raises(ValueError, match=f"`{place}`: U holds NaN or infinite values"):
        merge(model)
    assert _same(model, state)
    assert not any(layer.merged for layer in adapted_layers(model).values())
    with pytest.raises(ValueError, match=f"`{place}`: the merged weight is not finite"):
        merged_state_dict(model)


def test_overflow_of_a_narrow_dtype_is_refused_and_restored() -> None:
    model = _model(torch.float16)
    model[2].core.weight.data.mul_(1e6)  # type: ignore[union-attr, operator]
    state = _state(model)
    with pytest.raises(ValueError, match="`2`: the merged weight is not finite .*torch.float16"):
        merge(model)
    assert _same(model, state)
    assert not any(layer.merged for layer in adapted_layers(model).values()), "the first layer was merged before"


def test_any_failure_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory, or an interrupt from the keyboard, in the second layer."""
    model = _model()
    state, real = _state(model), PMSSLinear.merged_weight
    for error in (RuntimeError, KeyboardInterrupt):

        def fail(layer: PMSSLinear, name: str = "", error: type[BaseException] = error) -> Any:
            if name == "2":
                raise error("stop")
            return real(layer, name)

        monkeypatch.setattr(PMSSLinear, "merged_weight", fail)
        with pytest.raises(error, match="stop"):
            merge(model)
        assert _same(model, state)
        assert not any(layer.merged for layer in adapted_layers(model).values())


def test_everything_reads_the_pristine_weight_while_merged(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": _model(torch.float32)})
    convert_free = adapted_layers(model)

    def read() -> dict[str, Tensor]:
        found = {}
        for name, layer in convert_free.items():
            found |= {
                f"{name}.update": layer.core_update().detach().clone(),
                f"{name}.rows": layer.weight_rows().clone(),
                f"{name}.columns": layer.weight_columns().clone(),
                f"{name}.base": layer.base_weight().clone(),
                f"{name}.merged": layer.merged_weight()[0],
            }
        return found | {f"state.{k}": t.clone() for k, t in merged_state_dict(model).items()}

    before = read()
    with merged(model):
        during = read()
        frames = [layer.core.frame.left.clone() for layer in convert_free.values() if layer.core.frame.left is not None]
        for layer in convert_free.values():
            layer.rederive()
        assert all(
            torch.equal(f, layer.core.frame.left)  # type: ignore[arg-type]
            for f, layer in zip(frames, convert_free.values(), strict=True)
        )
    assert before.keys() == during.keys()
    assert all(torch.equal(before[k], during[k]) for k in before)


def test_an_adapter_saved_while_merged_is_the_same(tiny_llama: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    convert(model, PMSSConfig(rank=4))
    for i, layer in enumerate(adapted_layers(model).values()):
        train(layer, seed=i)
    save_adapter(model, tmp_path / "before")
    with merged(model):
        save_adapter(model, tmp_path / "merged")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "merged")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    configs = [(tmp_path / name / "adapter_config.json").read_text() for name in ("before", "merged")]
    assert configs[0] == configs[1]


def test_merging_under_autocast_is_not_rounded() -> None:
    model = _model(torch.float32)
    expected = {k: t.clone() for k, t in merged_state_dict(model).items()}
    with torch.autocast("cpu", BF16):
        found = merged_state_dict(model)
    assert all(torch.equal(expected[k], found[k]) for k in expected)


@pytest.mark.parametrize("size", [0.003, 0.3])
def test_drift_of_bfloat16_is_one_rounding(size: float) -> None:
    layer = pmss_layer(out=40, inp=30, rank=8, dtype=BF16, size=size)
    exact = layer.base_weight().float() + update(layer).float()
    report = merge(nn.ModuleDict({"a": layer}))
    drift = report.layers["a"]
    half_ulp = torch.finfo(BF16).eps / 2 * 2.0 ** exact.abs().log2().floor()
    assert bool(((layer.weight.detach().float() - exact).abs() <= half_ulp + 1e-7).all())  # 1e-7: of float32's sum
    assert 0 < drift.max_error <= float(half_ulp.max()) + 1e-7
    error = layer.weight.detach().float() - exact
    assert drift.relative_error == pytest.approx(float(error.norm() / exact.norm()), rel=1e-3)
    assert drift.lost_update == pytest.approx(float(error.norm() / update(layer).norm()), rel=1e-3)
    assert report.max_error == drift.max_error
    # half of a small update is lost in one merge: why training never works on a merged weight
    assert (drift.lost_update > 0.3) == (size == 0.003)
    assert "1 layers merged" in str(report)
    assert report.to_dict()["layers"]["a"]["max_error"] == drift.max_error


def test_merge_of_an_untrained_update_changes_nothing() -> None:
    model = _model(BF16, size=0.0)
    state = _state(model)
    report = merge(model)
    assert (report.max_error, report.relative_error, report.lost_update) == (0, 0, 0)
    unmerge(model)
    assert _same(model, state)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=24, n_layer=2, n_head=2))
    for p in model.parameters():  # biases that are not zero
        p.data.add_(0.02 * torch.randn_like(p))
    return model.eval()


def _llama(folder: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model


@pytest.mark.parametrize("which", ["llama", "gpt2"])
def test_merged_state_dict_loads_into_a_plain_model(which: str, tiny_llama: str) -> None:
    model, fresh = (_llama(tiny_llama) if which == "llama" else _gpt2() for _ in range(2))
    keys = list(model.state_dict())
    convert(model, PMSSConfig(rank=6))
    for i, layer in enumerate(adapted_layers(model).values()):
        train(layer, seed=i)
    state = _state(model)
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, bare = model(ids).logits, fresh(ids).logits
    assert relative(bare, expected) > 0.05, "the update must matter"

    found = merged_state_dict(model)
    assert sorted(found) == sorted(keys)
    head, embedding = ("lm_head.weight", "model.embed_tokens.weight" if which == "llama" else "transformer.wte.weight")
    assert found[head].data_ptr() == found[embedding].data_ptr(), "a tied head stays tied"
    assert _same(model, state), "the model itself must not change"
    fresh.load_state_dict(found, strict=True)
    with torch.no_grad():
        assert relative(fresh(ids).logits, expected) < 1e-5
    with merged(model), torch.no_grad():
        assert torch.equal(model(ids).logits, fresh(ids).logits)


def test_keys_that_look_like_the_adapters_stay() -> None:
    layer = pmss_layer()
    layer.register_buffer("rows_of_another", torch.zeros(2))
    model = nn.ModuleDict({"a": layer, "rows": nn.Linear(2, 2), "core": nn.Linear(2, 2)})
    names = {"a.weight", "a.bias", "a.rows_of_another", "rows.weight", "rows.bias", "core.weight", "core.bias"}
    assert set(merged_state_dict(model)) == names
