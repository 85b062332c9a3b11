"""The tokenizer of a merged model and of an adapter has the chat template that the data was rendered with."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lightning_pmss import PMSSCallback
from lightning_pmss.chat.model import ChatModel
from lightning_pmss.chat.options import ModelOptions
from lightning_pmss.datamodules import ChatDataModule
from lightning_pmss.files import merge_files
from lightning_pmss.modules import CausalLMModule
from tests.callbacks.toys import trainer

TALK = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Twelve pens."}]
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<|im_start|>' }}{% endif %}{% endfor %}"
)


@pytest.fixture
def base(tiny_llama: str, tmp_path: Path) -> Path:
    """Folder of the tiny LLaMA with the marks of ChatML as tokens and no chat template."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = None
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def fit(base: Path, tmp_path: Path, steps: int = 1, **options: Any) -> Path:
    path = tmp_path / "talk.jsonl"
    path.write_text(f"{json.dumps({'messages': TALK})}\n" * 4)
    data = ChatDataModule(
        **{"tokenizer": str(base), "path": str(path), "val_size": 0, "cache_dir": str(tmp_path / "cache"), **options}
    )
    callback = PMSSCallback(rank=16, output_dir=str(tmp_path / "out"), also_train=["model.norm", "model.embed_tokens"])
    module = CausalLMModule(
        str(base),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.03),
        lr_schedule="constant",
        warmup_ratio=0,
    )
    trainer(tmp_path, callback, max_steps=steps, max_epochs=-1).fit(module, data)
    return tmp_path / "out"


def test_plain_transformers_reads_and_stops_as_trained(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        out = fit(base, tmp_path, steps=150, template="chatml")
    for folder in ("adapter", "merged"):
        line = (
            f"The tokenizer in {out / folder} has the chat template that the data was rendered with; that of"
            " CausalLMModule has none."
        )
        assert sum(record.message == line for record in caplog.records) == 1
    merge_files(base, out / "adapter", out / "later", progress=False)
    for folder in ("adapter", "merged", "later"):
        tokenizer: Any = AutoTokenizer.from_pretrained(out / folder)
        asked = tokenizer.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True)
        assert asked == "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.apply_chat_template(TALK, tokenize=False) == f"{asked}Twelve pens.<|im_end|>\n"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for folder in ("merged", "later"):
        assert GenerationConfig.from_pretrained(out / folder).eos_token_id == [tokenizer.eos_token_id, end]
    ids = tokenizer(asked, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(out / "merged")
    said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    assert tokenizer.decode(said[0, ids.shape[1] :]) == "Twelve pens.<|im_end|>"
    chat = ChatModel(ModelOptions(str(base), adapter=[str(out / "adapter")], device="cpu"))
    assert chat.prompt(TALK[:1]) == asked
    fit(base, tmp_path, template="zephyr")  # replaces the folders
    assert "<|im_start|>" not in template_of(out / "adapter")


def template_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder).chat_template


def test_a_template_of_the_base_is_not_kept_with_the_adapter(tiny_llama: str, tmp_path: Path) -> None:
    out = fit(Path(tiny_llama), tmp_path)
    assert not (out / "adapter" / "tokenizer.json").exists()
    assert template_of(out / "merged") == template_of(Path(tiny_llama))


def test_the_trained_template_replaces_the_bases_own(base: Path, tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": "{{ 'the base' }}", "tool_use": "{{ 'calls of the base' }}"}
    tokenizer.save_pretrained(base)
    (tmp_path / "mine.jinja").write_text(MARKED)
    out = fit(base, tmp_path, template=str(tmp_path / "mine.jinja"))
    assert template_of(out / "merged") == template_of(out / "adapter") == MARKED  # and no "tool_use" beside it
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")  # not in reach of `{{ eos_token }}`, found in the data
    assert GenerationConfig.from_pretrained(out / "merged").eos_token_id == [tokenizer.eos_token_id, end]


@pytest.mark.parametrize("used", [True, False])
def test_a_tokenizer_of_the_data_is_saved_if_its_template_was_used(base: Path, tmp_path: Path, used: bool) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ 'the base' }}"
    tokenizer.save_pretrained(base)
    tokenizer.chat_template = MARKED
    tokenizer.save_pretrained(tmp_path / "other")
    (tmp_path / "text.jsonl").write_text('{"text": "Some pens."}\n')
    options = {} if used else {"path": str(tmp_path / "text.jsonl")}
    out = fit(base, tmp_path, tokenizer=str(tmp_path / "other"), **options)
    assert template_of(out / "merged") == (MARKED if used else "{{ 'the base' }}")
    assert (out / "adapter" / "tokenizer.json").is_file() is used
