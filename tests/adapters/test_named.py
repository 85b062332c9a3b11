"""Several adapters on one base: each computes what it computes alone, and the base is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_pmss.conversion.convert import adapted_layers, convert
from lightning_pmss.files import export_lora, load_adapter, read_adapter, save_adapter
from lightning_pmss.layers.fingerprint import fingerprint
from lightning_pmss.merging import merge, unmerge
from lightning_pmss.methods.pmss.config import PMSSConfig
from lightning_pmss.named import (
    active_adapter,
    adapter_names,
    add_adapter,
    delete_adapter,
    disable_adapter,
    load_adapters,
    set_adapter,
)

from .conftest import Save, logits

Fresh = Callable[..., Any]
Expected = Callable[[str], Tensor]


def _close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("coordinates", ["orthonormal", "rotation", "spectral", "raw"])
def test_each_computes_what_it_computes_alone(fresh: Fresh, save: Save, expected: Expected, coordinates: str) -> None:
    folders = {
        "a": save("a", coordinates=coordinates, scale=0.7),
        "b": save("b", seed=2, selection="random"),  # other indices
        "c": save("c", seed=3, rank=4),  # a smaller rank
        "d": save("d", seed=4, rank=30, target_modules=["c_fc"], coordinates="raw"),  # other layers, a larger rank: 24
        "e": save("e", seed=5, target_modules=["attn.c_proj"], scale=2.0),
    }
    model = fresh()
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    report = load_adapters(model, folders)
    assert {layer.name.rsplit(".", 2)[-2:][-1]: layer.rank for layer in report.layers} == {
        "c_attn": 6, "c_proj": 6, "c_fc": 24,
    }  # fmt: skip
    assert adapter_names(model) == list("abcde")
    for name in "abcdeadc":
        set_adapter(model, name)
        assert active_adapter(model) == name
        _close(logits(model), expected(name))
    # The base is there once, and has not moved.
    now = dict(model.named_parameters())
    assert all(now[name].data_ptr() == pointer for name, pointer in pointers.items())


def test_the_base_bit_for_bit(fresh: Fresh, save: Save) -> None:
    """In bfloat16 with biases, where a path with U = 0 would round elsewhere."""
    folder = save("a", dtype=torch.bfloat16)
    model, plain = fresh(torch.bfloat16), logits(fresh(torch.bfloat16))
    load_adapter(model, folder)
    trained = logits(model)
    assert not torch.equal(trained, plain)
    with disable_adapter(model):
        assert torch.equal(logits(model), plain)
        with disable_adapter(model):
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), trained)
    with pytest.raises(KeyError, match="inside"), disable_adapter(model):
        raise KeyError("inside")
    assert torch.equal(logits(model), trained)


def test_modules_trained_in_full_follow(fresh: Fresh, save: Save, expected: Expected) -> None:
    names = {
        "a": save("a", also_train=["ln_f"], full=1.5),
        "b": save("b", seed=2, also_train=["ln_f", "ln_1"], full=0.5),
    }
    names["c"] = save("c", seed=3)
    model, plain = fresh(), logits(fresh())
    load_adapters(model, names)
    for name in "abcba":
        set_adapter(model, name)
        _close(logits(model), expected(name))
        with disable_adapter(model):
            assert torch.equal(logits(model), plain)
        _close(logits(model), expected(name))
    alone = fresh()
    load_adapter(alone, names["a"])
    with (
        pytest.raises(ValueError, match=r"`transformer.ln_f` were trained in full.*load_adapters"),
        disable_adapter(alone),
    ):
        pass


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_inside_disable_adapter_are_of_the_trained_modules(
    fresh: Fresh, save: Save, expected: Expected, assign: bool
) -> None:
    names = {"a": save("a", also_train=["ln_f"], full=1.5), "b": save("b", seed=2, also_train=["ln_f"], full=0.5)}
    model, plain, other = fresh(), logits(fresh()), fresh()
    load_adapters(model, names)
    load_adapters(other, names)
    set_adapter(other, "b")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with disable_adapter(model):
        found = model.state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(v, state[k]) for k, v in found.items())
        assert torch.equal(logits(model), plain)
        with disable_adapter(model):
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), plain)
        model.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=assign)
        assert torch.equal(logits(model), plain)
    _close(logits(model), expected("b"))


def test_training_one_leaves_the_others(fresh: Fresh, save: Save, expected: Expected) -> None:
    model = fresh()
    load_adapters(model, {"a": save("a"), "b": save("b", seed=2, rank=4, also_train=["ln_f"])})
    ids = torch.arange(1, 21).reshape(2, 10)
    set_adapter(model, "b")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    trained = logits(model)
    assert (trained - expected("b")).abs().max() > 1e-3
    set_adapter(model, "a")
    _close(logits(model), expected("a"))
    set_adapter(model, "b")
    assert torch.equal(logits(model), trained)


@pytest.mark.parametrize("edit", ["auto", "input"])
def test_hot_swap_compiles_nothing_again(fresh: Fresh, save: Save, expected: Expected, edit: str) -> None:
    folders = {
        "a": save("a", edit=edit),
        "b": save("b", seed=2, selection="random"),
        "c": save("c", seed=3, rank=4, target_modules=["c_fc", "c_attn"]),
    }
    model = fresh()
    load_adapters(model, folders)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    logits(compiled)
    first = counter.frame_count
    assert first > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in "bcabc":
            set_adapter(compiled, name)
            _close(logits(compiled), expected(name))
        add_adapter(model, "d", save("d", seed=4))
        set_adapter(model, "d")
        _close(logits(compiled), expected("d"))
    assert counter.frame_count == first


def test_add_and_delete(fresh: Fresh, save: Save, expected: Expected) -> None:
    model = fresh()
    load_adapters(model, {"a": save("a")}, rank=10)
    assert {len(layer.rows) for layer in adapted_layers(model).values()} == {10}
    add_adapter(model, "b", save("b", seed=2, rank=9, selection="random"))
    _close(logits(model), expected("a"))
    set_adapter(model, "b")
    _close(logits(model), expected("b"))
    delete_adapter(model, "a")
    assert adapter_names(model) == ["b"]
    for act, message in (
        (lambda: delete_adapter(model, "b"), "'b' is the active adapter; call set_adapter"),
        (lambda: set_adapter(model, "a"), "no adapter is called 'a'; there are `b`"),
        (lambda: add_adapter(model, "b", save("e")), "an adapter is called 'b' already"),
        (lambda: add_adapter(model, "w", save("w", rank=12)), "has a larger rank than .* Or give rank=12 there"),
        (lambda: add_adapter(model, "f", save("f", also_train=["ln_f"])), "trained in full, which no adapter here has"),
    ):
        with pytest.raises(ValueError, match=message):
            act()
    narrow = fresh()
    load_adapters(narrow, {"a": save("g", target_modules=["c_fc"])})
    with pytest.raises(ValueError, match="has layers that are not converted: .*Load all adapters at once"):
        add_adapter(narrow, "h", save("h"))


def test_other_bases_are_refused_before_anything_is_touched(fresh: Fresh, save: Save) -> None:
    first, second = save("a"), save("b", seed=2, selection="random")
    model = fresh()
    layer = model.transformer.h[1].mlp.c_fc
    places = {name: read_adapter(f).modules["transformer.h.1.mlp.c_fc"] for name, f in (("a", first), ("b", second))}
    # The changed weight lies in b's skeleton only.
    row = next(int(r) for r in places["b"].update.rows if r not in places["a"].update.rows)
    col = next(c for c in range(24) if c not in places["a"].update.cols)
    layer.weight.data[col, row] *= 1.01  # Conv1D: stored [in, out]
    with pytest.raises(ValueError, match=r"b belongs to another base: the weights of transformer.h.1.mlp.c_fc in"):
        load_adapters(model, {"a": first, "b": second})
    assert not adapted_layers(model)
    load_adapters(model, {"a": first})
    with pytest.raises(ValueError, match=r"b belongs to another base: the weights of transformer.h.1.mlp.c_fc in"):
        add_adapter(model, "b", second)
    assert adapter_names(model) == ["a"]


def test_what_can_be_done_with_the_active_one(fresh: Fresh, save: Save, expected: Expected, tmp_path: Path) -> None:
    """Merge, save, export, copy: all see the active adapter and no other."""
    model = fresh()
    load_adapters(model, {"a": save("a", rank=8), "b": save("b", seed=2, rank=5, selection="random")})
    for name in "ba":
        for layer in adapted_layers(model).values():  # as a checkpoint leaves it behind: of the adapter before
            layer.fingerprint = fingerprint(*layer.slices())
        set_adapter(model, name)
        save_adapter(model, tmp_path / f"again-{name}")
        export_lora(model, tmp_path / f"lora-{name}", progress=False)
        alone = fresh()
        load_adapter(alone, tmp_path / f"again-{name}")
        _close(logits(alone), expected(name))
        twin = copy.deepcopy(model)
        set_adapter(twin, "a")
        _close(logits(twin), expected("a"))
        _close(logits(model), expected(name))
        merge(model)
        _close(logits(model), expected(name))
        for act in (lambda: set_adapter(model, "a"), lambda: disable_adapter(model).__enter__()):
            with pytest.raises(ValueError, match=r"the model is merged: unmerge\(model\) first"):
                act()
        unmerge(model)


def test_refusals(fresh: Fresh, save: Save) -> None:
    folder = save("a")
    model = fresh()
    for act, message in (
        (lambda: load_adapters(model, {}), "no adapters given"),
        (lambda: load_adapters(model, {"a": folder}, rank=0), "rank=0 is not a rank"),
        (lambda: set_adapter(model, "a"), "has no named adapters: load_adapters"),
        (lambda: disable_adapter(model).__enter__(), "no converted layer, so there is no adapter to disable"),
    ):
        with pytest.raises(ValueError, match=message):
            act()
    convert(model, PMSSConfig(rank=4))
    with pytest.raises(ValueError, match="converted already: add_adapter"):
        load_adapters(model, {"a": folder})
    named = fresh()
    load_adapters(named, {"a": folder})
    with disable_adapter(named), pytest.raises(ValueError, match="leave the block first"):
        set_adapter(named, "a")
