"""The exported LoRA, loaded by peft itself onto the untouched base, computes what the PMSS model computes."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.files import export_files, export_lora, load_adapter, merge_files, save_adapter
from lightning_pmss.merging import merge, merged_state_dict, unmerge
from lightning_pmss.methods.lora import lora_pair
from lightning_pmss.methods.pmss.method import PMSSUpdate

peft = pytest.importorskip("peft")
Train = Callable[..., Any]


def _base(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    bert = "Bert" in (folder / "config.json").read_text()
    kind = AutoModelForSequenceClassification if bert else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=dtype).eval()


def _logits(model: nn.Module) -> Tensor:
    ids = torch.arange(1, 21).reshape(2, 10)
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=ids).logits
    return logits.float()


def _in_peft(base: nn.Module, folder: Path) -> Any:
    """peft's model; what it warns about (missing or foreign keys, patterns that match nothing) is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        return peft.PeftModel.from_pretrained(base, str(folder))


OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {"rank": 20, "scale": 1.7, "also_train": ["lm_head"], "size": 0.3},  # k_proj and v_proj: clipped to 16
    "gpt2": {"rank": 20, "scale": 0.4, "rank_pattern": {"c_fc": 24, r".*\.1\.attn\.c_proj": 5}},
    "bert": {"rank": 12, "scale": 3.0, "rank_pattern": {"intermediate.dense": 20}, "also_train": ["classifier"]},
}


def _trained(bases: dict[str, Path], name: str, train: Train, dtype: torch.dtype = torch.float32) -> Any:
    model = train(_base(bases[name], dtype), **OPTIONS[name])
    for module in OPTIONS[name].get("also_train", ()):
        model.get_submodule(module).weight.data.mul_(1.3)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_peft_computes_the_same(
    bases: dict[str, Path], tmp_path: Path, train: Train, name: str, dtype: torch.dtype
) -> None:
    model = _trained(bases, name, train, dtype)
    report = export_lora(model, tmp_path / "lora", progress=False)
    plain, expected = _logits(_base(bases[name], dtype)), _logits(model)
    lora = _in_peft(_base(bases[name], dtype), tmp_path / "lora")
    scale = expected.abs().max()
    # bfloat16: PMSS and LoRA round in different places; against the float32 sum of the same bfloat16 base both are as far.
    limit = 2e-5 if dtype == torch.float32 else 0.05
    difference = (_logits(lora) - expected).abs().max() / scale
    print(f"{name} {dtype}: {difference:.3g} of the largest logit; effect {(expected - plain).abs().max() / scale:.3g}")
    assert difference < limit
    assert (expected - plain).abs().max() > 0.1 * scale
    assert len({layer.rank for layer in report.layers}) > 1
    assert set(lora.peft_config["default"].rank_pattern) == set(lora.peft_config["default"].alpha_pattern)
    for layer in lora.modules():
        if hasattr(layer, "lora_A"):
            assert set(layer.scaling.values()) == {1.0}


@pytest.mark.parametrize("name", OPTIONS)
def test_bfloat16_is_within_rounding_of_the_exact_logits(
    bases: dict[str, Path], tmp_path: Path, train: Train, name: str
) -> None:
    """Against a float32 model with the same bfloat16 numbers, peft's error is no larger than PMSS's own."""
    model = _trained(bases, name, train, torch.bfloat16)
    save_adapter(model, tmp_path / "adapter")
    export_lora(model, tmp_path / "lora", progress=False)
    exact = _base(bases[name], torch.bfloat16).float()
    load_adapter(exact, tmp_path / "adapter")
    lora = _in_peft(_base(bases[name], torch.bfloat16), tmp_path / "lora")
    ours, theirs = ((_logits(m) - _logits(exact)).norm() / _logits(exact).norm() for m in (model, lora))
    print(f"{name}: PMSS {ours:.3g}, LoRA {theirs:.3g}")
    assert theirs < 2 * ours + 2**-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_peft_merges_to_the_same_weights(
    bases: dict[str, Path], tmp_path: Path, train: Train, name: str, dtype: torch.dtype
) -> None:
    model = _trained(bases, name, train, dtype)
    export_lora(model, tmp_path / "lora", progress=False)
    merged = _in_peft(_base(bases[name], dtype), tmp_path / "lora").merge_and_unload().state_dict()
    ours = merged_state_dict(model)
    assert set(ours) == set(merged)
    for key, value in ours.items():
        assert value.dtype == merged[key].dtype == dtype or not value.is_floating_point()
        # float32 sums in another order: at most one unit in the last place of bfloat16.
        rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (2**-7, 1e-6)
        torch.testing.assert_close(merged[key], value, rtol=rtol, atol=atol, msg=key)
        if dtype == torch.bfloat16:
            assert (merged[key] == value).float().mean() > 0.99, key


