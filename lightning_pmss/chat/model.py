"""A language model that is spoken to: its tokenizer, its chat template, and its adapters by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_pmss.chat.options import AnswerOptions, ModelOptions
from lightning_pmss.datamodules.chat import ChatTemplate
from lightning_pmss.datamodules.collate import InstructionCollator
from lightning_pmss.datamodules.continuations import tokens_of
from lightning_pmss.datamodules.conversations.templates import remedy, use_template
from lightning_pmss.datamodules.prompts import own_prefix
from lightning_pmss.evaluation.generation import Generation
from lightning_pmss.files.adapter import read_adapter
from lightning_pmss.messages import some
from lightning_pmss.modules.hub import load_causal_lm, load_tokenizer
from lightning_pmss.named import adapter_names, disable_adapter, load_adapters, set_adapter

NONE = "none"
"""The name of no adapter, in a conversation."""

_REMEDY = f"{remedy('--chat-template')}, or --plain to have the model continue your text as it is"


class ChatModel:
    """A model with its tokenizer and adapters, ready to answer.

    Args:
        options: What to load.

    Raises:
        FileNotFoundError: No such model, tokenizer, adapter or template.
        ValueError: An adapter that does not fit, no usable chat template, or no such device.
    """

    def __init__(self, options: ModelOptions) -> None:
        self.options = options
        folders = named_folders(options.adapter)
        for folder in folders.values():  # before the model, which takes longer
            read_adapter(folder)
        device = device_of(options.device)
        # An adapter that was trained with added tokens has their tokenizer.
        own = [folder for folder in folders.values() if (Path(folder).expanduser() / "tokenizer_config.json").is_file()]
        without = [folder for folder in folders.values() if folder not in own]  # trained with the base's tokenizer
        first, *others = dict.fromkeys([*own, *([options.model] if without or not own else [])])
        self.tokenizer = load_tokenizer(first)
        for other in others:
            self._refuse_other_words(first, other)
        self.form = "no chat template: it continues your text"
        """How it is addressed, in words."""
        self.template = None if options.plain else self._template()
        model: Any = load_causal_lm(options.model, dtype=options.dtype)
        if own and len(self.tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(self.tokenizer))
        if folders:
            load_adapters(model, folders)
        self.model = model.to(device).eval()
        self.adapters = adapter_names(model) if folders else []
        self.active = next(iter(self.adapters), None)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.context: int | None = limit if isinstance(limit, int) and limit > 0 else None

    def _refuse_other_words(self, first: str, other: str) -> None:
        """Refuse adapters that one conversation cannot serve: of other tokens, or of other chat templates."""
        theirs = load_tokenizer(other)
        tokens, more = self.tokenizer.get_vocab().items(), theirs.get_vocab().items()
        if not (tokens <= more or more <= tokens):  # added tokens do no harm
            raise ValueError(
                f"--adapter: {first} and {other} have tokenizers with other tokens. Chat with one of the two."
            )
        asked = self.options.plain or self.options.chat_template is not None
        if not asked and theirs.chat_template != self.tokenizer.chat_template:
            raise ValueError(
                f"--adapter: {first} and {other} have other chat templates. Chat with one of the two, or name a template for"
                " both with --chat-template."
            )

    def _template(self) -> ChatTemplate:
        self.form = use_template(self.tokenizer, self.options.chat_template, _REMEDY)
        return ChatTemplate.of(self.tokenizer, _REMEDY)

    def use(self, name: str | None) -> None:
        """Make an adapter the active one; None: the base alone.

        Raises:
            ValueError: There is no such adapter.
        """
        if name is not None:
            if name not in self.adapters:
                raise ValueError(f"no adapter is called {name!r}; there are {some([*self.adapters, NONE])}.")
            set_adapter(self.model, name)
        self.active = name

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Run a block with the active adapter, or with the base alone."""
        with disable_adapter(self.model) if self.adapters and self.active is None else nullcontext():
            yield

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the text that an answer to the last message follows.

        Args:
            messages: Turns with `role` and `content`; the last one is the user's. Without a template their texts follow one
                another.
        """
        if self.template is None:
            return "".join(message["content"] for message in messages)
        turns = [dict(message) for message in messages]
        if self.options.system is not None and (not turns or turns[0]["role"] != "system"):
            turns = [{"role": "system", "content": self.options.system}, *turns]
        return self.template.prompt(turns[-1]["content"], turns[:-1])

    def tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of prompts. A template writes its own beginning of the text, so none is added to it."""
        prefix = own_prefix(self.tokenizer) if self.template is None else []
        return [prefix + ids for ids in tokens_of(self.tokenizer, prompts)]

    def answer(self, rows: Sequence[list[int]], options: AnswerOptions, streamer: Any = None) -> list[str]:
        """Answer prompts, given as tokens, in one batch.

        Args:
            rows: Tokens of each prompt; not empty.
            options: How the answers are chosen, and where they end.
            streamer: Streamer of transformers, for one prompt.
        """
        ids, mask = self._padded(rows, self.tokenizer.pad_token_id), self._padded([[1] * len(row) for row in rows], 0)
        generation = Generation(options.max_new_tokens, stop=options.stop)
        with self.speaking():
            return generation.texts(
                self.model, self.tokenizer, ids, mask, settings=options.sampling(), streamer=streamer
            )

    def _padded(self, rows: Sequence[list[int]], value: int) -> Tensor:
        return InstructionCollator.pad(list(rows), value, left=True).to(self.model.device)

    def __str__(self) -> str:
        size = sum(parameter.numel() for parameter in self.model.parameters())
        name = Path(self.options.model).expanduser().name or self.options.model
        return f"{name}: {size:,} parameters, {str(self.model.dtype).removeprefix('torch.')}, on {self.model.device}"


def named_folders(words: Sequence[str]) -> dict[str, str]:
    """Return adapter folders by name, from DIR (its last part is the name) and NAME=DIR.

    Raises:
        ValueError: A name twice, or a name that has another meaning.
    """
    found: dict[str, str] = {}
    for word in words:
        name, mark, folder = word.partition("=")
        if not mark or Path(word).expanduser().is_dir():
            name, folder = Path(word).expanduser().resolve().name, word
        if not name or name == NONE:
            raise ValueError(f"--adapter {word}: {name!r} is no name for an adapter; type NAME=DIR.")
        if name in found:
            raise ValueError(
                f"--adapter {word}: {found[name]} is called {name!r} already; type NAME=DIR to give it another name."
            )
        found[name] = folder
    return found


def device_of(name: str) -> torch.device:
    """Return the device of that name; ``auto``: the first accelerator, else the CPU.

    Raises:
        ValueError: There is no such device here.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return torch.device("cpu") if found is None else found
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name!r} is no device; type cpu, cuda, cuda:1 or mps.") from None
    known = device.type == "cpu" or found is not None and found.type == device.type
    if not known or device.type != "cpu" and (device.index or 0) >= torch.accelerator.device_count():
        here = "only the CPU" if found is None else f"cpu and {torch.accelerator.device_count()} x {found.type}"
        raise ValueError(f"--device {name}: there is no such device here, {here}. `doctor` lists the devices.")
    return device
