"""Tensors that no file of the base holds: known, kept with the adapter, refused where they are missing, and merged."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from lightning_pmss import export_lora, load_adapter, save_adapter
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.files import merge_files, read_adapter, write_merged
from lightning_pmss.files.fresh import fresh_tensors
from lightning_pmss.inspect.inspection import inspect_adapter
from lightning_pmss.named import combine_adapters, load_adapters, set_adapter
from tests.files.fresh_models import close, logits, trained

VOCABULARY = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
Build = Callable[[Path], Any]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=request.param)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def resized(more: int, **options: Any) -> Build:
    def build(folder: Path) -> Any:
        model = plain(folder)
        model.resize_token_embeddings(VOCABULARY + more, **options)
        return model

    return build


def classifier(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5)


def with_changed_rows(folder: Path) -> Any:
    model = resized(3)(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] += 1
    return model


BUILDS: dict[str, tuple[Build, dict[str, Any]]] = {
    "tokens added": (resized(3), {}),
    "tokens removed": (resized(-4), {}),
    "padded": (resized(3, pad_to_multiple_of=32), {}),
    "old rows changed": (with_changed_rows, {}),
    "tokens added and trained": (resized(3), {"also_train": ["embed_tokens"]}),
    "head": (classifier, {}),
    "head trained": (classifier, {"also_train": ["score"]}),
}


@pytest.mark.parametrize("name", BUILDS)
def test_in_a_new_process_the_adapter_gives_what_was_trained(name: str, base: Path, tmp_path: Path) -> None:
    build, options = BUILDS[name]
    torch.manual_seed(5)
    model = trained(build(base), **options)
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter")

    torch.manual_seed(6)  # another process makes other random values
    again = build(base)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    load_adapter(again, tmp_path / "adapter")
    close(logits(again), expected)
    assert before == {n: p.requires_grad for n, p in again.named_parameters()}  # what was frozen stays frozen
    named = build(base)
    load_adapters(named, {"a": tmp_path / "adapter"})
    close(logits(named), expected)

    loader = type(model)
    merge_files(base, tmp_path / "adapter", tmp_path / "streamed", progress=False)
    write_merged(model, tmp_path / "live")
    for folder in ("streamed", "live"):
        merged = loader.from_pretrained(tmp_path / folder)
        close(logits(merged), expected)
        assert merged.config.vocab_size == model.config.vocab_size
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["architectures"] == [type(model).__name__]
    export_lora(model, tmp_path / "lora", progress=False)


def test_only_the_new_rows_are_kept(base: Path, tmp_path: Path) -> None:
    model = trained(resized(3)(base))
    save_adapter(model, tmp_path / "adapter")
    kept = read_adapter(tmp_path / "adapter").fresh["model.embed_tokens.weight"]
    assert (kept.start, kept.value.shape, kept.shape) == (VOCABULARY, (3, 32), (VOCABULARY + 3, 32))
    assert torch.equal(kept.value, model.model.embed_tokens.weight[VOCABULARY:])
    text = str(inspect_adapter(tmp_path / "adapter"))
    assert "in no file of the base: model.embed_tokens.weight [67, 32]" in text


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        (
            "tokens added",
            plain,
            r"\[67, 32\], the model's \[64, 32\].*\+3 tokens: call model\.resize_token_embeddings\(67\)",
        ),
        ("tokens added", resized(5), r"\[67, 32\], the model's \[69, 32\].*-2 tokens: call model\.resize_token_emb"),
        ("tokens removed", plain, r"-4 tokens: call model\.resize_token_embeddings\(60\) before"),
        ("tokens added and trained", plain, r"\+3 tokens: call model\.resize_token_embeddings\(67\)"),
        (
            "head",
            plain,
            r"contains score\.weight, which this LlamaForCausalLM does not have.*LlamaForSequenceClassification",
        ),
        ("head trained", plain, r"has score\.weight, which the model does not have"),
    ],
)
def test_a_model_without_them_is_refused_and_untouched(
    name: str, other: Build, message: str, base: Path, tmp_path: Path
) -> None:
    build, options = BUILDS[name]
    save_adapter(trained(build(base), **options), tmp_path / "adapter")
    model = other(base)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for load in (
        lambda: load_adapter(model, tmp_path / "adapter"),
        lambda: load_adapters(model, {"a": tmp_path / "adapter"}),
    ):
        with pytest.raises(ValueError, match=message):
            load()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not adapted_layers(model)


@pytest.mark.parametrize("name", ["tokens added", "head"])
def test_the_card_says_how_to_build_the_model(name: str, base: Path, tmp_path: Path) -> None:
    build, options = BUILDS[name]
    model = trained(build(base), **options)
    save_adapter(model, tmp_path / "adapter")
    code = (tmp_path / "adapter" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    space: dict[str, Any] = {}
    exec(code.replace("THIS_FOLDER", str(tmp_path / "adapter")), space)  # noqa: S102
    close(logits(space["model"]), logits(model))


def test_a_head_that_neither_the_base_nor_the_adapter_holds_is_warned_about(base: Path, tmp_path: Path) -> None:
    """As an adapter of an early version that was trained beside a frozen head, or a model that got one later."""
    save_adapter(trained(plain(base)), tmp_path / "adapter")
    with pytest.warns(UserWarning, match=r"score\.weight: neither in the files of the base nor in .*adapter"):
        load_adapter(classifier(base), tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*belong to no linear layer")
        load_adapter(plain(base), tmp_path / "adapter")


def test_nothing_is_fresh_where_all_is_in_the_files(base: Path, tmp_path: Path) -> None:
    assert fresh_tensors(plain(base)) == {}
    assert fresh_tensors(plain(base).model) == {}  # the body of the same checkpoint
    plain(base).model.save_pretrained(tmp_path / "body")
    model = plain(tmp_path / "body")
    assert fresh_tensors(model) == ({} if model.config.tie_word_embeddings else {"lm_head.weight": 0})
    assert fresh_tensors(LlamaForCausalLM(LlamaConfig(**SIZES))) == {}  # no files are known
    assert fresh_tensors(nn.Sequential(nn.Linear(2, 2))) == {}


def test_fused_experts_are_in_the_files_under_other_names(tmp_path: Path) -> None:
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    model.save_pretrained(tmp_path / "base")
    assert any(".experts.0." in key for key in load_file(tmp_path / "base" / "model.safetensors"))
    assert fresh_tensors(plain(tmp_path / "base")) == {}


def gpt2(folder: Path) -> Path:
    torch.manual_seed(1)
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50, n_positions=8, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def longer(folder: Path) -> Any:
    model = plain(folder)
    old = model.transformer.wpe.weight.detach()
    model.transformer.wpe = nn.Embedding(12, 32)
    with torch.no_grad():
        model.transformer.wpe.weight[:8] = old
    model.config.n_positions = 12
    return model


def test_more_positions(tmp_path: Path) -> None:
    base = gpt2(tmp_path / "base")
    model = trained(longer(base))
    ids = torch.arange(11)[None]
    save_adapter(model, tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter").fresh["transformer.wpe.weight"].start == 8
    again = longer(base)
    load_adapter(again, tmp_path / "adapter")
    close(logits(again, ids), logits(model, ids))
    with pytest.raises(
        ValueError, match=r"wpe\.weight has the shape \[12, 32\], the model's \[8, 32\]\. Build the model with"
    ):
        load_adapter(plain(base), tmp_path / "adapter")
    merge_files(base, tmp_path / "adapter", tmp_path / "merged", progress=False)
    merged = plain(tmp_path / "merged")
    assert merged.config.n_positions == 12
    close(logits(merged, ids), logits(model, ids))


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(32))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def with_a_module(folder: Path) -> Any:
    model = plain(folder)
    model.model.norm = nn.Sequential(model.model.norm, Gate())
    return model


def test_a_module_that_was_put_in(tmp_path: Path) -> None:
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "base")
    torch.manual_seed(5)
    model = trained(with_a_module(tmp_path / "base"))
    save_adapter(model, tmp_path / "adapter")
    torch.manual_seed(6)
    again = with_a_module(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    close(logits(again), logits(model))
    with pytest.raises(ValueError, match=r"contains model\.norm\.\S*, which this LlamaForCausalLM does not have"):
        load_adapter(plain(tmp_path / "base"), tmp_path / "adapter")


def test_adapters_with_heads_of_their_own(base: Path, tmp_path: Path) -> None:
    expected = {}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = trained(classifier(base))
        expected[name] = logits(model)
        save_adapter(model, tmp_path / name)
    model = classifier(base)
    load_adapters(model, {name: tmp_path / name for name in "ab"})
    for name in "aba":
        set_adapter(model, name)
        close(logits(model), expected[name])
    with pytest.raises(ValueError, match=r"'a' and 'b' were trained with different values of `score\.weight`"):
        combine_adapters(model, "both", {"a": 0.5, "b": 0.5})


def test_the_tokenizer_that_knows_the_added_tokens_goes_with_them(tiny_llama: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens(["<a>", "<b>", "<c>"])
    model = plain(Path(tiny_llama))
    model.resize_token_embeddings(len(tokenizer))
    save_adapter(trained(model), tmp_path / "adapter", tokenizer=tokenizer)
    save_adapter(model, tmp_path / "adapter", tokenizer=tokenizer, overwrite=True)
    merge_files(tiny_llama, tmp_path / "adapter", tmp_path / "merged", progress=False)
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert len(merged) == len(tokenizer)
    assert merged.convert_tokens_to_ids("<b>") == len(tokenizer) - 2
    save_adapter(
        trained(plain(Path(tiny_llama))), tmp_path / "plain", tokenizer=tokenizer
    )  # nothing was added to this one
    assert not (tmp_path / "plain" / "tokenizer.json").exists()


def test_settings_of_a_foreign_file_cannot_name_code(base: Path, tmp_path: Path) -> None:
    save_adapter(trained(resized(3)(base)), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(file.read_text())
    content["settings"]["auto_map"] = {"AutoModel": "evil.Model"}
    file.write_text(
        json.dumps(content | {"settings": content["settings"] | {"tie_word_embeddings": 1, "model_type.x": 3}})
    )
    with pytest.raises(ValueError, match="the size in its settings \\(tie_word_embeddings, model_type.x\\)"):
        merge_files(base, tmp_path / "adapter", tmp_path / "merged", progress=False)
    file.write_text(json.dumps(content))
    merge_files(base, tmp_path / "adapter", tmp_path / "merged", progress=False)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    before = json.loads((base / "config.json").read_text())
    assert {k: v for k, v in config.items() if before.get(k) != v} == {"vocab_size": 67}


def test_an_early_adapter_whose_grown_embedding_was_trained_is_merged(base: Path, tmp_path: Path) -> None:
    """Format 1 knows nothing of sizes: the vocabulary's is the one that changes with the rows."""
    model = trained(resized(3)(base), also_train=["embed_tokens", "lm_head"])
    save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(file.read_text())
    for name in ("tensors", "fresh", "settings", "root", "left_out"):
        del content[name]
    file.write_text(json.dumps(content | {"format_version": 1}))
    merge_files(base, tmp_path / "adapter", tmp_path / "merged", progress=False)
    merged = plain(tmp_path / "merged")
    assert merged.config.vocab_size == 67
    close(logits(merged), logits(model))


def test_a_base_with_fewer_rows_is_refused(base: Path, tmp_path: Path) -> None:
    save_adapter(trained(resized(3)(base)), tmp_path / "adapter")
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:60].clone()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"takes its first 64 rows from the base, whose \S+ has 60"):
        merge_files(base, tmp_path / "adapter", tmp_path / "merged", progress=False)
    assert not (tmp_path / "merged").exists()
