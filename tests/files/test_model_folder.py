"""What a merge takes from the base's folder beside the weights: what belongs to a model, and nothing from outside of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_pmss.files import merge_files, save_adapter, write_merged
from lightning_pmss.store.shards import INDEX_FILE

TOKENIZER = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
WRITTEN = {"config.json", "generation_config.json", "model.safetensors", "merge_report.json"} | TOKENIZER


@pytest.fixture
def base(tiny_llama: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "models" / "base"))


@pytest.fixture
def adapter(tiny_llama: str, tmp_path: Path, train: Any) -> Path:
    return save_adapter(
        train(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)), tmp_path / "adapter"
    )


def below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def live(base: Path, train: Callable[..., nn.Module]) -> nn.Module:
    return train(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))


def test_training_runs_caches_and_circles_stay_behind(base: Path, adapter: Path, tmp_path: Path, train: Any) -> None:
    """A base that was trained in: everything that transformers, Lightning and git leave beside a model."""
    junk = [
        "checkpoint-500/config.json", "checkpoint-500/optimizer.pt", "runs/Nov28/events.out.tfevents.1", ".git/HEAD",
        ".cache/huggingface/x", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin",
        "pytorch_model.bin", "tf_model.h5", "model.gguf", "model.onnx", "notes.txt", "data.jsonl", ".env", "wandb/run/x",
        "adapter_config.json", "original/params.json", "merge_report.json", "vocab\n.txt", "a.png",
    ]  # fmt: skip
    wanted = [
        "README.md", "LICENSE.txt", "USE_POLICY.md", "merges.txt", "vocab.json", "tokenizer.model", "qwen.tiktoken",
        "preprocessor_config.json", "modeling_own.py", "additional_chat_templates/tools.jinja", "modules.json",
        "1_Pooling/config.json", "custom_generate/generate.py", "source.spm", "sentencepiece.bpe.model", "tekken.json",
    ]  # fmt: skip
    model = live(base, train)
    for name in [*junk, *wanted]:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)
    for name, place in (("a", "."), ("b", "."), ("up", ".."), ("itself", "itself")):
        (base / name).symlink_to(place)
    os.mkfifo(base / "added_tokens.json")  # would block whoever opens it
    report = merge_files(base, adapter, tmp_path / "merged", progress=False)
    assert below(tmp_path / "merged") == WRITTEN | set(wanted)
    assert set(report.copied_files) == below(tmp_path / "merged") - {"model.safetensors", "merge_report.json"}
    assert {"runs/", "checkpoint-500/", "a", "b", "notes.txt", "added_tokens.json"} <= set(report.not_copied)
    assert "not copied from the base: .cache/" in str(report)
    assert "\n" not in str(report)
    live_report = write_merged(model, tmp_path / "live", base=base)
    assert below(tmp_path / "live") == below(tmp_path / "merged")
    assert live_report.not_copied == report.not_copied


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "additional_chat_templates/x.jinja"])
def test_a_link_out_of_the_base_is_not_copied(base: Path, adapter: Path, tmp_path: Path, name: str, train: Any) -> None:
    """A downloaded folder could otherwise carry a private file into a model that is then published."""
    secret = tmp_path / "secret"
    secret.write_text("my key")
    model = live(base, train)
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(secret)
    with pytest.raises(ValueError, match=rf"{base / name} is a link to {secret}, outside of the base.*cp "):
        merge_files(base, adapter, tmp_path / "merged", progress=False)
    assert not (tmp_path / "merged").exists()
    # At the end of a training the model is written all the same, and the report says what it lacks.
    report = write_merged(model, tmp_path / "merged", base=base)
    assert f"{name} (a link out of the folder)" in report.not_copied
    assert name not in below(tmp_path / "merged")
    assert all(b"my key" not in file.read_bytes() for file in (tmp_path / "merged").rglob("*") if file.is_file())


def test_a_folder_that_is_a_link_is_not_entered(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.jinja").write_text("my key")
    (base / "additional_chat_templates").symlink_to(tmp_path / "outside")
    merge_files(base, adapter, tmp_path / "merged", progress=False)
    assert below(tmp_path / "merged") == WRITTEN


def test_links_within_the_base_and_into_the_hub_s_blobs_are_the_model_s(
    tiny_llama: str, adapter: Path, tmp_path: Path
) -> None:
    """The hub's cache: ``snapshots/<commit>/<file>`` is a link to ``blobs/<hash>``."""
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(Path(tiny_llama).iterdir()):
        shutil.copyfile(file, repository / "blobs" / f"{number}")
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / f"{number}")
    (snapshot / "LICENSE").symlink_to("README.md")
    (snapshot / "README.md").write_text("card")
    (tmp_path / "link").symlink_to(snapshot)
    merge_files(tmp_path / "link", adapter, tmp_path / "merged", progress=False)
    assert below(tmp_path / "merged") == WRITTEN | {"LICENSE", "README.md"}
    assert (tmp_path / "merged" / "LICENSE").read_text() == "card"
    assert not [path for path in (tmp_path / "merged").iterdir() if path.is_symlink()]
    (repository / "private").write_text("my key")
    (snapshot / "NOTICE").symlink_to("../../private")
    with pytest.raises(ValueError, match="outside of the base"):
        merge_files(snapshot, adapter, tmp_path / "merged", overwrite=True, progress=False)


def test_shards_of_other_names_get_the_usual_ones(
    sharded_llama: str, tmp_path: Path, train: Any, logits: Callable[[nn.Module], torch.Tensor]
) -> None:
    """So that the merged folder holds names of ours alone, and may be overwritten."""
    base = Path(shutil.copytree(sharded_llama, tmp_path / "base"))
    index = json.loads((base / INDEX_FILE).read_text())
    names = {old: f"part{number}.safetensors" for number, old in enumerate(sorted(set(index["weight_map"].values())))}
    for old, new in names.items():
        (base / old).rename(base / new)
    index["weight_map"] = {key: names[file] for key, file in index["weight_map"].items()}
    (base / INDEX_FILE).write_text(json.dumps(index))
    model = train(AutoModelForCausalLM.from_pretrained(sharded_llama, dtype=torch.float32))
    save_adapter(train(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)), tmp_path / "adapter")
    for overwrite in (False, True):
        report = merge_files(base, tmp_path / "adapter", tmp_path / "merged", overwrite=overwrite, progress=False)
    assert report.shards == [
        f"model-{number:05d}-of-{len(names):05d}.safetensors" for number in range(1, len(names) + 1)
    ]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(model), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("content", ["[]", "[" * 5000, '{"dtype": "float32", "dtype": "float32"}', "\x00"])
def test_a_config_that_is_none(base: Path, adapter: Path, tmp_path: Path, content: str) -> None:
    (base / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"base/config\.json is (not readable JSON|no JSON object).*Copy or download"):
        merge_files(base, adapter, tmp_path / "merged", dtype="bfloat16", progress=False)
    assert not (tmp_path / "merged").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
