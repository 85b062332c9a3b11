"""What lies beside the weights in the merged model's folder, wherever tokenizer and base live."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from huggingface_hub import constants
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_pmss import PMSSCallback, PMSSConfig, convert
from lightning_pmss.files import load_adapter, merge_files, read_adapter, save_adapter, write_merged
from tests.callbacks.toys import trainer

FIRST, SECOND = "a" * 40, "b" * 40


def lay(cache: Path, name: str, commit: str, source: Path, ref: str | None = None) -> Path:
    """A snapshot as the hub's cache keeps it: links into a folder of blobs."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot, blobs, refs = repository / "snapshots" / commit, repository / "blobs", repository / "refs"
    for folder in (snapshot, blobs, refs):
        folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        blob = blobs / f"{commit[:4]}-{file.name}"
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    if ref is not None:
        (refs / ref).write_text(commit)
    return snapshot


@pytest.fixture
def cache(tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with org/tiny: ``main`` is FIRST, ``v2`` is SECOND with other weights."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    (base / "generation_config.json").write_text(json.dumps({"do_sample": False, "max_new_tokens": 7}))
    (base / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "None"}))
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    lay(folder, "org/tiny", FIRST, base, "main")
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(base)
    lay(folder, "org/tiny", SECOND, base, "v2")
    return folder


class Tokens(L.LightningDataModule):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        vars(self).update(attributes)

    def train_dataloader(self) -> Any:
        tokens = torch.randint(0, 300, (8, 6), generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(tokens), batch_size=4, collate_fn=getattr(self, "collate", None))


class Language(L.LightningModule):
    """Anyone's module around a model that was loaded by its id; it has no tokenizer."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        self.model: Any = AutoModelForCausalLM.from_pretrained(name, **options)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


def fit(folder: Path, module: L.LightningModule, data: Tokens) -> Path:
    callback = PMSSCallback(rank=4, output_dir=folder / "out")
    trainer(folder, callback, max_epochs=1).fit(module, data)
    return folder / "out"


@pytest.mark.parametrize(("revision", "commit"), [(None, FIRST), ("v2", SECOND), (SECOND, SECOND)])
def test_base_is_a_hub_id(cache: Path, tmp_path: Path, revision: str | None, commit: str) -> None:
    """The commit is told by the weights, tokenizer and settings come from that snapshot, and its licence is in the card."""
    module = Language("org/tiny", **({} if revision is None else {"revision": revision}))
    out = fit(tmp_path, module, Tokens())
    stored = read_adapter(out / "adapter")
    assert (stored.base_model, stored.revision) == ("org/tiny", commit)
    card = (out / "adapter" / "README.md").read_text()
    assert f"- Base: org/tiny, revision {commit}" in card
    assert "license: mit" in card
    assert AutoTokenizer.from_pretrained(out / "merged").chat_template
    assert json.loads((out / "merged" / "generation_config.json").read_text())["max_new_tokens"] == 7
    assert (out / "merged" / "preprocessor_config.json").is_file()
    merged, plain = AutoModelForCausalLM.from_pretrained(out / "merged"), Language("org/tiny", revision=commit)
    load_adapter(plain.model, out / "adapter")
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, plain.model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_base_is_the_path_of_a_snapshot(cache: Path, tmp_path: Path) -> None:
    out = fit(tmp_path, Language(str(cache / "models--org--tiny" / "snapshots" / SECOND)), Tokens())
    stored = read_adapter(out / "adapter")
    assert (stored.base_model, stored.revision) == ("org/tiny", SECOND)


def test_commit_is_not_guessed_where_the_weights_are_of_none(cache: Path, tmp_path: Path) -> None:
    model = Language("org/tiny").model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    convert(model, PMSSConfig(rank=4))
    save_adapter(model, tmp_path / "adapter")
    stored = read_adapter(tmp_path / "adapter")
    assert (stored.base_model, stored.revision) == ("org/tiny", None)


def test_our_module_knows_what_it_loaded(cache: Path) -> None:
    from lightning_pmss.modules.hub import load_causal_lm

    for revision, commit in ((None, FIRST), ("main", FIRST), ("v2", SECOND), (SECOND, SECOND)):
        model = load_causal_lm("org/tiny", revision=revision)
        assert model.config._commit_hash == commit


class Collate:
    def __init__(self, tokenizer: Any) -> None:
        self.processing_class = tokenizer

    def __call__(self, rows: list[Any]) -> list[Any]:
        return [torch.stack([row[0] for row in rows])]


@pytest.mark.parametrize("place", ["object", "name", "other name", "collate", "none"])
def test_tokenizer_of_the_data_goes_before_the_bases(
    tiny_tokenizer: str, cache: Path, tmp_path: Path, place: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    tokenizer.chat_template = "the data's"
    tokenizer.save_pretrained(tmp_path / "own")
    data = {
        "object": {"tokenizer": tokenizer},
        "name": {"tokenizer": str(tmp_path / "own")},
        "other name": {"text_encoder": tokenizer},
        "collate": {"collate": Collate(tokenizer)},
        "none": {},
    }[place]
    out = fit(tmp_path, Language("org/tiny"), Tokens(**data))
    template = AutoTokenizer.from_pretrained(out / "merged").chat_template
    assert (template == "the data's") is (place != "none")
    card = (out / "adapter" / "README.md").read_text()
    assert ("- tokenizer: " in card) is (place != "none")
    files = json.loads((out / "merged" / "merge_report.json").read_text())["files"]
    assert sorted(files) == sorted(
        p.name for p in (out / "merged").iterdir()
    )  # all are ours, to be replaced by a next run


def test_a_model_called_tokenizer_is_no_tokenizer(cache: Path, tmp_path: Path, tiny_llama: str) -> None:
    module = Language("org/tiny")
    other = AutoModelForCausalLM.from_pretrained(tiny_llama)
    out = fit(tmp_path, module, Tokens(tokenizer=other))
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert not torch.equal(merged.model.layers[0].mlp.up_proj.weight, other.model.layers[0].mlp.up_proj.weight)


def test_several_parts_are_written(tiny_llama: str, tmp_path: Path) -> None:
    class Part:
        def __init__(self, name: str) -> None:
            self.name = name

        def save_pretrained(self, folder: Path) -> None:
            (folder / self.name).write_text(self.name)

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    convert(model, PMSSConfig(rank=4))
    write_merged(model, tmp_path / "merged", tokenizer=[Part("one.json"), Part("two.json")])
    save_adapter(model, tmp_path / "adapter")
    merge_files(tiny_llama, tmp_path / "adapter", tmp_path / "streamed", tokenizer=Part("three.json"), progress=False)
    for name, own in (("merged", {"one.json", "two.json"}), ("streamed", {"three.json"})):
        written = {p.name for p in (tmp_path / name).iterdir()}
        assert own | {"tokenizer.json", "config.json"} <= written
        assert set(json.loads((tmp_path / name / "merge_report.json").read_text())["files"]) == written