@pytest.mark.parametrize("name", OPTIONS)
def test_config_and_keys_are_those_that_peft_writes(
    bases: dict[str, Path], tmp_path: Path, train: Train, name: str
) -> None:
    model = _trained(bases, name, train)
    export_lora(model, tmp_path / "lora", progress=False)
    lora = _in_peft(_base(bases[name]), tmp_path / "lora")
    lora.save_pretrained(tmp_path / "again")

    def text(folder: str) -> str:
        """With the sets, whose order peft leaves to chance, sorted; it also adds its heads at each load."""
        content = (tmp_path / folder / "adapter_config.json").read_text()
        config = json.loads(content)
        assert json.dumps(config, indent=2, sort_keys=True) == content
        for key in ("target_modules", "modules_to_save"):
            config[key] = sorted(set(config[key]) - ({"score"} if name == "bert" else set())) if config[key] else None
        return json.dumps(config, indent=2)

    assert text("lora") == text("again")
    first, second = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("lora", "again"))
    assert set(first) == set(second)
    assert all(first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", OPTIONS)
def test_from_files_equals_from_the_model(bases: dict[str, Path], tmp_path: Path, train: Train, name: str) -> None:
    model = _trained(bases, name, train)
    save_adapter(model, tmp_path / "adapter")
    export_lora(model, tmp_path / "live", progress=False)
    merge(model)
    export_lora(model, tmp_path / "merged", progress=False)
    unmerge(model)
    told: list[str] = []
    export_files(bases[name], tmp_path / "adapter", tmp_path / "files", progress=False, announce=told.append)
    for folder in ("merged", "files"):
        for file in ("adapter_config.json", "README.md", "export_report.json"):
            assert (tmp_path / folder / file).read_text() == (tmp_path / "live" / file).read_text(), file
        one, other = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("live", folder))
        for key, value in one.items():
            torch.testing.assert_close(other[key], value, rtol=1e-6, atol=1e-9)
    size = (tmp_path / "files" / "adapter_model.safetensors").stat().st_size
    report = json.loads((tmp_path / "files" / "export_report.json").read_text())
    assert report["bytes"] < size < report["bytes"] + 10_000
    assert f"{report['bytes'] / 1000:.3g} KB in float32" in told[0]


def test_full_rank_of_a_badly_conditioned_square(bases: dict[str, Path], tmp_path: Path, train: Train) -> None:
    """U then has large entries that cancel: the factors are formed in float64, so the LoRA is nearer to the truth than PMSS."""
    model = train(_base(bases["bert"]), rank=33)
    exact = train(_base(bases["bert"], torch.float64), rank=33)
    assert {len(layer.rows) for layer in adapted_layers(model).values()} == {32}
    for one, other in zip(adapted_layers(exact).values(), adapted_layers(model).values(), strict=True):
        one.set_update(other.update())
        assert torch.equal(one.rows, other.rows)
    export_lora(model, tmp_path / "lora", progress=False)
    lora = _in_peft(_base(bases["bert"]), tmp_path / "lora")
    ours, theirs = ((_logits(m) - _logits(exact)).norm() / _logits(exact).norm() for m in (model, lora))
    print(f"PMSS {ours:.3g}, LoRA {theirs:.3g}")
    assert theirs < min(ours, 1e-5)


def test_lora_a_is_a_copy_of_the_base(bases: dict[str, Path], tmp_path: Path, train: Train) -> None:
    model = _trained(bases, "llama", train)
    export_lora(model, tmp_path / "lora", progress=False)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, layer in adapted_layers(model).items():
        assert torch.equal(tensors[f"base_model.model.{name}.lora_A.weight"], layer.weight[layer.rows])


def test_a_narrow_dtype_halves_the_file(bases: dict[str, Path], tmp_path: Path, train: Train) -> None:
    model = _trained(bases, "gpt2", train)
    wide = export_lora(model, tmp_path / "wide", progress=False)
    narrow = export_lora(model, tmp_path / "narrow", dtype="bfloat16", progress=False)
    assert narrow.bytes * 2 == wide.bytes
    difference = _logits(_in_peft(_base(bases["gpt2"]), tmp_path / "narrow")) - _logits(model)
    assert difference.abs().max() < 0.02 * _logits(model).abs().max()


