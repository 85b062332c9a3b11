"""Make batches of tokenised conversations, and of pairs of a preferred and a rejected one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from typing_extensions import override

from lightning_pmss.datamodules.collate import IGNORED, Batch, InstructionCollator


class PairBatch(dict[str, Any]):
    """A batch of preferences: ``chosen`` and ``rejected``, each a batch as for training.

    A module that trains on responses asks for ``input_ids`` and would otherwise train on rejected answers as well.
    """

    def __missing__(self, key: str) -> NoReturn:
        raise ValueError(
            f"This batch has preferences, `chosen` and `rejected`, and the model asks for {key!r}. Train it with a module for"
            " preferences such as examples/dpo.py, or on the chosen answers alone: make a file of their conversations."
        )


@dataclass(frozen=True)
class ConversationCollator(InstructionCollator):
    """Pads rows of `ConversationEncoder` to a batch; see `ChatDataModule` for what is in it."""

    @override
    def tokens(self, row: dict[str, Any]) -> tuple[list[int], list[int]]:
        ids: list[int] = row["input_ids"]
        labels = [IGNORED] * len(ids)
        borders: Sequence[int] = row["trained"]
        for start, stop in zip(borders[::2], borders[1::2], strict=True):
            labels[start:stop] = ids[start:stop]
        return ids, labels

    @override
    def _prompt(self, row: dict[str, Any]) -> list[int]:
        ids: list[int] = row["input_ids"][: row["prompt_length"]]
        return ids

    @override
    def _ends(self, rows: list[dict[str, Any]]) -> list[int] | None:
        return [row["input_ids"][-1] for row in rows]

    @override
    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        if "rejected_ids" not in rows[0]:
            return super().__call__(rows)
        other = [{**row, "input_ids": row["rejected_ids"], "trained": row["rejected_trained"]} for row in rows]
        return PairBatch(chosen=super().__call__(rows), rejected=super().__call__(other))
