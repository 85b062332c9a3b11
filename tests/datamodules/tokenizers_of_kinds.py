"""Small tokenizers of each kind that treats the beginning of a text, or a border within it, in a way of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Question: Ann has 3 boxes with 4 pens each. How many pens does Ann have?\nAnswer: 3 * 4 = 12\n#### 12",
    "the correct answer is answer1, the correct answer is true, the end of the text",
    "Below is an instruction. ### Response: Let's think step by step. It is 12. ### Instruction:",
]
SPECIAL = ["<unk>", "<s>", "</s>"]
UNK, BOS, EOS = SPECIAL


def _bpe(backend: Any, trained_on: list[str] = CORPUS, **options: Any) -> Any:
    alphabet = sorted({char for text in trained_on for char in text} | {chr(code) for code in range(33, 127)} | {"\n"})
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, show_progress=False, **{"initial_alphabet": alphabet, **options}
    )
    backend.train_from_iterator(trained_on, trainer)
    return backend


def prepend() -> Any:
    """LLaMA's old form: a normalizer puts a blank in front of each text, and nothing else splits it."""
    backend = Tokenizer(models.BPE(unk_token=UNK, byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.pre_tokenizer = pre_tokenizers.Split(
        "\u2581", "merged_with_next"
    )  # in training only: merges begin at words
    _bpe(backend)
    backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def metaspace(scheme: str) -> Any:
    """LLaMA's new form ("first"), or T5's ("always"), with BPE."""
    backend = Tokenizer(models.BPE(unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _bpe(backend)


def unigram() -> Any:
    """SentencePiece's other model."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    letters = sorted({char for text in CORPUS for char in text} | {chr(code) for code in range(33, 127)})
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIAL, unk_token=UNK, initial_alphabet=letters, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def byte_level(add_prefix_space: bool = False, use_regex: bool = True, more: list[str] | None = None) -> Any:
    """GPT-2's form; with ``add_prefix_space`` RoBERTa's; without regular expression it merges across words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    return _bpe(backend, CORPUS + (more or []), initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


MAKERS: dict[str, Callable[[], Any]] = {
    "prepend": prepend,
    "metaspace_first": lambda: metaspace("first"),
    "metaspace_always": lambda: metaspace("always"),
    "unigram": unigram,
    "prefix_space": lambda: byte_level(add_prefix_space=True),
    "byte_level": byte_level,
}


def make(kind: str, bos: bool = False, eos: bool = False) -> Any:
    """A tokenizer of one kind; ``bos`` and ``eos``: it puts these tokens around each text."""
    return wrap(MAKERS[kind](), bos, eos)


def wrap(backend: Any, bos: bool = False, eos: bool = False) -> Any:
    """A tokenizer of transformers around a backend."""
    if bos or eos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}",
            special_tokens=[(text, backend.token_to_id(text)) for text in ("<s>", "</s>")],
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, unk_token=UNK, pad_token=EOS)
