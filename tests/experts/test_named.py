"""Several adapters of fused experts on one base: each computes what it computes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_pmss import convert, load_adapter, save_adapter
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.merging import merge, unmerge
from lightning_pmss.named import (
    add_adapter,
    combine_adapters,
    delete_adapter,
    disable_adapter,
    load_adapters,
    set_adapter,
)
from tests.experts.toys import mixture, tokens, train
from tests.methods.cases import CASES

EXPERTS = {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def saved(folder: Path, name: str, method: str, seed: int, **options: Any) -> tuple[Path, Tensor]:
    """An adapter on ``folder/base``, and the logits with it."""
    model = plain(folder / "base")
    convert(model, CASES[method](**{"rank": 4} | options))
    save_adapter(train(model, seed=seed), folder / name)
    again = plain(folder / "base")
    load_adapter(again, folder / name)
    return folder / name, again(tokens()).logits.detach()


def close(model: Any, wanted: Tensor) -> None:
    torch.testing.assert_close(model(tokens()).logits, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", list(CASES))
def test_each_computes_what_it_computes_alone(method: str, tmp_path: Path) -> None:
    """Of all layers, of the experts at another rank, and of one parameter of them."""
    mixture("gpt_oss").save_pretrained(tmp_path / "base")
    base = mixture("gpt_oss")(tokens()).logits
    made = {
        "a": saved(tmp_path, "a", method, 1),
        "b": saved(tmp_path, "b", method, 2, **EXPERTS | {"rank": 2 if "mini_rank" not in method else 4}),
        "c": saved(tmp_path, "c", method, 3, target_modules=["q_proj"], target_parameters=["down_proj"]),
    }
    model = plain(tmp_path / "base")
    load_adapters(model, {name: folder for name, (folder, _) in made.items() if name != "c"}, rank=4)
    for name in "aba":
        set_adapter(model, name)
        close(model, made[name][1])
    add_adapter(model, "c", made["c"][0])
    with pytest.raises(ValueError, match="called 'c' already"):
        add_adapter(model, "c", made["c"][0])
    for name in "cbca":
        set_adapter(model, name)
        close(model, made[name][1])
        with disable_adapter(model):
            close(model, base)
    merge(model)
    close(model, made["a"][1])
    unmerge(model)
    set_adapter(model, "b")
    delete_adapter(model, "a")
    close(model, made["b"][1])


@pytest.mark.parametrize("method", ["lora", "miss", "pmss columns=all"])
def test_training_one_leaves_the_others(method: str, tmp_path: Path) -> None:
    """Also where the ranks differ and the stacks change their shapes; the trained one is saved as it is."""
    mixture("mixtral").save_pretrained(tmp_path / "base")
    made = {"a": saved(tmp_path, "a", method, 1), "b": saved(tmp_path, "b", method, 2, rank=2)}
    model = plain(tmp_path / "base")
    load_adapters(model, {name: folder for name, (folder, _) in made.items()})
    set_adapter(model, "b")
    trained = [p for p in model.parameters() if p.requires_grad]
    before = model(tokens(), labels=tokens()).loss
    before.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in trained)
    torch.optim.SGD(trained, lr=0.001).step()
    after = model(tokens(), labels=tokens()).loss
    assert float(after) < float(before)
    logits = model(tokens()).logits.detach()
    set_adapter(model, "a")
    close(model, made["a"][1])
    set_adapter(model, "b")
    close(model, logits)
    save_adapter(model, tmp_path / "again")
    again = plain(tmp_path / "base")
    load_adapter(again, tmp_path / "again")
    close(again, logits)


@pytest.mark.parametrize("method", list(CASES))
def test_a_weighted_sum(method: str, tmp_path: Path) -> None:
    """The change of each expert is the sum of the changes."""
    mixture("qwen3_moe").save_pretrained(tmp_path / "base")
    made = {name: saved(tmp_path, name, method, seed, **EXPERTS)[0] for seed, name in enumerate("ab")}
    model = plain(tmp_path / "base")
    load_adapters(model, made, rank=8)
    changes = {}
    if method.startswith("hut"):
        with pytest.raises(ValueError, match="the sum of HUT adapters is no HUT adapter"):
            combine_adapters(model, "sum", {"a": 0.5, "b": -2.0})
        return
    combine_adapters(model, "sum", {"a": 0.5, "b": -2.0})
    for name in ("a", "b", "sum"):
        set_adapter(model, name)
        with torch.no_grad():
            changes[name] = {n: x.update().delta(x.base_weight()) for n, x in adapted_layers(model).items()}
    assert len(changes["sum"]) == 16
    for key, value in changes["sum"].items():
        wanted = 0.5 * changes["a"][key] - 2.0 * changes["b"][key]
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)
