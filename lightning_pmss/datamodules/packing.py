"""Pack several examples into one row of tokens, so that little is computed on padding.

Position ids restart at 0 with each example and the batch has no mask: models of transformers then attend within each example
only, so that loss and gradients are those of the unpacked examples.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_pmss.datamodules.collate import IGNORED, Batch, InstructionCollator
from lightning_pmss.datamodules.sampler import LengthGroupedSampler


def pack(lengths: Sequence[int], room: int, seed: int = 0) -> list[list[int]]:
    """Return the examples of each row: the longest first, each into the fullest row that it fits into (best fit).

    Examples of equal length are put in an order drawn by ``seed``. The result depends on the arguments alone.

    Args:
        lengths: Tokens of each example, at most ``room``.
        room: Tokens of a row.
        seed: Seed of the order.

    Raises:
        ValueError: If an example is longer than a row.

    Example::

        >>> sorted(map(sorted, pack([5, 3, 2, 6], room=8)))
        [[0, 1], [2, 3]]
    """
    longest = max(lengths, default=0)
    if longest > room:
        raise ValueError(f"An example has {longest} tokens and a packed row {room}; give rows at least as long.")
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    order.sort(key=lambda index: -lengths[index])
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in order:
        place = bisect_left(free, (lengths[index], -1))
        if place == len(free):
            rows.append([])
            left, row = room, len(rows) - 1
        else:
            left, row = free.pop(place)
        rows[row].append(index)
        if left > lengths[index]:
            insort(free, (left - lengths[index], row))
    return rows


def padding_share(order: Sequence[int], lengths: Sequence[int], batch_size: int) -> float:
    """Return the share of padding among the tokens of batches that are taken from ``order`` one after the other."""
    tokens = slots = 0
    for start in range(0, len(order), batch_size):
        batch = [lengths[index] for index in order[start : start + batch_size]]
        tokens += sum(batch)
        slots += max(batch) * len(batch)
    return 1 - tokens / slots if slots else 0.0


@dataclass(frozen=True)
class PackingReport:
    """The effect of packing on rows and padding.

    Args:
        examples: Training examples.
        rows: Rows that they are packed into.
        room: Tokens of a row, at most.
        before: Share of padding in batches of as many unpacked examples, grouped by length as they are without packing.
        after: Share of padding in batches of packed rows.
    """

    examples: int
    rows: int
    room: int
    before: float
    after: float

    def __str__(self) -> str:
        return (
            f"Packed {self.examples} examples into {self.rows} rows of at most {self.room} tokens"
            f" ({self.examples / max(self.rows, 1):.2f} per row): padding {self.after:.1%} of the tokens computed,"
            f" {self.before:.1%} without packing. A batch is now of rows: as many steps fewer."
        )


class PackedRows(Dataset[Any]):
    """The examples of each row, together.

    Args:
        data: Rows by index.
        packs: The indices of each row, see `pack`.
    """

    def __init__(self, data: Any, packs: list[list[int]]) -> None:
        self.data = data
        self.packs = packs

    def __len__(self) -> int:
        return len(self.packs)

    @override
    def __getitem__(self, index: int) -> list[Any]:
        return [self.data[place] for place in self.packs[index]]


@dataclass(frozen=True)
class PackedCollator:
    """Joins the examples of each row and pads the rows to a batch of ``input_ids``, ``labels`` and ``position_ids``.

    All are int64 ``[B, T]``. Position ids restart at 0 for each example and for the padding, which is therefore treated as
    one more example, without labels. An example's first token has no label: it would be predicted from the example before.

    Args:
        single: The collator of unpacked examples.
    """

    single: InstructionCollator

    def __call__(self, rows: list[list[dict[str, Any]]]) -> Batch:
        ids: list[list[int]] = []
        labels: list[list[int]] = []
        positions: list[list[int]] = []
        for examples in rows:
            parts = [self.single.tokens(example) for example in examples]
            ids.append([token for tokens, _ in parts for token in tokens])
            labels.append([label for _, wanted in parts for label in [IGNORED, *wanted[1:]]])
            positions.append([place for tokens, _ in parts for place in range(len(tokens))])
        width = max(map(len, ids))
        positions = [row + list(range(width - len(row))) for row in positions]
        return {
            "input_ids": self.single.pad(ids, self.single.pad_id),
            "labels": self.single.pad(labels, IGNORED),
            "position_ids": torch.tensor(positions, dtype=torch.int64),
        }


def pack_rows(
    data: Any, lengths: Sequence[int], room: int, batch_size: int, seed: int, **replicas: int
) -> tuple[PackedRows, LengthGroupedSampler, PackingReport]:
    """Return training examples as packed rows, the order of the rows, and the report of the saving.

    The rows are the same in every epoch, on every rank and after a resume; their order depends on seed and epoch.

    Args:
        data: Examples by index.
        lengths: Tokens of each.
        room: Tokens of a row.
        batch_size: Rows per batch and rank.
        seed: Seed of rows and order.
        **replicas: ``num_replicas`` and ``rank``.
    """
    rows = PackedRows(data, pack(lengths, room, seed))
    sums = [sum(lengths[index] for index in row) for row in rows.packs]
    before, after = (LengthGroupedSampler(each, batch_size, seed, **replicas) for each in (lengths, sums))
    report = PackingReport(
        len(lengths),
        len(rows),
        room,
        padding_share(before.order(0), lengths, batch_size),
        padding_share(after.order(0), sums, batch_size),
    )
    return rows, after, report
