"""Make prompts of questions, in the named styles of the literature, and tokens of prompts and responses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_pmss.datamodules.chat import ChatTemplate, turns
from lightning_pmss.datamodules.continuations import continued

_CACHE_FORMAT = 4  # part of the names of cached files: raise it when the output of `PromptEncoder` changes
_SHOT_GAP = "\n\n"  # between worked examples, as in lm_eval and the papers


class Example(NamedTuple):
    """One example before tokenisation."""

    question: str
    response: str
    target: Any = None
    """What answers are scored against: a text, or lists of texts. ``None``: the response."""
    group: str | None = None
    """What examples that belong together share, such as their passage: they are held out for validation together."""
    kind: str | None = None
    """What ``train_limit_by`` keeps the shares of, such as the task; no part of the tokens, nor of their cache's key."""


_HASHED = Example._fields.index("kind")  # the fields before it are in the key of cached tokens


def check_examples(owner: str, split: str, examples: Sequence[Example]) -> None:
    """Raise ``ValueError`` unless a subclass's ``load_examples`` returned examples that can be tokenised."""
    for number, example in enumerate(examples):
        texts = example[:2] if isinstance(example, Example) else ()
        if len(texts) != 2 or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(
                f"`{owner}.load_examples({split!r})`: example {number} is {str(example)[:80]!r}; it must be an"
                " Example(question, response) of two texts that are not empty."
            )


@dataclass(frozen=True)
class PromptStyle:
    """Template of the prompt, and the texts around the response.

    Args:
        template: The prompt, with ``{question}`` in it.
        eval_template: The prompt of evaluation, if the literature's differs; null: the same.
        lead: Text between prompt and response. It belongs to the response's tokens.
        tail: Text between the response and the end-of-sequence token.
    """

    template: str
    eval_template: str | None = None
    lead: str = " "
    tail: str = ""


_BELOW = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_INDENT = 16 * " "  # of LLM-Adapters' source, which is inside of its string

STYLES = {
    # LLM-Adapters (`finetune.py`, `commonsense_evaluate.py`): two blanks and a line of blanks in training, one blank and
    # an empty line in evaluation.
    "llm_adapters": PromptStyle(
        f"{_BELOW}  \n\n{_INDENT}### Instruction:\n{_INDENT}{{question}}\n{_INDENT}\n{_INDENT}### Response:\n{_INDENT}",
        f"{_BELOW} \n\n{_INDENT}### Instruction:\n{_INDENT}{{question}}\n\n{_INDENT}### Response:\n{_INDENT}",
        lead="",
    ),
    # MetaMath (`train_math.py`, `eval_gsm8k.py`), PiSSA (`train.py`): the response follows without a blank.
    "metamath": PromptStyle(
        f"{_BELOW}\n\n### Instruction:\n{{question}}\n\n### Response:",
        f"{_BELOW}\n\n### Instruction:\n{{question}}\n\n### Response: Let's think step by step.",
        lead="",
    ),
}
"""Styles that every data module has, byte for byte those of the literature."""


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a folder or hub id.

    Raises:
        ValueError: If it cannot be loaded; the message says what to type.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"Could not load the tokenizer {name!r} ({reason}). Give the folder of a model with its tokenizer files, or a"
            " hub id, as --model.model_name_or_path or --data.tokenizer. `python examples/smollm2.py` makes"
            " models/SmolLM2-135M-Instruct without the hub."
        ) from error


