"""What readers of Python let through or crash on, in every kind of file: one sentence with file, place and remedy."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_pmss.cli import main
from lightning_pmss.conversion.convert import adapted_layers, convert
from lightning_pmss.files import load_adapter, read_adapter, save_adapter, save_skeleton
from lightning_pmss.methods.pmss.config import PMSSConfig
from lightning_pmss.methods.pmss.skeleton import METADATA, read_skeleton
from lightning_pmss.store import describe_tensors, parse_json, read_json
from lightning_pmss.store.model_config import read_model_config
from lightning_pmss.store.shards import open_shards
from tests.files.edits import CONFIG, WEIGHTS, edit_config, edit_tensors, seal

Train = Callable[..., nn.Module]

TEXTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "blank": (b" \n", "it is empty"),
    "deep": (b"[" * 100_000, "it is nested too deeply"),
    "deep objects": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "it is nested too deeply"),
    "mark": (b"\xef\xbb\xbf{}", "it begins with a byte order mark"),
    "not UTF-8": (b'{"a": "\xe9"}', "byte 7 is not UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "byte 0 is not UTF-8"),
    "twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
    "NaN": (b'{"a": NaN}', "NaN is not a number of JSON"),
    "infinite": (b'{"a": [-Infinity]}', "-Infinity is not a number of JSON"),
    "overflow": (b'{"a": 1e999}', "1e999 is not a finite number"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
    "cut": (b'{"a": [1, 2', "Expecting"),
    "more": (b"{} {}", "Extra data"),
    "half a pair": (b'{"a": "\\ud83d"}', "'utf-8' codec can't encode"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_json_that_is_none(tmp_path: Path, case: str) -> None:
    text, reason = TEXTS[case]
    file = tmp_path / "x.json"
    file.write_bytes(text)
    with pytest.raises(ValueError, match=rf"{file} is not readable JSON \({reason}.*\)\. Do this\."):
        read_json(file, "Do this.")
    with pytest.raises(ValueError, match="the header is not readable JSON"):
        parse_json(text, "the header", "Do this.")


@pytest.fixture
def adapter(tmp_path: Path, train: Train) -> Path:
    return save_adapter(train(_net(), rank=3, also_train=["2"]), tmp_path / "adapter")


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 4))


VALUES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "format 0": (lambda c: c.update(format_version=0), "has format version 0, which does not exist"),
    "format -1": (lambda c: c.update(format_version=-1), "has format version -1, which does not exist"),
    "format 99": (lambda c: c.update(format_version=99), "has format version 99, .* reads up to 2: upgrade"),
    "format true": (lambda c: c.update(format_version=True), "does not describe an adapter of lightning-pmss"),
    "format text": (lambda c: c.update(format_version="2"), "does not describe an adapter of lightning-pmss"),
    "no modules": (lambda c: c.update(modules={}), "`modules` should have at least 1 item"),
    "a list": (lambda c: c.update(modules=[1]), r"`modules` should be a valid dictionary, not \[1\]"),
    "shape": (lambda c: c["modules"]["0"].update(shape=[-10, 8]), "`modules.0.shape.0` should be greater than or equal to 1"),
    "large": (lambda c: c["modules"]["0"].update(shape=[10**39, 8]), "`modules.0.shape.0` should be less than or equal to"),
    "true": (lambda c: c["modules"]["0"].update(shape=[True, 8]), "`modules.0.shape.0` should be a valid integer, not True"),
    "float": (lambda c: c["modules"]["0"].update(shape=[10.0, 8]), "`modules.0.shape.0` should be a valid integer, not 10.0"),
    "three": (lambda c: c["modules"]["0"].update(shape=[10, 8, 1]), "`modules.0.shape` should have at most 2 items"),
    "no shape": (lambda c: c["modules"]["0"].pop("shape"), "`modules.0.shape` is missing"),
    "more": (lambda c: c["modules"]["0"].update(spin=1), "`modules.0.spin` is not known"),
    "print": (lambda c: c["modules"]["0"]["fingerprint"].update(dtype="float99"), "`modules.0.fingerprint.dtype` should be"),
    "hash": (lambda c: c["modules"]["0"]["fingerprint"].pop("float16"), "`modules.0.fingerprint.float16` is missing"),
    "base": (lambda c: c.update(base_model_name_or_path=5), "`base_model_name_or_path` should be a valid string, not 5"),
    "also": (lambda c: c.update(also_train=None), "`also_train` should be a valid dictionary, not None"),
    "options": (lambda c: c.update(config=[]), r"`config` should be a valid dictionary, not \[\]"),
    "scale 0": (lambda c: c["config"].update(scale=0), "scale=0.0 must be finite and not zero"),
    "scale small": (lambda c: c["config"].update(scale=1e-45), "scale=1e-45 must be finite .* float32"),
    "scale large": (lambda c: c["config"].update(scale=10**39), r"scale=1e\+39 must be finite .* float32"),
    "scale huge": (lambda c: c["config"].update(scale=10**400), "`config.scale` should be"),
    "scale true": (lambda c: c["config"].update(scale=True), "`config.scale` should be a valid number .*, not True"),
    "dropout": (lambda c: c["config"].update(dropout="0.1"), "`config.dropout` should be a valid number, not '0.1'"),
    "targets": (lambda c: c["config"].update(target_modules=[["q"]]), "`config.target_modules.0|`config.target_modules`"),
    "pattern": (lambda c: c["config"].update(rank_pattern={"a": 2.5}), "`config.rank_pattern.a` should be a valid integer"),
    "rank": (lambda c: c["modules"]["0"].update(rank=4), "0 has the rank 3, and adapter_config.json says rank 4"),
    "size": (lambda c: c.update(settings={"vocab_size": -1}), "`settings.vocab_size` should be greater than or equal to 0"),
    "kind": (lambda c: c.update(peft_type="a" * 5000), r"adapter of lightning-pmss \(peft_type a{200,300}\.\.\."),
    "collision": (
        lambda c: c["also_train"].update({"0.U": {"shape": [3, 3], "tied": []}}), "gives two of its tensors one name"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_an_adapter_config(adapter: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = VALUES[case]
    edit_config(adapter, change)
    model = _net()
    with pytest.raises(ValueError, match=f"{adapter}/.*{message}"):
        load_adapter(model, adapter)
    assert not adapted_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(SystemExit) as left:
        main(["inspect", str(adapter)])
    assert left.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "float8": (lambda t: t.update({"0.U": t["0.U"].to(torch.float8_e4m3fn)}), "0.U has the type float8_e4m3fn"),
    "complex": (lambda t: t.update({"0.U": t["0.U"].to(torch.complex64)}), "0.U is torch.complex64"),
    "scalar": (lambda t: t.update({"0.U": torch.tensor(1.0)}), r"0.U is torch.float32 \[\]"),
    "no rows": (lambda t: t.update({"0.rows": t["0.rows"][:0]}), r"0.rows is torch.int32 \[0\]"),
    "huge shape": (lambda t: t.update({"0.U": torch.zeros(2**40, 0)}), r"0.U is torch.float32 \[1099511627776, 0\]"),
    "bool": (lambda t: t.update({"0.cols": t["0.cols"].bool()}), "0.cols is torch.bool"),
    "bytes": (lambda t: t.update({"0.cols": t["0.cols"].to(torch.uint8)}), "0.cols is torch.uint8"),
    "other layer": (lambda t: t.update({"2.bias": t["2.weight"].clone()}), r"2.bias has the shape \[4, 10\]"),
    "complex head": (
        lambda t: t.update({"2.bias": t["2.bias"].to(torch.complex64)}),
        "2.bias is torch.complex64, and the",
    ),
    "whole head": (lambda t: t.update({"2.bias": t["2.bias"].long()}), "2.bias is torch.int64, and the model's is"),
    "too large": (lambda t: t["0.U"].fill_(3e38), "the update of 0 is too large to compute with"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_their_checksums_vouch_for(adapter: Path, case: str) -> None:
    change, message = TENSORS[case]
    edit_tensors(adapter, change)
    seal(adapter)
    model = _net()
    with pytest.raises(ValueError, match=f"{adapter}.*{message}"):
        load_adapter(model, adapter)
    assert not adapted_layers(model)


def test_unsorted_indices_mean_what_they_say(adapter: Path) -> None:
    expected = _net()
    load_adapter(expected, adapter)
    order = torch.tensor([2, 0, 1])
    edit_tensors(adapter, lambda t: t.update({"0.rows": t["0.rows"][order], "0.U": t["0.U"][:, order].contiguous()}))
    seal(adapter)
    edit_config(
        adapter, lambda c: c["modules"]["0"].update(fingerprint=_print(t := load_file(adapter / WEIGHTS), t["0.rows"]))
    )
    model = _net()
    load_adapter(model, adapter)
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), expected(x), rtol=1e-4, atol=1e-5)


def _print(tensors: dict[str, torch.Tensor], rows: torch.Tensor) -> dict[str, str]:
    from lightning_pmss.layers.fingerprint import fingerprint

    weight = _net()[0].weight.detach()  # type: ignore[index]
    return fingerprint(weight[rows], weight[:, tensors["0.cols"]])


def test_a_refusal_in_rotation_coordinates_changes_nothing(tmp_path: Path, train: Train) -> None:
    """An update that is no rotation: the first layers were set, and then it raised."""
    folder = save_adapter(train(_square(), rank=4, coordinates="rotation"), tmp_path / "a")
    edit_tensors(folder, lambda tensors: tensors["2.U"].add_(1.0))
    seal(folder)
    fresh, converted = _square(), train(_square(), rank=4, coordinates="rotation", seed=5)
    for model in (fresh, converted):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match="`2`: this update is not a rotation of the weight"):
            load_adapter(model, folder)
        assert set(model.state_dict()) == set(before)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def _square() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


SKELETONS: dict[str, tuple[Callable[[dict[str, torch.Tensor], dict[str, Any]], Any], str]] = {
    "nan": (lambda t, a: t["0.left"].fill_(float("nan")), "NaN or infinite values in `0.left`"),
    "zeros": (
        lambda t, a: t["0.right"].zero_(),
        "coordinates of `0` cannot be used: right is not an invertible triangle",
    ),
    "singular": (lambda t, a: t["0.left"][0].zero_(), "left is not an invertible triangle"),
    "full": (lambda t, a: t["0.left"].fill_(1.0), "left is not an invertible triangle"),
    "shape": (lambda t, a: t.update({"0.left": torch.eye(2)}), r"left is \[2, 2\], and must be \[3, 3\]"),
    "half": (lambda t, a: t.update({"0.left": t["0.left"].half()}), "are not float32 or float64"),
    "gone": (lambda t, a: t.pop("0.left"), "left does not fit that"),
    "foreign": (lambda t, a: t.update({"0.core": torch.ones(3, 3)}), "core does not fit that"),
    "other": (lambda t, a: a.update(coordinates="spectral"), "does not fit that"),
    "unknown": (lambda t, a: a.update(coordinates="polar"), "`coordinates` should be"),
    "format 0": (lambda t, a: a.update(format_version=0), "has the format 0, which does not exist"),
    "format true": (lambda t, a: a.update(format_version=True), "has the format True, which does not exist"),
    "format 99": (lambda t, a: a.update(format_version=99), "has format 99, newer than this library"),
    "no modules": (lambda t, a: a.pop("modules"), "`modules` is missing"),
    "layer": (lambda t, a: a["modules"].update(x=a["modules"]["0"]), "promises `x` but does not hold them"),
    "outside": (lambda t, a: t["0.rows"].fill_(10), r"0.rows has indices outside 0..9"),
    "twice": (lambda t, a: t["0.cols"].fill_(1), "0.cols has an index twice"),
}


@pytest.mark.parametrize("case", SKELETONS)
@pytest.mark.parametrize("version", [1, 2])
def test_a_skeleton_file(tmp_path: Path, case: str, version: int) -> None:
    """Also of format 1, and where the checksums are right."""
    change, message = SKELETONS[case]
    model = _net()
    config = PMSSConfig(target_modules=["0"], rank=3)
    convert(model, config)
    file = save_skeleton(model, tmp_path / "s.safetensors")
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()[METADATA])
    about["format_version"] = version
    change(tensors, about)
    for name, layer in about.get("modules", {}).items():
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        layer.update({"tensors": describe_tensors(own)} if version == 2 else {})
        if version == 1:
            layer.pop("tensors", None)
    save_file(tensors, file, {METADATA: json.dumps(about)})
    fresh = _net()
    with pytest.raises(ValueError, match=f"s.safetensors.*{message}"):
        convert(fresh, PMSSConfig(**config.to_dict() | {"skeleton_file": str(file)}))
    assert not adapted_layers(fresh)
    assert all(parameter.requires_grad for parameter in fresh.parameters())


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": 1}}, "`weight_map.a` should be a valid string, not 1"),
        ({"weight_map": []}, r"`weight_map` should be a valid dictionary, not \[\]"),
        ({"metadata": {}}, "`weight_map` is missing"),
        ({"weight_map": {"a": "x"}, "metadata": 3}, "`metadata` should be a valid dictionary"),
        ({"weight_map": {"a": ".."}}, "missing|names no shards"),
        ({"weight_map": {"a": "\x00"}}, "missing"),
    ],
)
def test_an_index_of_shards(tmp_path: Path, index: Any, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_shards(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": "64"}, "`hidden_size` should be a valid integer"),
        ({"hidden_size": -1}, "`hidden_size` should be greater than or equal to 1"),
        ({"hidden_size": 10**39}, "`hidden_size` should be less than or equal to"),
        ({"num_hidden_layers": 10**9}, "`num_hidden_layers` should be less than or equal to 10000"),
        ({"num_attention_heads": True}, "`num_attention_heads` should be a valid integer"),
        ({"architectures": "LlamaForCausalLM"}, "`architectures` should be a valid list"),
        ({"text_config": {"vocab_size": 0}}, "`text_config.vocab_size` should be greater"),
    ],
)
def test_a_model_config(tmp_path: Path, settings: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The last but three built layers until somebody stopped it."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"{file} is damaged or was edited by hand: .*{message}"):
        read_model_config(file)
    with pytest.raises(SystemExit) as left:
        main(["estimate", "--model", str(tmp_path)])
    assert left.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@contextmanager
def _as_nobody() -> Iterator[None]:
    """Root reads every file: as somebody else for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="no modes of files here")
