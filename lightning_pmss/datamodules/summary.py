"""What a model will see of tokenised data: rows with the tokens that are trained, lengths, and the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_pmss.datamodules.base import TokenisedDataModule
from lightning_pmss.datamodules.collate import IGNORED
from lightning_pmss.datamodules.continuations import decoded
from lightning_pmss.datamodules.packing import pack, padding_share
from lightning_pmss.datamodules.sampler import LengthGroupedSampler


class Token(NamedTuple):
    """One token of a row.

    Args:
        id: Its number.
        text: Its part of the text; empty if its bytes are completed by the next token.
        trained: Whether the loss is on it.
    """

    id: int
    text: str
    trained: bool


@dataclass(frozen=True)
class Shown:
    """A training row as the model sees it.

    Args:
        title: Its place in the data.
        tokens: Its tokens.
    """

    title: str
    tokens: list[Token]


@dataclass(frozen=True)
class Run:
    """The settings of a run that its number of steps depends on.

    Args:
        devices: Processes that share the data.
        accumulate: Batches per optimizer step.
        max_epochs: Largest number of epochs; null: Lightning's default, 1,000 without ``max_steps``, else none.
        max_steps: Largest number of optimizer steps; -1: none.
        limit: Batches per epoch (an integer), or their share (a float).
    """

    devices: int = 1
    accumulate: int = 1
    max_epochs: int | None = None
    max_steps: int = -1
    limit: int | float = 1.0

    def batches(self, units: int, batch_size: int) -> int:
        """Return the batches of one device that so many examples, or packed rows, make."""
        return math.ceil(math.ceil(units / self.devices) / batch_size)

    def batches_per_epoch(self, batches: int) -> int:
        """Return how many of the batches of the data an epoch has."""
        return min(batches, self.limit) if isinstance(self.limit, int) else int(batches * self.limit)

    def steps_per_epoch(self, batches: int) -> int:
        """Return the optimizer steps in an epoch; the last one may have fewer batches."""
        return math.ceil(self.batches_per_epoch(batches) / self.accumulate)

    def steps(self, batches: int) -> int | None:
        """Return the optimizer steps of the run, ``None`` if it has no end."""
        epochs = 1000 if self.max_epochs is None and self.max_steps == -1 else self.max_epochs
        bounds = [self.max_steps] if self.max_steps != -1 else []
        bounds += [epochs * self.steps_per_epoch(batches)] if epochs is not None and epochs != -1 else []
        return min(bounds, default=None)


def batches_of(module: TokenisedDataModule, run: Run) -> int:
    """Return the batches of one device that a data module makes, after ``setup("fit")``."""
    data = module.data["train"]
    if not module.packing:
        return run.batches(len(data), module.batch_size)
    lengths = [min(length, module.max_length) for length in data["length"][:]]
    return run.batches(len(pack(lengths, module.max_length, module.seed)), module.batch_size)


@dataclass(frozen=True)
class Summary:
    """The training data of a data module, and the steps of a run with it.

    Args:
        rows: The first rows.
        lengths: Tokens of each training example; of a preference those of both texts.
        trained: Trained tokens of each.
        left_out: Examples that are longer than ``max_length`` and left out.
        cut: Examples that are cut to ``max_length``.
        skipped: Bad rows that are skipped.
        validation: Validation examples.
        max_length: Longest example in tokens.
        batch_size: Examples, or packed rows, per batch and device.
        packed: Rows that the examples are packed into; null without packing.
        padding: Share of padding in the batches of the first epoch.
        run: Settings of the run.
        available: Examples that ``train_limit`` chooses from.
        kinds: The kinds of examples, and how many of each are chosen, where ``train_limit_by`` is given.
    """

    rows: list[Shown]
    lengths: list[int]
    trained: list[int]
    left_out: int
    cut: int
    skipped: int
    validation: int
    max_length: int
    batch_size: int
    packed: int | None
    padding: float
    run: Run
    available: int
    kinds: dict[str, int]

    @property
    def all_batches(self) -> int:
        """Batches of one device that the data makes."""
        units = len(self.lengths) if self.packed is None else self.packed
        return self.run.batches(units, self.batch_size)

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one device in an epoch."""
        return self.run.batches_per_epoch(self.all_batches)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch: the last one may have fewer batches."""
        return self.run.steps_per_epoch(self.all_batches)

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run, ``None`` if it has no end."""
        return self.run.steps(self.all_batches)

    @property
    def tokens_of_run(self) -> float | None:
        """Tokens that the run computes on, without padding: those of an epoch times the epochs, ``None`` without an end."""
        if self.steps is None or not self.steps_per_epoch:
            return None
        epochs = self.steps / self.steps_per_epoch
        return sum(self.lengths) * epochs * self.batches_per_epoch / self.all_batches

    def percentile(self, share: float) -> int:
        """Return the length that ``share`` of the examples do not exceed (nearest rank)."""
        ordered = sorted(self.lengths)
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    def histogram(self, bins: int = 10) -> list[tuple[int, int, int]]:
        """Return the shortest and longest length of each bin, and how many examples are in it."""
        low, high = min(self.lengths), max(self.lengths)
        width = max(1, math.ceil((high - low + 1) / bins))
        counts = [0] * math.ceil((high - low + 1) / width)
        for length in self.lengths:
            counts[(length - low) // width] += 1
        return [(low + width * place, min(high, low + width * (place + 1) - 1), n) for place, n in enumerate(counts)]


def summarise(module: TokenisedDataModule, rows: int, run: Run) -> Summary:
    """Return the summary of a data module after ``setup("fit")``.

    Args:
        module: The data module.
        rows: How many rows to show.
        run: Settings of the run.
    """
    data, collator = module.data["train"], module._collator()
    parts = [_parts(collator, row) for row in data]
    lengths = [sum(len(ids) for _, ids, _ in row) for row in parts]
    # The first token of a text is predicted from nothing, so it is never trained.
    trained = [sum(label != IGNORED for _, _, labels in row for label in labels[1:]) for row in parts]
    longest = [min(length, module.max_length) for length in data["length"][:]]
    units, packed = longest, None
    if module.packing:
        packs = pack(longest, module.max_length, module.seed)
        units, packed = [sum(longest[index] for index in row) for row in packs], len(packs)
    order = LengthGroupedSampler(units, module.batch_size, module.seed, run.devices).order(0)
    return Summary(
        [
            Shown(f"{module._place(number)}{what}", token_list(module.tokenizer, ids, labels))
            for number, row in zip(data["id"][:rows], parts, strict=False)
            for what, ids, labels in row
        ],
        lengths,
        trained,
        module.dropped,
        module.cut.get("train", 0),
        len(getattr(module, "skipped", {}).get("train", ())),
        len(module.data["val"]),
        module.max_length,
        module.batch_size,
        packed,
        padding_share(order, units, module.batch_size),
        run,
        module.available,
        module.kinds,
    )


def _parts(collator: Any, row: dict[str, Any]) -> list[tuple[str, list[int], list[int]]]:
    """Return the texts of a row, one or a pair, each with its name, its tokens and their labels."""
    if "rejected_ids" not in row:
        return [("", *collator.tokens(row))]
    other = {**row, "input_ids": row["rejected_ids"], "trained": row["rejected_trained"]}
    return [(", chosen", *collator.tokens(row)), (", rejected", *collator.tokens(other))]


def token_list(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> list[Token]:
    """Return tokens with their texts, which together are the text of all.

    Args:
        tokenizer: A tokenizer of transformers.
        ids: The tokens.
        labels: Their labels.
    """
    texts = token_texts(tokenizer, ids)
    marks = [False, *(label != IGNORED for label in labels[1:])]
    return [Token(*each) for each in zip(ids, texts, marks, strict=True)]


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the part of the text that each token adds; a character of several tokens belongs to the last of them."""
    texts, start, read = [], 0, 0
    for place in range(len(ids)):
        before, now = decoded(tokenizer, ids[start:read]), decoded(tokenizer, ids[start : place + 1])
        if now.endswith("\ufffd") and place + 1 < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, read = read, place + 1
    return texts