def own_prefix(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer puts in front of a text: a beginning-of-sequence token, or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    starts = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
    return list(full[: starts[0]]) if starts else []


def tokenizer_spec(tokenizer: Any) -> Any:
    """Return all that determines the tokens of a text, for JSON."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    spec = json.loads(backend.to_str())
    # A tokenizer remembers the padding and truncation of its last call. They are off here.
    spec.pop("padding", None)
    spec.pop("truncation", None)
    return spec


@dataclass
class PromptEncoder:
    """Turns a batch of question and response texts into token ids; a picklable callable for ``datasets.map``.

    Prompt and response are read as one text (`continuations`), with a border between two tokens,
    so that the loss is on the response alone and the prompt has the same tokens in training and in generation. A response
    ends in the end-of-sequence token; in the chat style in the end of the assistant's turn in the template
    (`lightning_pmss.datamodules.chat`).

    Args:
        tokenizer: A tokenizer with an end-of-sequence token.
        style: "chat" applies the chat template; any other name fills ``template``.
        template: The prompt, with ``{question}`` in it.
        lead: Text between prompt and response; not in the chat style.
        tail: Text between the response and the end-of-sequence token; not in the chat style.
        shots: Worked examples in front of each question, with an empty line between (in the chat style: earlier turns).
    """

    tokenizer: Any
    style: str
    template: str
    lead: str = " "
    tail: str = ""
    shots: tuple[Example, ...] = ()

    def __post_init__(self) -> None:
        name = getattr(self.tokenizer, "name_or_path", "")
        self.chat = ChatTemplate.of(self.tokenizer) if self.style == "chat" else None
        if self.chat is None and self.tokenizer.eos_token_id is None:
            raise ValueError(f"The tokenizer {name!r} has no end-of-sequence token, so no response would ever end.")
        self.end_id = int(self.tokenizer.eos_token_id if self.chat is None else self.chat.end_id)
        """The token that ends each response."""
        self.prefix = own_prefix(self.tokenizer)

    def prompt(self, question: str) -> str:
        """Return the prompt text of ``question``, without the tokens that the tokenizer itself puts in front of it."""
        if self.chat is not None:
            return self.chat.prompt(question, self._earlier)
        ask = self.template.replace
        worked = "".join(ask("{question}", q) + self.lead + response + _SHOT_GAP for q, response, *_ in self.shots)
        return worked + ask("{question}", question)

    @property
    def _earlier(self) -> list[dict[str, str]]:
        return turns(*((question, response) for question, response, *_ in self.shots))

    def _answers(self, prompts: list[str], questions: list[str], responses: list[str]) -> list[str]:
        """Return the texts behind the prompts; in the chat style with the end of the turn."""
        if self.chat is None:
            return [self.lead + response + self.tail for response in responses]
        triples = zip(prompts, questions, responses, strict=True)
        return [self.chat.answer(*triple, self._earlier) for triple in triples]

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return the columns prompt, prompt_ids, response_ids (ends with ``end_id``), prompt_length and length."""
        prompts = [self.prompt(question) for question in batch["question"]]
        answers = self._answers(prompts, batch["question"], batch["response"])
        prompt_ids, response_ids = continued(self.tokenizer, prompts, answers)
        if self.chat is None:
            prompt_ids = [self.prefix + ids for ids in prompt_ids]
            response_ids = [[*ids, self.end_id] for ids in response_ids]
        return {
            "prompt": prompts,
            "prompt_ids": prompt_ids,
            "response_ids": response_ids,
            "prompt_length": [len(ids) for ids in prompt_ids],
            "length": [len(p) + len(r) for p, r in zip(prompt_ids, response_ids, strict=True)],
        }

    def fingerprint(self, examples: Sequence[Example], ids: Sequence[int] | None = None) -> str:
        """Return a hash of the texts, their ids if given, and all that determines their tokens; equal in every process."""
        settings = [
            _CACHE_FORMAT,
            tokenizer_spec(self.tokenizer),
            self.style,
            [self.template, self.lead, self.tail]
            if self.chat is None
            else [self.tokenizer.chat_template, self.tokenizer.special_tokens_map],  # templates name special tokens
            self.prefix,
            self.end_id,
            None if ids is None else list(ids),
            [shot[:_HASHED] for shot in self.shots],
        ]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for example in examples:
            digest.update(json.dumps(example[:_HASHED]).encode())
        return digest.hexdigest()[:32]
