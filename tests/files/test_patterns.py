"""Patterns of a downloaded file are never run: the names of its layers are in it. One that somebody types has an end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_pmss.conversion import expression
from lightning_pmss.conversion.convert import adapted_layers, conversion_of, convert
from lightning_pmss.files import export_files, load_adapter, merge_files, read_adapter, save_adapter
from lightning_pmss.inspect.inspection import inspect_adapter
from lightning_pmss.methods.pmss.config import PMSSConfig
from lightning_pmss.named.named import add_adapter, load_adapters, set_adapter

# Python's own `re` needs more than a lifetime for each of these on a module's name; the last matches everything.
HANGING = ("(.*|.*x)*(.*)*!", "((a|aa|.)+)+!", "(|a+)+!", ".*")


def _base(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def no_expressions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever compiles or matches one fails."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an expression of a file was run")

    for name in ("compile", "fullmatch", "match", "search"):
        monkeypatch.setattr(expression.regex, name, refuse)


def _with_patterns(adapter: Path, pattern: str) -> None:
    file = adapter / "adapter_config.json"
    about = json.loads(file.read_text())
    about["config"] |= {
        "target_modules": pattern,
        "exclude_modules": pattern,
        "also_train": pattern,
        "rank_pattern": {pattern: 3},
    }
    file.write_text(json.dumps(about))


@pytest.mark.parametrize("pattern", HANGING)
@pytest.mark.usefixtures("no_expressions")
def test_a_file_s_patterns_are_not_run(
    pattern: str, tiny_llama: str, tmp_path: Path, train: Callable[..., nn.Module], logits: Callable[..., torch.Tensor]
) -> None:
    trained = train(_base(tiny_llama), target_modules=["q_proj", "up_proj"], also_train=["norm"])
    with torch.no_grad():
        trained.model.norm.weight.mul_(1.25)
    expected = logits(trained)
    adapter = save_adapter(trained, tmp_path / "adapter")
    _with_patterns(adapter, pattern)

    model = _base(tiny_llama)
    report = load_adapter(model, adapter)
    assert {name.rsplit(".", 1)[-1] for name in adapted_layers(model)} == {"q_proj", "up_proj"}
    assert report.also_train == ["model.norm"]
    torch.testing.assert_close(logits(model), expected)
    load_adapter(model, adapter)  # onto a converted one
    assert conversion_of(model) is report
    save_adapter(model, tmp_path / "again")
    assert set(read_adapter(tmp_path / "again").modules) == set(adapted_layers(model))

    several = _base(tiny_llama)
    load_adapters(several, {"first": adapter})
    add_adapter(several, "second", adapter)
    set_adapter(several, "second")
    torch.testing.assert_close(logits(several), expected)

    merge_files(tiny_llama, adapter, tmp_path / "merged", progress=False)
    torch.testing.assert_close(logits(_base(str(tmp_path / "merged"))), expected)
    assert len(export_files(tiny_llama, adapter, tmp_path / "lora", progress=False).layers) == 4
    assert len(inspect_adapter(adapter, tiny_llama).layers) == 4


def _deep() -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 8))


class Named(nn.Module):
    """A layer whose name the slow expressions below cannot divide soon."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("a" * 60 + "b", nn.Linear(8, 8))
        self.add_module("c", nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", "(a|aa)+$"),
        ("exclude_modules", "(a|aa)+$"),
        ("also_train", "(a|aa)+$"),
        ("rank_pattern", {"(a|aa)+$": 3}),
    ],
)
def test_a_slow_expression_of_the_user_is_refused_by_name(
    field: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expression, "PATIENCE", 0.2)
    model = Named()
    with pytest.raises(
        ValueError, match=rf"{field}='\(a\|aa\)\+\$' has not answered for `a+b` within .*type a list of names"
    ):
        convert(model, PMSSConfig(**{"rank": 4, field: value}))
    assert not adapted_layers(model)


def test_all_names_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand names that each take nearly all of it would take as long as one that hangs."""
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(expression.time, "perf_counter", lambda: next(clock))
    slow = expression.Expression("a+", "target_modules")
    assert [slow.matches("a") for _ in range(3)] == [True] * 3
    assert slow.left == expression.PATIENCE - 2 * 3


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (r"0\.\d", ["0.0"]),
        ("(0.)?[01]", ["0.0", "1"]),
        ("^(?:1|0\\.0)$", ["0.0", "1"]),
        ("(?i:1)", ["1"]),
        (".*", ["0.0", "1"]),
    ],
)
def test_expressions_mean_what_they_meant(pattern: str, found: list[str]) -> None:
    model = _deep()
    convert(model, PMSSConfig(rank=4, target_modules=pattern))
    assert list(adapted_layers(model)) == found


@pytest.mark.parametrize("pattern", ["(", "a{2,1}", "*", "[z-a]", "(" * 5000])
def test_what_is_no_expression(pattern: str) -> None:
    for options in ({"target_modules": pattern}, {"rank_pattern": {pattern: 3}}):
        with pytest.raises(ValueError, match="is not a regular expression"):
            convert(_deep(), PMSSConfig(rank=4, **options))  # type: ignore[arg-type]


def test_of_several_patterns_for_ranks_the_first_match_counts() -> None:
    model = _deep()
    convert(model, PMSSConfig(rank=4, rank_pattern={"0.0": 2, ".*": 3}))
    assert {name: len(layer.rows) for name, layer in adapted_layers(model).items()} == {"0.0": 2, "1": 3}
