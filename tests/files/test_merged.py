"""Merged models on disk: they load without this library and compute what the adapter model computes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.files import merge_files, save_adapter
from lightning_pmss.layers import merged_layer
from lightning_pmss.layers.merged_layer import merge_update
from lightning_pmss.merging import merge
from lightning_pmss.methods.pmss.method import PMSSUpdate
from tests import forks
from tests.files.edits import edit_tensors, seal

Train = Callable[..., Any]
Logits = Callable[[nn.Module], torch.Tensor]


def _base(folder: str | Path, dtype: torch.dtype | str = "auto") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.fixture
def adapter(tiny_llama: str, tmp_path: Path, train: Train) -> Path:
    return save_adapter(train(_base(tiny_llama)), tmp_path / "adapter")


def _merge(base: str | Path, adapter: Path, output: Path, **options: Any) -> Any:
    return merge_files(base, adapter, output, progress=False, **options)


def _equal_files(first: Path, second: Path) -> bool:
    return {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_loads_plainly_and_computes_the_same(tiny_llama: str, tmp_path: Path, train: Train, logits: Logits) -> None:
    model = train(_base(tiny_llama))
    save_adapter(model, tmp_path / "adapter")
    report = _merge(tiny_llama, tmp_path / "adapter", tmp_path / "merged")
    merged = _base(tmp_path / "merged")
    assert (logits(model) - logits(_base(tiny_llama))).abs().max() > 0.05
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    # Tied head: stored once in the base, so once in the result.
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()
    AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert set(report.merged) == set(adapted_layers(model))
    assert "tokenizer.json" in report.copied_files
    assert report.total.max_error == 0  # float32 to float32


def test_equals_the_merge_in_memory(sharded_llama: str, tmp_path: Path, train: Train) -> None:
    model = train(_base(sharded_llama))
    save_adapter(model, tmp_path / "adapter")
    streamed = _merge(sharded_llama, tmp_path / "adapter", tmp_path / "merged")
    in_memory = merge(model)
    merged = _base(tmp_path / "merged")
    for name, layer in adapted_layers(model).items():
        # The order of a float32 sum may differ: at most one unit in the last place of bfloat16.
        torch.testing.assert_close(merged.get_submodule(name).weight, layer.weight, rtol=2**-7, atol=0)
        assert (merged.get_submodule(name).weight == layer.weight).float().mean() > 0.99
        drift, expected = streamed.merged[name], in_memory.layers[name]
        assert drift.max_error == pytest.approx(expected.max_error, rel=1e-3)
        assert drift.relative_error == pytest.approx(expected.relative_error, rel=1e-3)
        assert drift.lost_update == pytest.approx(expected.lost_update, rel=1e-3)
    assert 0 < streamed.total.relative_error < 2**-8
    assert f"{len(streamed.merged)} layers" in str(streamed)


def test_keeps_the_shards_of_the_base(sharded_llama: str, tmp_path: Path, train: Train, logits: Logits) -> None:
    model = train(_base(sharded_llama))
    save_adapter(model, tmp_path / "adapter")
    _merge(sharded_llama, tmp_path / "adapter", tmp_path / "merged")
    assert {p.name for p in (tmp_path / "merged").iterdir()} == (
        {p.name for p in Path(sharded_llama).iterdir()} | {"merge_report.json"}
    )
    name = "model.safetensors.index.json"
    before, after = (json.loads((Path(folder) / name).read_text()) for folder in (sharded_llama, tmp_path / "merged"))
    assert before["weight_map"] == after["weight_map"]
    assert before["metadata"]["total_size"] == after["metadata"]["total_size"]
    for file in set(after["weight_map"].values()):
        old, new = load_file(Path(sharded_llama) / file), load_file(tmp_path / "merged" / file)
        for key in old:
            changed = key.endswith("_proj.weight")
            assert torch.equal(old[key], new[key]) != changed, key
            assert old[key].dtype == new[key].dtype


def test_divides_anew_and_widens(tiny_llama: str, adapter: Path, tmp_path: Path, logits: Logits) -> None:
    _merge(tiny_llama, adapter, tmp_path / "one")
    _merge(tiny_llama, adapter, tmp_path / "many", max_shard_size="30KB", dtype="float64")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert json.loads((tmp_path / "many" / "config.json").read_text())["dtype"] == "float64"
    many = _base(tmp_path / "many")
    assert many.dtype == torch.float64
    torch.testing.assert_close(logits(many), logits(_base(tmp_path / "one")), rtol=1e-4, atol=1e-5)


def test_float32_output_of_a_bfloat16_base_is_not_rounded(sharded_llama: str, tmp_path: Path, train: Train) -> None:
    save_adapter(train(_base(sharded_llama)), tmp_path / "adapter")
    narrow = _merge(sharded_llama, tmp_path / "adapter", tmp_path / "narrow")
    wide = _merge(sharded_llama, tmp_path / "adapter", tmp_path / "wide", dtype=torch.float32)
    assert narrow.total.max_error > 0
    assert wide.total.max_error == 0
    name = next(iter(wide.merged))
    key = f"{name}.weight"
    one = _base(tmp_path / "wide").get_parameter(key)
    assert one.dtype == torch.float32
    assert not torch.equal(one, one.bfloat16().float())
    assert torch.equal(one.bfloat16(), _base(tmp_path / "narrow").get_parameter(key))


def test_adapter_of_another_dtype(tiny_llama: str, sharded_llama: str, adapter: Path, tmp_path: Path) -> None:
    _merge(sharded_llama, adapter, tmp_path / "merged")  # trained in float32, base stored in bfloat16
    assert _base(tmp_path / "merged").dtype == torch.bfloat16


@pytest.mark.parametrize("stored", ["with prefix", "without prefix"])
@pytest.mark.parametrize("trained", ["whole", "body"])
def test_conv1d_and_prefixes(
    tiny_gpt2: str, tmp_path: Path, train: Train, logits: Logits, stored: str, trained: str
) -> None:
    """GPT-2 stores W transposed, and its checkpoints come with and without ``transformer.``."""
    whole = _base(tiny_gpt2)
    base = tmp_path / "base"
    whole.save_pretrained(base)
    if stored == "without prefix":
        state = load_file(base / "model.safetensors")
        state = {key.removeprefix("transformer."): value for key, value in state.items()}
        save_file(state, base / "model.safetensors", {"format": "pt"})
    train(whole if trained == "whole" else whole.transformer)
    save_adapter(whole if trained == "whole" else whole.transformer, tmp_path / "adapter")
    _merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert (logits(whole) - logits(_base(tiny_gpt2))).abs().max() > 0.05
    torch.testing.assert_close(logits(_base(tmp_path / "merged")), logits(whole), rtol=1e-4, atol=1e-5)
    assert set(load_file(base / "model.safetensors")) == set(load_file(tmp_path / "merged" / "model.safetensors"))


def test_ambiguous_prefix(tmp_path: Path, train: Train) -> None:
    model = train(nn.ModuleDict({"layer": nn.Linear(6, 6, bias=False)}), rank=2)
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    weights = {"a.layer.weight": torch.ones(6, 6), "b.layer.weight": torch.ones(6, 6)}
    save_file(weights, tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match=r"layer may be any of a.layer, b.layer"):
        _merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_also_train_replaces_and_adds(tiny_llama: str, tmp_path: Path, train: Train, logits: Logits) -> None:
    model = train(
        AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=2),
        also_train=["score", "norm"],
    )
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    save_adapter(model, tmp_path / "adapter")
    report = _merge(tiny_llama, tmp_path / "adapter", tmp_path / "merged")
    assert (report.replaced, report.added) == (["model.norm.weight"], ["score.weight"])
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", num_labels=2)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)


def test_tied_embedding_trained_in_full(tiny_llama: str, tmp_path: Path, train: Train, logits: Logits) -> None:
    model = train(_base(tiny_llama), also_train=["lm_head"])
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    save_adapter(model, tmp_path / "adapter")
    report = _merge(tiny_llama, tmp_path / "adapter", tmp_path / "merged")
    assert report.replaced == ["model.embed_tokens.weight"]  # the name under which the base stores it
    torch.testing.assert_close(logits(_base(tmp_path / "merged")), logits(model), rtol=1e-4, atol=1e-5)


def test_overwrite(tiny_llama: str, adapter: Path, tmp_path: Path) -> None:
    _merge(tiny_llama, adapter, tmp_path / "merged")
    with pytest.raises(FileExistsError, match="--overwrite"):
        _merge(tiny_llama, adapter, tmp_path / "merged")
    _merge(tiny_llama, adapter, tmp_path / "merged", overwrite=True)
    (tmp_path / "merged" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="notes.txt"):
        _merge(tiny_llama, adapter, tmp_path / "merged", overwrite=True)


@pytest.mark.parametrize("overwrite", [True, False])
def test_output_on_inside_or_around_the_inputs(tiny_llama: str, adapter: Path, tmp_path: Path, overwrite: bool) -> None:
    base = tmp_path / "models" / "base"
    shutil.copytree(tiny_llama, base)
    before = {path.name for path in base.iterdir()}
    (tmp_path / "link").symlink_to(base)
    for output, message in [
        (base, "is the base itself"),
        (tmp_path / "link", "is the base itself"),
        (base / "merged", "lies inside the base"),
        (tmp_path / "models", "contains the base"),
        (adapter, "is the adapter itself"),
    ]:
        with pytest.raises(ValueError, match=message):
            _merge(base, adapter, output, overwrite=overwrite)
    assert {path.name for path in base.iterdir()} == before


def test_wrong_base(tiny_llama: str, adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_llama)).save_pretrained(other)
    with pytest.raises(ValueError, match=r"belongs to another base: the weights of model.layers.0.*and 11 more"):
        _merge(other, adapter, tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "other"]


def test_merging_twice_is_refused(tiny_llama: str, adapter: Path, tmp_path: Path) -> None:
    _merge(tiny_llama, adapter, tmp_path / "merged")
    with pytest.raises(ValueError, match="belongs to another base"):
        _merge(tmp_path / "merged", adapter, tmp_path / "again")


def test_other_architecture(tiny_gpt2: str, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no weights for 14 of the 14 modules.*model.layers.0"):
        _merge(tiny_gpt2, adapter, tmp_path / "merged")


def test_other_width_and_quantised(tiny_llama: str, adapter: Path, tmp_path: Path) -> None:
    key = "model.layers.0.self_attn.q_proj.weight"
    state = load_file(Path(tiny_llama) / "model.safetensors")
    (tmp_path / "base").mkdir()
    save_file(state | {key: torch.zeros(16, 32)}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{key} is stored as \[16, 32\].*\[32, 32\]"):
        _merge(tmp_path / "base", adapter, tmp_path / "merged")
    save_file(state | {key: state[key].to(torch.int8)}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{key} is stored as torch.int8, a quantised form"):
        _merge(tmp_path / "base", adapter, tmp_path / "merged")


def test_bases_that_cannot_be_streamed(tiny_llama: str, sharded_llama: str, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    torch.save(_base(tiny_llama).state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin, not as safetensors.*save_pretrained"):
        _merge(tmp_path / "bin", adapter, tmp_path / "merged")
    shutil.copytree(sharded_llama, tmp_path / "base")
    shard = sorted((tmp_path / "base").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"missing: {shard.name}"):
        _merge(tmp_path / "base", adapter, tmp_path / "merged")
    with pytest.raises(FileNotFoundError, match="hf download"):
        _merge("org/model", adapter, tmp_path / "merged")


def test_results_that_are_not_finite(tiny_llama: str, adapter: Path, tmp_path: Path) -> None:
    edit_tensors(adapter, lambda tensors: tensors["model.layers.1.mlp.up_proj.U"].mul_(1e20))
    seal(adapter)
    with pytest.raises(
        ValueError, match=r"merging model.layers.1.mlp.up_proj in torch.float16: .* is not finite.*float32"
    ):
        _merge(tiny_llama, adapter, tmp_path / "merged", dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize(("option", "value"), [("dtype", "int8"), ("dtype", "wide"), ("max_shard_size", "5 parsecs")])
def test_bad_options(tiny_llama: str, adapter: Path, tmp_path: Path, option: str, value: str) -> None:
    with pytest.raises(ValueError, match=option):
        _merge(tiny_llama, adapter, tmp_path / "merged", **{option: value})


def test_full_disk(tiny_llama: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _merge(tiny_llama, adapter, tmp_path / "merged")
    shutil.copytree(tmp_path / "merged", tmp_path / "copy")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_pmss.store.shards.ShardWriter.write", full)
    with pytest.raises(OSError, match="No space left"):
        _merge(tiny_llama, adapter, tmp_path / "merged", overwrite=True)
    with pytest.raises(OSError, match="No space left"):
        _merge(tiny_llama, adapter, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "copy", "merged"]
    assert _equal_files(tmp_path / "merged", tmp_path / "copy")


def test_killed_merge(sharded_llama: str, tmp_path: Path, train: Train, logits: Logits) -> None:
    model = train(_base(sharded_llama))
    save_adapter(model, tmp_path / "adapter")
    code = (
        "import sys, time\n"
        "from lightning_pmss.files import merge_files\n"
        "from lightning_pmss.store import shards\n"
        "write, count = shards.ShardWriter.write, [0]\n"
        "def slow(self, key, value):\n"
        "    count[0] += 1; write(self, key, value)\n"
        "    if count[0] == 12: print('ready', flush=True); time.sleep(60)\n"
        "shards.ShardWriter.write = slow\n"
        "merge_files(*sys.argv[1:], progress=False)\n"
    )
    arguments = [sharded_llama, str(tmp_path / "adapter"), str(tmp_path / "merged")]
    with forks.Program(["-c", code, *arguments], stream=True) as process:
        assert process.stdout.readline().strip() == "ready"
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "merged").exists()
    assert len(os.listdir(tmp_path)) == 2  # the adapter and one hidden leftover
    _merge(sharded_llama, tmp_path / "adapter", tmp_path / "merged")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "merged"]
    torch.testing.assert_close(logits(_base(tmp_path / "merged")), logits(model), rtol=0.1, atol=0.05)


def test_other_files_are_copied_and_weights_are_not(tiny_llama: str, adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    for name in ("README.md", "chat/template.jinja", "training_args.bin", "original/consolidated.00.pth", ".git/HEAD",
                 "flax_model.msgpack", "model.gguf"):  # fmt: skip
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    report = _merge(base, adapter, tmp_path / "merged")
    files = {p.relative_to(tmp_path / "merged").as_posix() for p in (tmp_path / "merged").rglob("*") if p.is_file()}
    assert {"README.md", "chat/template.jinja", "config.json", "generation_config.json"} <= files
    assert not [f for f in files if f.endswith((".bin", ".pth", "HEAD", ".msgpack", ".gguf"))]
    assert files == {*report.copied_files, "model.safetensors", "merge_report.json"}
    written = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert set(written["files"]) == files
    assert written["total"]["max_error"] == 0


def test_real_model(shared: Path, tmp_path: Path, train: Train) -> None:
    base = shared / "models" / "stories260K"
    model = train(_base(base, torch.float32), rank=16, size=0.2).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    save_adapter(model, tmp_path / "adapter")
    _merge(base, tmp_path / "adapter", tmp_path / "merged")
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    greedy = {"max_new_tokens": 40, "do_sample": False}
    texts = [
        AutoTokenizer.from_pretrained(folder).decode(loaded.generate(**prompt, **greedy)[0])
        for folder, loaded in ((base, model), (tmp_path / "merged", _base(tmp_path / "merged", torch.float32)))
    ]
    assert texts[0] == texts[1]
    assert texts[0] != tokenizer.decode(_base(base, torch.float32).generate(**prompt, **greedy)[0])


# write_merged: from a live model


def test_blocks_of_rows_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 20).to(torch.bfloat16)
    update = PMSSUpdate(torch.randn(2, 3), torch.tensor([3, 36, 0]), torch.tensor([7, 1]))
    expected, drift = merge_update(weight, update, torch.bfloat16)
    exact = weight.double() + weight[:, update.cols].double() @ update.U.double() @ weight[update.rows].double()
    torch.testing.assert_close(expected, exact.to(torch.bfloat16), rtol=2**-7, atol=0)
    monkeypatch.setattr(merged_layer, "_BLOCK", 5 * 20)
    result, again = merge_update(weight, update, torch.bfloat16)
    torch.testing.assert_close(result, expected, rtol=2**-7, atol=0)
    assert again.relative_error == pytest.approx(drift.relative_error, rel=1e-3)
