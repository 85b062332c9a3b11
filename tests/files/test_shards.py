"""Streaming safetensors: what is written is what safetensors reads, and what cannot be read is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_pmss.store.shards import (
    ShardWriter,
    TensorInfo,
    open_shards,
    parse_size,
    plan_shards,
    read_header,
    shard_names,
    write_index,
)


def _tensors() -> dict[str, torch.Tensor]:
    return {
        "half": torch.randn(3).to(torch.bfloat16),
        "matrix": torch.randn(4, 5),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
        "mask": torch.tensor([True, False, True]),
        "eight": torch.randn(5).to(torch.float8_e4m3fn),
        "view": torch.randn(6, 4).T,
    }


def test_written_file_is_plain_safetensors(tmp_path: Path) -> None:
    tensors = _tensors()
    infos = [TensorInfo(key, value.dtype, tuple(value.shape)) for key, value in tensors.items()]
    with ShardWriter(tmp_path / "model.safetensors", infos) as writer:
        for info in writer.plan:
            writer.write(info.key, tensors[info.key])
    back = load_file(tmp_path / "model.safetensors")
    assert set(back) == set(tensors)
    for key, value in tensors.items():
        assert back[key].dtype == value.dtype
        assert torch.equal(back[key].float(), value.float())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    sizes = [info.dtype.itemsize for info in read_header(tmp_path / "model.safetensors") if info.bytes]
    assert sizes == sorted(sizes, reverse=True)


def test_writer_takes_only_what_it_announced(tmp_path: Path) -> None:
    info = TensorInfo("a", torch.float32, (2,))
    with pytest.raises(ValueError, match="expected"), ShardWriter(tmp_path / "x", [info]) as writer:
        writer.write("a", torch.zeros(3))
    with pytest.raises(ValueError, match="1 announced"), ShardWriter(tmp_path / "y", [info]):
        pass


def _sharded(folder: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.zeros(2, 2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"c": torch.full((4,), 7.0)}, folder / "model-00002-of-00002.safetensors")
    weight_map = {"a": 1, "b": 1, "c": 2}
    index = {key: f"model-0000{number}-of-00002.safetensors" for key, number in weight_map.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_reads_shards_one_tensor_at_a_time(tmp_path: Path) -> None:
    _sharded(tmp_path)
    with open_shards(tmp_path) as reader:
        assert set(reader.tensors) == {"a", "b", "c"}
        first = reader.read("a")
        assert torch.equal(reader.read("c"), torch.full((4,), 7.0))
        assert torch.equal(first, torch.ones(3))  # still valid after another shard was opened


def test_a_state_dict_in_a_file(tmp_path: Path) -> None:
    """Of a model that is no Hugging Face folder: the file, or a folder with nothing else in it."""
    save_file({"a": torch.ones(3)}, tmp_path / "state.safetensors")
    for place in (tmp_path / "state.safetensors", tmp_path):
        with open_shards(place) as reader:
            assert torch.equal(reader.read("a"), torch.ones(3))
            assert reader.files == ["state.safetensors"]
    save_file({"b": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(
        FileNotFoundError, match="holds other.safetensors, state.safetensors and no model.safetensors.index"
    ):
        open_shards(tmp_path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    _sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 shards.*model-00002-of-00002.safetensors"):
        open_shards(tmp_path)


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    _sharded(tmp_path)
    file = tmp_path / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"model-00001-of-00002.safetensors is not a complete.*again"):
        open_shards(tmp_path)


def test_index_of_another_model(tmp_path: Path) -> None:
    _sharded(tmp_path)
    save_file({"other": torch.ones(3)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"c \(in model-00002-of-00002.safetensors\)"):
        open_shards(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../x"}}'])
def test_bad_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="model.safetensors.index.json"):
        open_shards(tmp_path)


@pytest.mark.parametrize(
    ("name", "says"), [("pytorch_model.bin", "save_pretrained"), ("m.gguf", "m.gguf"), ("x.txt", "neither")]
)
def test_folder_without_safetensors(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=says):
        open_shards(tmp_path)


def test_no_folder() -> None:
    with pytest.raises(FileNotFoundError, match="meta-llama/none is not a folder.*hf download"):
        open_shards("meta-llama/none")


def test_shards_are_kept_or_divided_anew() -> None:
    infos = [TensorInfo(f"t{i}", torch.float32, (10,), "one" if i < 4 else "two") for i in range(6)]
    assert [len(shard) for shard in plan_shards(infos, None)] == [4, 2]
    assert [len(shard) for shard in plan_shards(infos, 160)] == [4, 2]
    assert [len(shard) for shard in plan_shards(infos, 159)] == [3, 3]
    assert [len(shard) for shard in plan_shards(infos, 1)] == [1] * 6
    sizes = [2, 30, 3, 3, 9, 1]
    mixed = [TensorInfo(f"t{i}", torch.float32, (size,), "one") for i, size in enumerate(sizes)]
    shards = plan_shards(mixed, 40)  # ten numbers
    assert sorted(info.key for shard in shards for info in shard) == [info.key for info in mixed]  # each once
    assert all(len(shard) == 1 or sum(info.bytes for info in shard) <= 40 for shard in shards)
    written = split_torch_state_dict_into_shards(
        {info.key: torch.empty(info.shape) for info in mixed}, max_shard_size=40
    )
    assert [[info.key for info in shard] for shard in shards] == list(written.filename_to_tensors.values())
    assert shard_names(len(shards)) == list(written.filename_to_tensors)
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(2) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_index_is_written_for_several_shards(tmp_path: Path) -> None:
    info = TensorInfo("a", torch.bfloat16, (3, 2))
    write_index(tmp_path, {"model.safetensors": [info]}, {})
    assert not list(tmp_path.iterdir())
    write_index(tmp_path, {"x": [info], "y": [TensorInfo("b", torch.float32, (1,))]}, {"total_parameters": 7})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_parameters": 7, "total_size": 16}, "weight_map": {"a": "x", "b": "y"}}


def test_sizes() -> None:
    assert [parse_size(s) for s in ("5GB", "1.5 kb", "2GiB", 7, "9")] == [5 * 10**9, 1500, 2 * 2**30, 7, 9]
    for bad in ("", "GB", "5XB", -1, "0"):
        with pytest.raises(ValueError, match="max_shard_size"):
            parse_size(bad)
