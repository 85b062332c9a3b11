"""Options of a conversation and of a file of prompts. The file needs no torch, so that a command's help is quick."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_pmss.methods.choices import check_choices, one_of

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelOptions:
    """Which model speaks, and in which form it is addressed.

    Args:
        model: Folder of the model (a base, or one that `merge` wrote), or its id on the model hub.
        adapter: Adapter folders, each as DIR or NAME=DIR; the first one is active.
        chat_template: Chat template in place of the tokenizer's own: a name such as `chatml`, or a file with a Jinja template.
        plain: Let the model continue the text as it is, without a chat template, as a base model needs it.
        system: System message in front of the conversation.
        dtype: Dtype of the weights. `auto` means the checkpoint's.
        device: Device, such as `cpu`, `cuda:1` or `mps`. `auto` means the first accelerator, else the CPU.

    Raises:
        ValueError: Options that exclude one another, or an unknown dtype.
    """

    model: str
    adapter: Sequence[str] = ()
    chat_template: str | None = None
    plain: bool = False
    system: str | None = None
    dtype: str = field(default="auto", metadata=one_of(*DTYPES))
    device: str = "auto"

    def __post_init__(self) -> None:
        check_choices(self)
        if self.plain and (given := [name for name in ("chat_template", "system") if getattr(self, name) is not None]):
            flag = f"--{given[0].replace('_', '-')}"
            raise ValueError(
                f"--plain continues the text as it is, so {flag} would have no effect; leave one of them out."
            )


@dataclass(frozen=True)
class AnswerOptions:
    """How an answer is chosen, and where it ends.

    Args:
        max_new_tokens: Largest number of tokens of an answer.
        temperature: 0 is greedy: the likeliest token each time. Above 0, tokens are drawn; 1 draws by the model's own
            probabilities, less sharpens them.
        top_p: Draw only from the likeliest tokens that have this probability together.
        seed: Seed of the draws.
        stop: Texts that end an answer; the answer is cut before the first of them.

    Raises:
        ValueError: An option is out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {self.max_new_tokens}: give a whole number of at least 1.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"--temperature {self.temperature}: give 0 for greedy answers, or a number such as 0.7.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p}: give a probability above 0 and up to 1, such as 0.9.")
        if self.top_p < 1 and not self.temperature:
            raise ValueError(
                f"--top-p {self.top_p} has no effect on greedy answers; give a --temperature such as 0.7 too."
            )
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: give a whole number of at least 0.")

    def sampling(self) -> dict[str, Any]:
        """Return the settings of transformers' generation config that differ from greedy ones; empty if greedy."""
        if not self.temperature:
            return {}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}

    def __str__(self) -> str:
        if not self.temperature:
            return "greedy"
        return f"sampling at temperature {self.temperature:g}, top-p {self.top_p:g}, seed {self.seed}"


@dataclass(frozen=True)
class FileOptions:
    """Which prompts are answered, and where the answers go.

    Args:
        prompts: File of prompts: .txt, one prompt a line, or .jsonl, one object a line with `prompt` or `messages` and
            perhaps `id`.
        output: File of answers to write (.jsonl). Default: they are printed.
        overwrite: Replace the file of answers, or other unfinished work of it, if it exists.
        batch_size: Prompts per batch.

    Raises:
        ValueError: An option is out of its range.
    """

    prompts: str
    output: str | None = None
    overwrite: bool = False
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"--batch-size {self.batch_size}: give a whole number of at least 1.")
