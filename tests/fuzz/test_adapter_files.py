"""Adapter folders, through everything that reads one."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_pmss import load_adapter
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.files import export_files, merge_files
from lightning_pmss.inspect.inspection import inspect_adapter
from lightning_pmss.named import add_adapter, load_adapters
from tests.files.edits import CONFIG, WEIGHTS, edit_config, seal
from tests.fuzz.conftest import Files, Module, inputs
from tests.fuzz.models import assert_unchanged, state_of, summary
from tests.fuzz.mutations import copied, mutate
from tests.fuzz.trying import LIMIT, attempt, cases
from tests.fuzz.values import mutate_tensors, mutate_tree

pytestmark = LIMIT


def _damage(folder: Path, random: Random) -> tuple[str, bool]:
    """(how, whether the tensors may be other numbers that their checksums vouch for)."""
    kind = random.choice(("file", "file", "config", "config", "config", "tensors", "sealed", "format 1"))
    if kind == "file":
        return mutate(random.choice((folder, folder / WEIGHTS, folder / CONFIG)), random), False
    if kind == "config":
        tree, told = json.loads((folder / CONFIG).read_text()), []
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            tree, how = mutate_tree(random, tree)
            told.append(how)
        (folder / CONFIG).write_text(json.dumps(tree))
        return "; ".join(told), False
    tensors, how = mutate_tensors(random, load_file(folder / WEIGHTS))
    save_file(tensors, folder / WEIGHTS)
    if kind == "sealed":
        seal(folder)
    if kind == "format 1":
        edit_config(folder, lambda c: [c.pop(key, None) for key in ("tensors", "root", "left_out")])
        edit_config(folder, lambda c: c.update(format_version=1))
    return f"{how} ({kind})", kind != "tensors"


def _check(answer: Any, model: nn.Module, before: dict[str, Any], expected: torch.Tensor | None, told: str) -> None:
    if isinstance(answer, Exception):
        assert_unchanged(model, before, told)
        return
    if not all(bool(layer.core_update().isfinite().all()) for layer in adapted_layers(model).values()):
        pytest.fail(f"{told}: loaded, and U is not finite")
    with torch.no_grad():
        outputs = model.net(inputs())  # type: ignore[operator, union-attr]
    if expected is not None and not torch.allclose(outputs, expected, rtol=1e-4, atol=1e-5):
        pytest.fail(f"{told}: loaded, and the model gives something else")


def test_adapter_folders(files: Files, tmp_path: Path) -> None:
    found: Counter[str] = Counter()
    for seed, random in cases("adapter"):
        folder, output = copied(files.adapter, tmp_path / "bad"), tmp_path / "output"
        how, other = _damage(folder, random)
        told = f"seed {seed}: {how}"
        fresh, converted, several, named = Module(), Module(), Module(), Module()
        load_adapter(converted, files.adapter)
        load_adapters(several, {"good": files.adapter})
        loads: list[tuple[nn.Module, Callable[[], Any]]] = [
            (fresh, lambda m=fresh, f=folder: load_adapter(m, f)),
            (named, lambda m=named, f=folder: load_adapters(m, {"bad": f, "good": files.adapter})),
            (converted, lambda m=converted, f=folder: load_adapter(m, f)),
            (several, lambda m=several, f=folder: add_adapter(m, "bad", f)),
        ]
        writes: list[Callable[[], Any]] = [
            lambda f=folder, o=output: merge_files(files.base, f, o, progress=False),
            lambda f=folder, o=output: export_files(files.base, f, o, progress=False),
            lambda f=folder: json.dumps(inspect_adapter(f, files.base).to_dict()),
            lambda f=folder: str(inspect_adapter(f)),
        ]
        refused = 0
        for model, act in loads:
            before = state_of(model)
            answer = attempt(act, told)
            refused += isinstance(answer, Exception)
            _check(answer, model, before, None if other or model is converted else files.outputs, told)
        for act in writes:
            answer = attempt(act, told)
            refused += isinstance(answer, Exception)
            if isinstance(answer, Exception) and output.exists():
                pytest.fail(f"{told}: refused, and left its output")
            written = [load_file(file) for file in output.glob("*.safetensors")]
            if not all(bool(value.isfinite().all()) for tensors in written for value in tensors.values()):
                pytest.fail(f"{told}: wrote NaN")
            shutil.rmtree(output, ignore_errors=True)
        if (left := sorted(path.name for path in tmp_path.iterdir())) != ["bad"]:
            pytest.fail(f"{told}: left {left}")
        found[
            "refused by all" if refused == 8 else "taken by all" if refused == 0 else f"refused by {refused} of 8"
        ] += 1
    summary(found)


def test_the_sound_folder_is_taken(files: Files) -> None:
    """Else every refusal above would prove nothing."""
    model = Module()
    load_adapter(model, files.adapter)
    torch.testing.assert_close(model.net(inputs()), files.outputs, rtol=1e-4, atol=1e-5)