def test_a_file_that_must_not_be_read(adapter: Path, tmp_path: Path) -> None:
    """It was called truncated, and the remedy was to copy it again."""
    skeleton = tmp_path / "s.safetensors"
    model = _net()
    convert(model, PMSSConfig(target_modules=["0"], rank=3))
    save_skeleton(model, skeleton)
    shutil.copy(adapter / WEIGHTS, tmp_path / "model.safetensors")
    for folder in (tmp_path, *tmp_path.parents):
        if os.geteuid() == 0 and str(folder).startswith("/tmp/pytest"):  # noqa: S108
            folder.chmod(folder.stat().st_mode | 0o055)
    adapter.chmod(0o755)
    reads: list[tuple[Path, Callable[[], Any]]] = [
        (adapter / WEIGHTS, lambda: read_adapter(adapter)),
        (adapter / CONFIG, lambda: read_adapter(adapter)),
        (skeleton, lambda: read_skeleton(skeleton)),
        (tmp_path / "model.safetensors", lambda: open_shards(tmp_path)),
    ]
    for file, act in reads:
        mode = file.stat().st_mode
        file.chmod(0)
        with _as_nobody(), pytest.raises(PermissionError) as caught:
            act()
        assert str(caught.value).startswith(
            f"{file} cannot be read: permission denied (its mode is 000). Type `chmod u+r"
        )
        file.chmod(mode | 0o044)
        with _as_nobody():
            act()
