"""Examples with responses of known lengths, and the gradient of one large batch of them, by plain transformers in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_pmss.datamodules.collate import InstructionCollator

LENGTHS = [1, 12, 3, 7, 2, 30, 5]
"""Tokens of the responses; in windows of three: 16, 39, and a short one of 5."""

COLLATE = InstructionCollator(pad_id=0)


def rows_of(lengths: Sequence[int]) -> list[dict[str, Any]]:
    """One row of random tokens for each length of a response, with a prompt of 4 to 8."""
    draw = torch.Generator().manual_seed(7)
    rows = []
    for length in lengths:
        tokens = torch.randint(2, 300, (8 + 40,), generator=draw).tolist()
        prompt = 4 + length % 5
        rows.append({"prompt_ids": tokens[:prompt], "response_ids": tokens[8 : 8 + length]})
    return rows


def gradient_alone(
    folder: str, rows: Sequence[dict[str, Any]], move: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Gradient of the sum of the rows' token losses, over the number of their response tokens; rows one by one.

    `move` is added to the weights before.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += (move or {}).get(name, 0)
    tokens = sum(len(row["response_ids"]) for row in rows)
    for row in rows:
        ids, begin = row["prompt_ids"] + row["response_ids"], len(row["prompt_ids"])
        log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        losses = [-log_p[place - 1, ids[place]] for place in range(begin, len(ids))]
        (sum(losses, log_p.sum() * 0) / max(1, tokens)).backward()
    return {name: p.grad for name, p in model.named_parameters()}
