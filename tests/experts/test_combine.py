"""``combine`` with adapters of fused experts: each expert's update is combined by itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_pmss import convert, load_adapter, save_adapter
from lightning_pmss.cli.tools import run_tool
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.files import merge_files
from lightning_pmss.methods.method import Factors
from lightning_pmss.named import combine_files
from lightning_pmss.named.rules import RULES, Rule
from tests.experts.toys import mixture, tokens, train
from tests.methods.cases import CASES

WEIGHTS = [0.5, -1.5]
OPTIONS: dict[str, dict[str, Any]] = {
    "lego": {"rank": 5},
    "svd": {"rank": 5},
    "cat": {},
    "linear": {},
    **{rule: {"density": 0.5} for rule in ("ties", "dare_linear", "dare_ties", "magnitude_prune")},
}
EXPERTS = {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def adapters(name: str, folder: Path, methods: Sequence[str], *options: dict[str, Any]) -> list[Path]:
    """A base and trained adapters on it, each with its options."""
    mixture(name).save_pretrained(folder / "base")
    found = []
    for i, (method, own) in enumerate(zip(methods, options, strict=True)):
        model = plain(folder / "base")
        convert(model, CASES[method](**{"rank": 4} | own))
        save_adapter(train(model, seed=i + 1), folder / f"{i}")
        found.append(folder / f"{i}")
    return found


def deltas(base: Path, folder: Path) -> dict[str, Tensor]:
    """W' - W of each layer, float64."""
    model = plain(base)
    load_adapter(model, folder)
    found = {}
    with torch.no_grad():
        for name, layer in adapted_layers(model).items():
            found[name] = layer.update().delta(layer.weight.double(), dtype=torch.float64)
    return found


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek"])
def test_the_sum_of_several_methods_is_exact_in_each_expert(name: str, tmp_path: Path) -> None:
    """One adapter has all layers, one the experts alone, and one attention and one parameter of the experts."""
    some = {"target_modules": ["o_proj"], "target_parameters": ["down_proj"]}
    folders = adapters(name, tmp_path, ["pmss", "lora", "miss"], {}, {"rank": 3} | EXPERTS, some)
    weights = [0.5, -1.0, 2.0]
    base, total = tmp_path / "base", tmp_path / "sum"
    report = combine_files(base, folders, total, rule="cat", weights=weights, progress=False)
    parts, found = [deltas(base, folder) for folder in folders], deltas(base, total)
    assert found.keys() == parts[0].keys() == set(report.ranks)
    for key, value in found.items():
        wanted = sum(w * part[key] for w, part in zip(weights, parts, strict=True) if key in part)
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5, msg=key)
    ranks = {report.ranks[f"model.layers.1.mlp.experts.{key}"] for key in ("gate_up_proj.2", "down_proj.0")}
    assert ranks == {4 + 3, 4 + 3 + 4}
    model = plain(base)
    load_adapter(model, total)
    wanted = model(tokens()).logits
    merge_files(base, total, tmp_path / "merged", progress=False)
    torch.testing.assert_close(plain(tmp_path / "merged")(tokens()).logits, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_combines_each_expert_by_itself(rule: str, tmp_path: Path) -> None:
    """The dense change of each expert is that of the rule on this expert's own factors, or their cut by numpy's SVD."""
    folders = adapters("qwen3_moe", tmp_path, ["lora", "lora"], EXPERTS, EXPERTS)
    base, total = tmp_path / "base", tmp_path / "both"
    report = combine_files(base, folders, total, rule=rule, weights=WEIGHTS, progress=False, **OPTIONS[rule])
    found, parts = deltas(base, total), [load_file(folder / "adapter_model.safetensors") for folder in folders]
    assert len(found) == 2 * 2 * 4
    dense = [deltas(base, folder) for folder in folders]
    for key, value in found.items():
        own = [Factors(part[f"{key}.A"].double(), part[f"{key}.B"].double()) for part in parts]
        for factors, change in zip(own, dense, strict=True):
            torch.testing.assert_close(factors.b @ factors.a, change[key], rtol=1e-5, atol=1e-6)
        exact = sum(w * change[key] for w, change in zip(WEIGHTS, dense, strict=True))
        if rule == "svd":
            left, singular, right = torch.linalg.svd(exact, full_matrices=False)
            wanted = left[:, :5] * singular[:5] @ right[:5]
        elif rule == "cat":
            wanted = exact
        elif rule == "linear":
            roots = [(abs(w) ** 0.5, (1 if w > 0 else -1) * abs(w) ** 0.5) for w in WEIGHTS]
            a = sum(sign * f.a for (_, sign), f in zip(roots, own, strict=True))
            b = sum(root * f.b for (root, _), f in zip(roots, own, strict=True))
            wanted = b @ a
        else:
            alone = Rule(rule, **OPTIONS[rule]).combined(list(zip(WEIGHTS, own, strict=True)), key)
            wanted = alone.b @ alone.a
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5, msg=key)
        assert float(value.norm()) > 0
    assert report.sources[0].layers == 16
    whole, first = (torch.cat([x[n].flatten() for n in found]) for x in (found, dense[0]))
    assert report.sources[0].cosine == pytest.approx(float(torch.cosine_similarity(whole, first, 0)), abs=1e-4)


