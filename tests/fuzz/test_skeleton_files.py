"""Skeleton files, for `convert`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_pmss import PMSSConfig, convert
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.methods.pmss.skeleton import METADATA, read_skeleton
from lightning_pmss.store import describe_tensors
from tests.fuzz.conftest import Files, Module
from tests.fuzz.models import assert_unchanged, state_of, summary
from tests.fuzz.mutations import copied, mutate
from tests.fuzz.trying import COUNT, LIMIT, attempt, cases
from tests.fuzz.values import mutate_tensors, mutate_tree

pytestmark = LIMIT


def _damage(file: Path, random: Random) -> tuple[str, bool]:
    """(how, whether the tensors may be other numbers that nothing speaks against)."""
    kind = random.choice(("file", "file", "about", "about", "tensors", "sealed", "format 1"))
    if kind == "file":
        return mutate(file, random), False
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()[METADATA])
    if kind == "about":
        about, how = mutate_tree(random, about)
        save_file(tensors, file, {METADATA: json.dumps(about)})
        return how, False
    tensors, how = mutate_tensors(random, tensors)
    for name, layer in about["modules"].items():
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        if kind == "sealed":
            layer["tensors"] = describe_tensors(own)
        elif kind == "format 1":
            del layer["tensors"]
    about["format_version"] = 1 if kind == "format 1" else about["format_version"]
    save_file(tensors, file, {METADATA: json.dumps(about)})
    return f"{how} ({kind})", kind != "tensors"


def test_skeleton_files(files: Files, tmp_path: Path) -> None:
    config = PMSSConfig(target_modules=["first", "second"], rank=5, scale=2.0, also_train=["head"])
    sound, found = Module(), Counter[str]()
    convert(sound, config, given=read_skeleton(files.skeleton))
    for seed, random in cases("skeleton", 3 * COUNT):
        file = copied(files.skeleton, tmp_path / "bad.safetensors")
        how, other = _damage(file, random)
        told = f"seed {seed}: {how}"
        model = Module()
        before = state_of(model)
        answer = attempt(
            lambda m=model, f=file: convert(m, PMSSConfig(**config.to_dict() | {"skeleton_file": str(f)})), told
        )
        if isinstance(answer, Exception):
            assert_unchanged(model, before, told)
            found["refused by all"] += 1
            continue
        found["taken"] += 1
        for name, layer in adapted_layers(model).items():
            with torch.no_grad():
                layer.core.weight.normal_()
                if not layer.core_update().isfinite().all():
                    pytest.fail(f"{told}: converted, and U is not finite")
            frame, right = layer.core.frame, adapted_layers(sound)[name].core.frame
            if not other and not (torch.equal(frame.left, right.left) and torch.equal(frame.right, right.right)):  # type: ignore[union-attr, arg-type]
                pytest.fail(f"{told}: converted, with other coordinates")
    summary(found)