def test_cut_to_a_smaller_rank(bases: dict[str, Path], tmp_path: Path, train: Train) -> None:
    model = _trained(bases, "llama", train)
    export_lora(model, tmp_path / "exact", progress=False)
    report = export_lora(model, tmp_path / "cut", rank=8, progress=False)
    exact, cut = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("exact", "cut"))
    assert set(report.errors) == set(adapted_layers(model))
    for name, error in report.errors.items():
        keys = [f"base_model.model.{name}.lora_{side}.weight" for side in "BA"]
        full, less = (t[keys[0]].double() @ t[keys[1]].double() for t in (exact, cut))
        singular = torch.linalg.svdvals(full)
        best = (singular[8:].norm() / singular.norm()).item()
        assert error == pytest.approx(best, rel=1e-5)  # Eckart and Young: nothing of rank 8 is nearer
        assert ((full - less).norm() / full.norm()).item() == pytest.approx(best, rel=1e-5)
        assert 0.1 < best < 1
        assert f"{name}" in str(report)
    config = json.loads((tmp_path / "cut" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 8, {})
    assert _in_peft(_base(bases["llama"]), tmp_path / "cut")
    # A rank that no layer exceeds changes nothing.
    assert export_lora(model, tmp_path / "same", rank=20, progress=False).errors == {}
    same = load_file(tmp_path / "same" / "adapter_model.safetensors")
    assert all(torch.equal(same[key], exact[key]) for key in exact)


def test_an_untrained_adapter_exports_to_zero(bases: dict[str, Path], tmp_path: Path, train: Train) -> None:
    model = train(_base(bases["llama"]), size=0.0)
    for layer in adapted_layers(model).values():
        layer.core.weight.data.zero_()
    report = export_lora(model, tmp_path / "lora", rank=4, progress=False)
    assert set(report.errors.values()) == {0.0}
    assert torch.equal(_logits(_in_peft(_base(bases["llama"]), tmp_path / "lora")), _logits(_base(bases["llama"])))


@pytest.mark.parametrize(("rows", "columns"), [(5, 7), (7, 5), (6, 6)])
def test_pair_of_unequal_sides(rows: int, columns: int) -> None:
    torch.manual_seed(0)
    update, r = torch.randn(columns, rows), torch.randn(rows, 11)
    weight = torch.randn(9, 11)
    where = torch.arange(rows), torch.arange(columns)
    weight[where[0]] = r
    c = weight[:, where[1]]
    factors = PMSSUpdate(update, *where).factors(weight, torch.float64)
    a, b, error = lora_pair(factors)
    assert (len(a), b.shape[1], error) == (min(rows, columns), min(rows, columns), None)
    torch.testing.assert_close(b @ a, c.double() @ update.double() @ r.double())


def test_rectangular_update_in_float64(tmp_path: Path, train: Train) -> None:
    """A plain module, not of transformers, with a float64 base."""
    base = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    model = train(base, rank=6)
    export_lora(model, tmp_path / "lora", progress=False)
    again = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    again.load_state_dict(state)
    x = torch.randn(5, 8, dtype=torch.float64)
    lora = peft.PeftModel.from_pretrained(again, str(tmp_path / "lora"))
    torch.testing.assert_close(lora(x), model(x), rtol=1e-12, atol=1e-12)


def test_tied_embedding_trained_in_full(tiny_llama: str, tmp_path: Path, train: Train) -> None:
    """Both uses of the tied weight were trained; peft unties what it copies, so it gets both."""
    model = train(_base(Path(tiny_llama)), also_train=["lm_head"])
    model.lm_head.weight.data.mul_(1.5)
    report = export_lora(model, tmp_path / "lora", progress=False)
    assert report.modules_to_save == ["lm_head", "model.embed_tokens"]
    lora = peft.PeftModel.from_pretrained(_base(Path(tiny_llama)), str(tmp_path / "lora"))
    torch.testing.assert_close(_logits(lora), _logits(model), rtol=1e-4, atol=1e-5)


def test_tied_embedding_from_files(tiny_llama: str, tmp_path: Path, train: Train) -> None:
    model = train(_base(Path(tiny_llama)), also_train=["lm_head"])
    model.lm_head.weight.data.mul_(1.5)
    save_adapter(model, tmp_path / "adapter")
    report = export_files(tiny_llama, tmp_path / "adapter", tmp_path / "lora", progress=False)
    assert report.modules_to_save == ["lm_head", "model.embed_tokens"]
    assert "vLLM takes no adapter with modules trained in full" in str(report)
    lora = peft.PeftModel.from_pretrained(_base(Path(tiny_llama)), str(tmp_path / "lora"))
    torch.testing.assert_close(_logits(lora), _logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stored", ["with prefix", "without prefix"])
@pytest.mark.parametrize("trained", ["whole", "body"])
def test_checkpoints_under_other_names(
    bases: dict[str, Path], tmp_path: Path, train: Train, stored: str, trained: str
) -> None:
    """GPT-2's checkpoints come with and without ``transformer.``; the LoRA's names are those of the model that was trained."""
    whole = _base(bases["gpt2"])
    base = tmp_path / "base"
    whole.save_pretrained(base)
    if stored == "without prefix":
        state = {k.removeprefix("transformer."): v.clone() for k, v in load_file(base / "model.safetensors").items()}
        save_file(state, base / "model.safetensors", {"format": "pt"})
    model = train(
        whole if trained == "whole" else whole.transformer, rank=20, target_modules=["c_attn", "0.mlp.c_proj"]
    )
    save_adapter(model, tmp_path / "adapter")
    export_files(base, tmp_path / "adapter", tmp_path / "lora", progress=False)
    again = _base(base)
    lora = _in_peft(again if trained == "whole" else again.transformer, tmp_path / "lora")
    adapted = lora if trained == "whole" else again
    torch.testing.assert_close(_logits(adapted), _logits(whole), rtol=1e-4, atol=1e-5)
    # Only one of the layers called c_proj is meant: its full name, not the ending.
    name = f"{'transformer.' if trained == 'whole' else ''}h.0.mlp.c_proj"
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(["c_attn", name])
    assert config["task_type"] == ("CAUSAL_LM" if trained == "whole" else None)


def test_float16(bases: dict[str, Path], tmp_path: Path, train: Train) -> None:
    model = train(_base(bases["gpt2"], torch.float16), rank=8)
    export_lora(model, tmp_path / "lora", progress=False)
    lora = _in_peft(_base(bases["gpt2"], torch.float16), tmp_path / "lora")
    assert (_logits(lora) - _logits(model)).abs().max() < 0.005 * _logits(model).abs().max()


def test_inside_a_lightning_module(bases: dict[str, Path], tmp_path: Path, train: Train) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = _base(bases["llama"])

    model = train(Wrapper())
    export_lora(model, tmp_path / "lora", progress=False)
    lora = _in_peft(_base(bases["llama"]), tmp_path / "lora")
    torch.testing.assert_close(_logits(lora), _logits(model.inner), rtol=1e-4, atol=1e-5)


def test_from_a_base_in_shards_and_bfloat16(
    tiny_llama: str, sharded_llama: str, tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streamed: trained in float32, exported from bfloat16 shards, of which only the adapter's layers are read."""
    from lightning_pmss.store.shards import ShardReader

    model = train(_base(Path(sharded_llama), torch.bfloat16), target_modules=["q_proj", "down_proj"])
    save_adapter(model, tmp_path / "adapter")
    read: set[str] = set()
    original = ShardReader.read
    monkeypatch.setattr(ShardReader, "read", lambda self, key: (read.add(key), original(self, key))[1])
    export_files(sharded_llama, tmp_path / "adapter", tmp_path / "lora", progress=False)
    assert read == {f"{name}.weight" for name in adapted_layers(model)}
    lora = _in_peft(_base(Path(sharded_llama), torch.bfloat16), tmp_path / "lora")
    merged = merge_files(sharded_llama, tmp_path / "adapter", tmp_path / "merged", progress=False)
    plain = _base(Path(merged.output), torch.bfloat16).state_dict()
    for key, value in lora.merge_and_unload().state_dict().items():
        torch.testing.assert_close(value, plain[key], rtol=2**-7, atol=1e-6)


def test_model_card(bases: dict[str, Path], tmp_path: Path, train: Train) -> None:
    model = train(_base(bases["gpt2"]), rank=20)
    model.config._name_or_path = "org/name"
    export_lora(model, tmp_path / "lora", progress=False)
    card = (tmp_path / "lora" / "README.md").read_text()
    assert card.startswith("---\nbase_model: org/name\nlibrary_name: peft\npipeline_tag: text-generation\n")
    assert "vllm serve org/name --enable-lora --max-lora-rank 32 " in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    source = code[1].replace("org/name", str(bases["gpt2"])).replace("THIS_FOLDER", str(tmp_path / "lora"))
    names: dict[str, Any] = {}
    exec(source, names)  # noqa: S102 - the card's own code has to run
    torch.testing.assert_close(_logits(names["model"]), _logits(model), rtol=1e-4, atol=1e-5)