def test_ties_is_what_peft_makes_of_one_expert(tmp_path: Path) -> None:
    """Two linear layers with an expert's weights and factors, combined by peft's own `add_weighted_adapter`."""
    peft = pytest.importorskip("peft")
    folders = adapters("mixtral", tmp_path, ["lora", "lora"], EXPERTS, EXPERTS)
    combine_files(
        tmp_path / "base", folders, tmp_path / "ties", rule="ties", weights=[1, 0.5], density=0.5, progress=False
    )
    found, parts = (
        deltas(tmp_path / "base", tmp_path / "ties"),
        [load_file(f / "adapter_model.safetensors") for f in folders],
    )
    key = "model.layers.1.mlp.experts.gate_up_proj.2"
    out, inp = found[key].shape
    options = {"r": 4, "lora_alpha": 4, "target_modules": ["0"]}
    model = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(inp, out, bias=False)), peft.LoraConfig(**options), "a"
    )
    model.add_adapter("b", peft.LoraConfig(**options))
    layer = model.base_model.model[0]
    with torch.no_grad():
        for name, part in zip("ab", parts, strict=True):
            layer.lora_A[name].weight.copy_(part[f"{key}.A"])
            layer.lora_B[name].weight.copy_(part[f"{key}.B"])
    model.add_weighted_adapter(["a", "b"], [1, 0.5], "c", combination_type="ties", density=0.5)
    torch.testing.assert_close(found[key], layer.get_delta_weight("c").double(), rtol=1e-4, atol=1e-5)


def test_updates_that_are_no_lora_are_cut_by_svd(tmp_path: Path) -> None:
    folders = adapters("gpt_oss", tmp_path, ["hira", "bat"], EXPERTS, EXPERTS)
    base = tmp_path / "base"
    with pytest.raises(ValueError, match=r"update of .*experts.* is no product of two thin matrices"):
        combine_files(base, folders, tmp_path / "no", rule="cat", progress=False)
    assert not (tmp_path / "no").exists()
    combine_files(base, folders, tmp_path / "cut", rule="svd", rank=6, progress=False)
    parts, found = [deltas(base, folder) for folder in folders], deltas(base, tmp_path / "cut")
    for key, value in found.items():
        left, singular, right = torch.linalg.svd(parts[0][key] + parts[1][key], full_matrices=False)
        torch.testing.assert_close(value, left[:, :6] * singular[:6] @ right[:6], rtol=1e-3, atol=1e-4)


def test_the_command_and_training_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = adapters("mixtral", tmp_path, ["lora", "pmss"], {}, {})
    argv = [
        "--base",
        tmp_path / "base",
        "--adapters",
        *folders,
        "--rule",
        "lego",
        "--rank",
        6,
        "--output",
        tmp_path / "out",
    ]
    run_tool("combine", *[str(item) for item in argv])
    assert "layers, by lego" in capsys.readouterr().out
    model = plain(tmp_path / "base")
    report = load_adapter(model, tmp_path / "out")
    assert {layer.rank for layer in report.layers} == {6}
    before = copy.deepcopy({n: p for n, p in model.named_parameters() if p.requires_grad})
    loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert float(model(tokens(), labels=tokens()).loss) < float(loss)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if p.requires_grad)


def test_experts_that_no_token_reached_do_not_lose_their_rank(tmp_path: Path) -> None:
    """`lego` drops units that are zero; experts of one parameter are stacked, and rank 0 is no rank."""
    mixture("qwen3_moe").save_pretrained(tmp_path / "base")
    idle, never = "model.layers.1.mlp.experts.down_proj.2", "model.layers.0.self_attn.q_proj"
    folders = []
    for i in range(2):
        model = plain(tmp_path / "base")
        convert(model, CASES["lora"](rank=4))
        train(model, seed=i + 1)
        with torch.no_grad():
            for name in (idle, never):
                adapted_layers(model)[name].core.trained()["B"].zero_()
        save_adapter(model, tmp_path / f"{i}")
        folders.append(tmp_path / f"{i}")
    report = combine_files(tmp_path / "base", folders, tmp_path / "out", rule="lego", rank=6, progress=False)
    assert (report.ranks[idle], report.ranks[never]) == (6, 1)
    found = deltas(tmp_path / "base", tmp_path / "out")
    assert not found[idle].any()
    assert not found[never].any()
    model = plain(tmp_path / "base")
    load_adapter(model, tmp_path / "out")
    model(tokens(4, 40), labels=tokens(4, 40)).loss.backward()
    for name in (idle, never):
        assert adapted_layers(model)[name].core.gradients()["B"].any(), name
