"""A merged model stops where its responses ended in training: at the end of a turn that is not the base's end of sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from lightning_pmss import PMSSCallback
from lightning_pmss.datamodules import Example, InstructionDataModule
from lightning_pmss.datamodules.instruction import Split
from lightning_pmss.modules import CausalLMModule
from tests.callbacks.toys import trainer


class Rows(InstructionDataModule):
    def load_examples(self, split: Split) -> list[Example] | None:
        return [Example(f"What is {n} + 1?", str(n + 1)) for n in range(4)] if split == "train" else None


@pytest.mark.parametrize(
    ("style", "mark"), [("chat", "<|im_start|>"), ("chat", "<|endoftext|>"), ("plain", "<|im_start|>")]
)
def test_the_merged_models_generation_config(tiny_llama: str, tmp_path: Path, style: str, mark: str) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '" + mark + "\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = Rows(str(tmp_path / "tokenizer"), prompt_style=style, val_size=0, cache_dir=str(tmp_path / "cache"))
    callback = PMSSCallback(rank=4, output_dir=str(tmp_path / "out"))
    trainer(tmp_path, callback, max_steps=1).fit(CausalLMModule(tiny_llama), data)
    ends = GenerationConfig.from_pretrained(tmp_path / "out" / "merged").eos_token_id
    eos, end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(mark)
    assert ends == ([eos, end] if style == "chat" and end != eos else eos)
    assert GenerationConfig.from_pretrained(tiny_llama).eos_token_id == eos
