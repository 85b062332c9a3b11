"""Bits that a disk or a copy has turned over are noticed by every reader, wherever they are."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_pmss.cli import main
from lightning_pmss.conversion.convert import adapted_layers, convert
from lightning_pmss.files import export_files, load_adapter, merge_files, read_adapter, save_adapter, save_skeleton
from lightning_pmss.inspect.inspection import inspect_adapter
from lightning_pmss.methods.pmss.config import PMSSConfig
from lightning_pmss.methods.pmss.skeleton import read_skeleton
from lightning_pmss.named import add_adapter, load_adapters
from tests.compatibility import run
from tests.files.edits import CONFIG, WEIGHTS, data_begins, edit_config, flip

Train = Callable[..., nn.Module]
Q = "model.layers.0.self_attn.q_proj"


def _base(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_the_config_has_a_checksum_of_every_tensor(tiny_llama: str, tmp_path: Path, train: Train) -> None:
    model = train(AutoModelForCausalLM.from_pretrained(tiny_llama), also_train=["norm"])
    folder = save_adapter(model, tmp_path / "a")
    config = json.loads((folder / CONFIG).read_text())
    content, begins = (folder / WEIGHTS).read_bytes(), data_begins(folder / WEIGHTS)
    header = json.loads(content[8:begins])
    header.pop("__metadata__")
    assert config["format_version"] == 2
    assert set(config["tensors"]) == set(header)
    names = {"F32": "float32", "I32": "int32"}
    for key, entry in header.items():
        first, last = (begins + offset for offset in entry["data_offsets"])
        expected = {
            "dtype": names[entry["dtype"]],
            "shape": entry["shape"],
            "sha256": hashlib.sha256(content[first:last]).hexdigest(),
        }
        assert config["tensors"][key] == expected


def test_one_bit_anywhere_is_refused(tiny_llama: str, tmp_path: Path, train: Train) -> None:
    """Of 30 such bits in U 25 were accepted: other numbers, and nothing looked wrong."""
    folder = save_adapter(train(_base(tiny_llama)), tmp_path / "a")
    file, good = folder / WEIGHTS, (folder / WEIGHTS).read_bytes()
    begins, draw = data_begins(file), random.Random(0)
    for _ in range(60):
        flip(file, draw.randrange(begins, len(good)), draw.randrange(8))
        with pytest.raises(
            ValueError, match=rf"{WEIGHTS}: .*(changed after|NaN or inf|indices outside|an index twice)"
        ):
            read_adapter(folder)
        file.write_bytes(good)
    read_adapter(folder)


def test_by_every_reader(tiny_llama: str, tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    good = save_adapter(train(_base(tiny_llama)), tmp_path / "good")
    bad, output = Path(shutil.copytree(good, tmp_path / "bad")), tmp_path / "output"
    flip(bad / WEIGHTS, data_begins(bad / WEIGHTS) + 2, 1)
    message = (
        r"adapter_model.safetensors: `.*U` changed after the file was written \(its checksum differs\). Copy the folder"
    )
    model, named = _base(tiny_llama), _base(tiny_llama)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load_adapters(named, {"good": good})
    ways: dict[str, Callable[[], Any]] = {
        "load": lambda: load_adapter(model, bad),
        "load onto a converted one": lambda: load_adapter(train(_base(tiny_llama)), bad),
        "load several": lambda: load_adapters(model, {"good": good, "bad": bad}),
        "add": lambda: add_adapter(named, "bad", bad),
        "merge": lambda: merge_files(tiny_llama, bad, output, progress=False),
        "export": lambda: export_files(tiny_llama, bad, output, progress=False),
        "inspect": lambda: inspect_adapter(bad),
        "inspect with the base": lambda: inspect_adapter(bad, tiny_llama),
    }
    for act in ways.values():
        with pytest.raises(ValueError, match=message):
            act()
    assert not output.exists()
    assert not adapted_layers(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for command in (
        ["inspect", str(bad)],
        ["merge", "--base", tiny_llama, "--adapter", str(bad), "--output", str(output)],
    ):
        with pytest.raises(SystemExit) as left:
            main(command)
        assert left.value.code == 2
        printed = capsys.readouterr().err.strip().splitlines()
        assert "changed after the file was written" in printed[-1]


def test_a_checksum_that_was_changed_is_none(tiny_llama: str, tmp_path: Path, train: Train) -> None:
    folder = save_adapter(train(_base(tiny_llama)), tmp_path / "a")
    wrong: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
        "other": (lambda c: c["tensors"][f"{Q}.U"].update(sha256="0" * 64), "`.*U` changed after the file was written"),
        "no hash": (lambda c: c["tensors"][f"{Q}.U"].update(sha256="0"), "`tensors.*sha256` should match pattern"),
        "gone": (lambda c: c["tensors"].pop(f"{Q}.U"), f"`tensors` and `modules` differ in {Q}.U"),
        "more": (lambda c: c["tensors"].update(x=c["tensors"][f"{Q}.U"]), "`tensors` and `modules` differ in x"),
        "all gone": (lambda c: c.pop("tensors"), "`tensors` is missing"),
        "shape": (lambda c: c["tensors"][f"{Q}.U"].update(shape=[5, 6]), r"was written as float32 \[5, 6\]"),
        "dtype": (lambda c: c["tensors"][f"{Q}.U"].update(dtype="float64"), r"was written as float64 \[6, 6\]"),
    }
    good = (folder / CONFIG).read_text()
    for change, message in wrong.values():
        edit_config(folder, change)
        with pytest.raises(ValueError, match=message):
            read_adapter(folder)
        (folder / CONFIG).write_text(good)


def test_format_1_has_none_and_is_read_as_before(tmp_path: Path) -> None:
    source = Path(__file__).parent.parent / "compatibility" / "format1" / "adapter"
    assert set(load_adapter(run.Module(), source).also_train) == {"net.head"}
    folder = Path(shutil.copytree(source, tmp_path / "a"))
    edit_config(folder, lambda c: c.update(format_version=2))  # a claim that nothing proves
    with pytest.raises(ValueError, match="`tensors` is missing"):
        read_adapter(folder)


def test_one_bit_of_a_skeleton_file(tiny_llama: str, tmp_path: Path) -> None:
    model = _base(tiny_llama)
    convert(model, PMSSConfig(rank=6, target_modules=["q_proj", "v_proj"]))
    file = save_skeleton(model, tmp_path / "s.safetensors")
    good, begins, draw = file.read_bytes(), data_begins(file), random.Random(0)
    read_skeleton(file)
    for _ in range(60):
        flip(file, draw.randrange(begins, len(good)), draw.randrange(8))
        with pytest.raises(ValueError, match="s.safetensors'"):
            read_skeleton(file)
        file.write_bytes(good)
