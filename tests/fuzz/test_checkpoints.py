"""Checkpoints, through everything that reads one."""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file

from lightning_pmss.callbacks.nonfinite import NonFiniteError
from lightning_pmss.checkpoints.extract import extract_files, merge_checkpoint
from lightning_pmss.conversion.convert import adapted_layers
from tests.fuzz.conftest import Files, Module, inputs, loader, make_callback, make_trainer
from tests.fuzz.models import summary
from tests.fuzz.mutations import copied, mutate
from tests.fuzz.trying import LIMIT, attempt, cases
from tests.fuzz.values import mutate_tensors, mutate_tree

pytestmark = LIMIT


def _damage(file: Path, random: Random) -> tuple[str, bool]:
    """(how, whether the tensors may be other numbers): what is saved anew has right checksums."""
    kind = random.choice(("file", "file", "entry", "entry", "entry", "tensors", "tensors", "top", "state", "rest"))
    if kind == "file":
        return mutate(file, random), False
    content: Any = copy.deepcopy(torch.load(file, weights_only=True))
    if kind == "entry":
        content["pmss"], how = mutate_tree(random, content["pmss"])
    elif kind == "tensors":
        state = content["state_dict"]
        content["state_dict"], how = mutate_tensors(random, state)
        if random.random() < 0.1:  # what safetensors cannot hold
            name, kind_of_tensor = random.choice(list(state)), random.choice(("sparse", "meta", "a name twice"))
            odd = {"sparse": state[name].to_sparse(), "meta": state[name].to("meta"), "a name twice": state[name] + 1}
            key = f"_orig_mod.{name}" if kind_of_tensor == "a name twice" else name
            content["state_dict"], how = state | {key: odd[kind_of_tensor]}, f"{name}: {kind_of_tensor}"
    elif kind == "state":
        content["callbacks"]["PMSSCallback"], how = mutate_tree(random, content["callbacks"]["PMSSCallback"])
    elif kind == "rest":
        part = random.choice(("optimizer_states", "lr_schedulers", "loops"))
        content[part], how = mutate_tree(random, content[part])
        how = f"{part}.{how}"
    else:
        part = random.choice(("pmss", "all", *content))
        value = random.choice((None, 1, "x", [], {}, [content["state_dict"]], {"a": 1}, {1: 2}, torch.ones(2)))
        how = f"{part} = {str(value)[:20]}"
        content = value if part == "all" else content | {part: value}
        if random.random() < 0.3 and isinstance(content, dict):
            content.pop(part, None)
    torch.save(content, file)
    return f"{kind}: {how}", kind == "tensors"


def test_checkpoints(files: Files, tmp_path: Path) -> None:
    output, found = tmp_path / "output", Counter[str]()
    expected = load_file(files.adapter / "adapter_model.safetensors")
    for seed, random in cases("checkpoint"):
        file = copied(files.checkpoint, tmp_path / "bad.ckpt")
        how, other = _damage(file, random)
        told = f"seed {seed}: {how}"

        extracted = attempt(lambda f=file: extract_files(f, files.base, output, progress=False), told)
        if isinstance(extracted, Exception) is output.exists():
            pytest.fail(f"{told}: refused, and left its output; or wrote nothing")
        if output.exists() and not other:
            written = load_file(output / "adapter_model.safetensors")
            assert all(torch.equal(value, expected[key]) for key, value in written.items()), told
        shutil.rmtree(output, ignore_errors=True)

        merged = attempt(lambda f=file: merge_checkpoint(f, files.base, output, progress=False), told)
        if isinstance(merged, Exception) is output.exists():
            pytest.fail(f"{told}: refused, and left its output; or wrote nothing")
        for weights in output.glob("*.safetensors"):
            assert all(bool(value.isfinite().all()) for value in load_file(weights).values()), f"{told}: wrote NaN"
        shutil.rmtree(output, ignore_errors=True)

        loaded = attempt(lambda f=file: Module.load_from_checkpoint(f), told)
        if not isinstance(loaded, Exception):
            assert all(x.core_update().isfinite().all() for x in adapted_layers(loaded).values()), told
            with torch.no_grad():
                outputs = loaded.net(inputs())
            assert other or torch.allclose(outputs, files.outputs, rtol=1e-4, atol=1e-5), told

        module = Module()
        trainer = make_trainer(tmp_path / "run", make_callback(tmp_path / "run"), max_steps=3)
        # Huge values that somebody put in are finite, and the first step shows that nothing can be trained from them.
        answers = (OSError, ValueError, *((MisconfigurationException, NonFiniteError) if other else ()))
        resumed = attempt(lambda t=trainer, m=module, f=file: t.fit(m, loader(), ckpt_path=f), told, answers)
        layers = adapted_layers(module).values()
        if isinstance(resumed, (OSError, ValueError)) and "does not fit this run" not in str(resumed):
            values = module.state_dict()
            same = all(torch.equal(values[key], value) for key, value in Module().state_dict().items())
            if not same or not all((x.core.weight == 0).all() for x in layers):
                pytest.fail(f"{told}: refused, and changed the model")
        elif not isinstance(resumed, Exception):
            assert all(x.core_update().isfinite().all() for x in layers), told
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        if left := {path.name for path in tmp_path.iterdir()} - {"bad.ckpt"}:
            pytest.fail(f"{told}: left {left}")
        refused = sum(isinstance(answer, Exception) for answer in (extracted, merged, loaded, resumed))
        found[
            "refused by all" if refused == 4 else "taken by all" if refused == 0 else f"refused by {refused} of 4"
        ] += 1
    summary(found)
