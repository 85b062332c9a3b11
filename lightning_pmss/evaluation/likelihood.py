"""Choose the likeliest of the candidate answers, without generation.

A candidate is the gold response with its label replaced by another ("the correct answer is answer2" for "... answer4"), for
each label that the prompt offers. So candidates look like the responses that the model is trained on, and do not reveal the
gold label.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_pmss.datamodules.continuations import continued, decoded
from lightning_pmss.metrics.base import text_metric

IGNORED = -100  # label of a position without loss, as in PyTorch and transformers


def offered(prompt: str, labels: Sequence[str]) -> list[str]:
    """List the labels that occur in the prompt as words, in the order of ``labels``; all labels if none occurs."""
    found = [label for label in labels if re.search(rf"\b{re.escape(label)}\b", prompt, re.IGNORECASE)]
    return found or list(labels)


def candidates(metric: Any, tokenizer: Any, batch: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Tokenise the candidate responses of each example, by label, without the token that ends them.

    They are tokenised as continuations of the prompt, like the responses of the data modules.

    Raises:
        ValueError: The metric knows no labels, or a response does not end in its label.
    """
    found = []
    numbers = batch["id"].tolist()
    ends = batch["end_id"].tolist() if "end_id" in batch else [None] * len(numbers)
    rows = zip(numbers, ends, batch["prompt"], batch["target"], _prompts(batch), _responses(batch), strict=True)
    for number, end, prompt, target, prompt_ids, response in rows:
        if number < 0:  # a filler, which is computed but not scored
            found.append({"": [int(tokenizer.eos_token_id)]})
            continue
        choice = text_metric(metric).choice(target)
        if choice is None:
            raise ValueError(
                "Choice by likelihood needs targets with labels, as CommonsenseDataModule has, and a metric that knows "
                "them: --model.metric CommonsenseAccuracy. For other data give --model.answer_by generation."
            )
        _, label, labels = choice
        if response and response[-1] in (end, tokenizer.eos_token_id):
            response = response[:-1]
        text = decoded(tokenizer, prompt_ids + response).removeprefix(decoded(tokenizer, prompt_ids))
        stem, word, rest = text.rpartition(label)
        if not word or rest.strip(" \n."):
            raise ValueError(
                f"The response {text[-60:]!r} does not end in its label {label!r}, so no candidates can be made of it."
            )
        texts = {name: stem + name + rest for name in offered(prompt, labels)}
        texts.setdefault(label, text)
        read = continued(tokenizer, [prompt] * len(texts), list(texts.values()))[1]
        ids = dict(zip(texts, read, strict=True))
        if ids[label] != response:
            raise ValueError(
                f"The tokenizer gives {text!r} other tokens than the response has ({ids[label]} for {response}), so "
                "choice by likelihood would compare other texts. Give --model.answer_by generation."
            )
        found.append(ids)
    return found


def _prompts(batch: dict[str, Any]) -> list[list[int]]:
    return [ids[mask != 0].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]


def _responses(batch: dict[str, Any]) -> list[list[int]]:
    return [ids[labels != IGNORED].tolist() for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)]


@torch.no_grad()
def log_likelihoods(
    model: Any, prompt_ids: Tensor, prompt_mask: Tensor, turns: Sequence[Sequence[Sequence[int]]], pad: int
) -> Tensor:
    """Compute the log-probability of responses given their prompts, float32 [turns, B].

    The prompts run through the model once; each turn continues from a copy of their key-value cache.

    Args:
        model: A causal language model of transformers.
        prompt_ids: int64 [B, P], left padded.
        prompt_mask: int64 [B, P], 0 on padding.
        turns: B responses per turn, each a non-empty list of tokens.
        pad: Padding token.
    """
    places = (prompt_mask.cumsum(1) - 1).clamp(min=0)
    read = model(
        input_ids=prompt_ids, attention_mask=prompt_mask, position_ids=places, use_cache=True, logits_to_keep=1
    )
    if getattr(read, "past_key_values", None) is None:
        raise ValueError(
            f"{type(model).__name__} has no key-value cache (past_key_values), which choice by likelihood needs. Give"
            " --model.answer_by generation."
        )
    found = []
    for responses in turns:
        rows = [torch.tensor(list(ids), device=prompt_ids.device) for ids in responses]
        ids = pad_sequence(rows, batch_first=True, padding_value=pad)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        logits = read.logits
        # Responses of one token would not need this pass, but the ranks of a sharded model must make the same passes.
        more = model(
            input_ids=ids,
            attention_mask=torch.cat([prompt_mask, mask], dim=1),
            position_ids=places[:, -1:] + mask.cumsum(1),
            past_key_values=copy.deepcopy(read.past_key_values),
            use_cache=True,
        ).logits
        logits = torch.cat([logits, more[:, :-1]], dim=1)
        losses = F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
        found.append(-(losses * mask).sum(1))
    return torch.stack(found)


def choose(values: dict[str, tuple[float, int]]) -> tuple[str, str]:
    """Choose the likeliest label by the sum of log-probabilities, and by their mean per token; the first of equal ones.

    Args:
        values: Log-probability and number of tokens, by label.
    """
    return max(values, key=lambda k: values[k][0]), max(values, key=lambda k: values[k][0] / values[k][1])
