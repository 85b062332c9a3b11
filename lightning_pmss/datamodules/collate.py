"""Pad rows of token ids to batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Any]

IGNORED = -100


@dataclass(frozen=True)
class InstructionCollator:
    """Pads rows of token ids to a batch; see `InstructionDataModule` for what is in it.

    Args:
        pad_id: Token put on padding. It may be a real token too: masks and labels mark the padding.
        evaluation: Add the fields for generation and scoring.
        loss_on_prompt: Give the prompt labels too.
        max_length: Cut prompts (see `room`) to this many tokens; null: cut nothing.
        prefix: Number of tokens in front of each prompt that a cut leaves (the beginning-of-sequence token).
        end_id: Token that ends each response, at which generation is to stop.
    """

    pad_id: int
    evaluation: bool = False
    loss_on_prompt: bool = False
    max_length: int | None = None
    prefix: int = 0
    end_id: int | None = None

    def room(self, response: int) -> int:
        """Return how many tokens a prompt may have beside a response of ``response`` tokens.

        In training both share ``max_length``. In evaluation the prompt may use all of it, because the cut must not depend on
        the gold response.
        """
        assert self.max_length is not None
        return self.max_length - (0 if self.evaluation else response)

    def _prompt(self, row: dict[str, Any]) -> list[int]:
        ids: list[int] = row["prompt_ids"]
        if self.max_length is None or len(ids) <= (room := self.room(len(row["response_ids"]))):
            return ids
        kept = max(room - self.prefix, 0)  # from the end, which contains the question
        return ids[: self.prefix] + (ids[-kept:] if kept else [])

    def tokens(self, row: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Return the tokens of one example, prompt and response, and their labels."""
        prompt, response = self._prompt(row), row["response_ids"]
        whole = prompt + response
        return whole, whole if self.loss_on_prompt else [IGNORED] * len(prompt) + response

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        whole, labels = (list(part) for part in zip(*map(self.tokens, rows), strict=True))
        if self.evaluation:  # a filler is computed and not scored
            labels = [ids if row["id"] >= 0 else [IGNORED] * len(ids) for ids, row in zip(labels, rows, strict=True)]
        batch: Batch = {
            "input_ids": self.pad(whole, self.pad_id),
            "attention_mask": self.pad([[1] * len(ids) for ids in whole], 0),
            "labels": self.pad(labels, IGNORED),
        }
        if self.evaluation:
            batch["id"] = torch.tensor([row["id"] for row in rows], dtype=torch.int64)
            prompts = [self._prompt(row) for row in rows]
            if all(prompts):  # plain texts answer nothing
                batch["prompt_ids"] = self.pad(prompts, self.pad_id, left=True)
                batch["prompt_mask"] = self.pad([[1] * len(ids) for ids in prompts], 0, left=True)
                batch["prompt"] = [row["prompt"] for row in rows]
                batch["target"] = [row["target"] for row in rows]
                ends = self._ends(rows)
                if ends is not None:
                    batch["end_id"] = torch.tensor(ends, dtype=torch.int64)
        return batch

    def _ends(self, rows: list[dict[str, Any]]) -> list[int] | None:
        return None if self.end_id is None else [self.end_id] * len(rows)

    @staticmethod
    def pad(rows: list[list[int]], value: int, left: bool = False) -> Tensor:
        """Return rows as int64 ``[B, T]``, filled with ``value`` on the right, or the left."""
        width = max(map(len, rows))
        fills = [[value] * (width - len(row)) for row in rows]
        padded = [fill + row if left else row + fill for row, fill in zip(rows, fills, strict=True)]
        return torch.tensor(padded, dtype=torch.int64)
