"""Choose the training rows that are held out for validation, and those shown as worked examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_pmss.datamodules.columns import Format, text
from lightning_pmss.datamodules.prompts import Example
from lightning_pmss.datamodules.rows import existing, read_rows

_SHOTS = Format("a file of worked examples", ("question", "response"))


def group_numbers(examples: Sequence[Example]) -> list[int]:
    """Return the number of each example's group; examples without one are groups of their own."""
    seen: dict[str, int] = {}
    return [
        number if example.group is None else seen.setdefault(example.group, number)
        for number, example in enumerate(examples)
    ]


def hold_out(groups: Sequence[int], size: int, seed: int) -> tuple[list[int], list[int]]:
    """Return the rows left for training, in an order that depends on ``seed`` alone, and the held-out rows, sorted.

    Groups are held out whole, so that a passage never is on both sides: ``size`` rows or, where groups have several, up
    to one group more.
    """
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    members: dict[int, int] = {}
    for group in groups:
        members[group] = members.get(group, 0) + 1
    held: set[int] = set()
    count = 0
    for row in order:
        if count >= size:
            break
        if groups[row] not in held:
            held.add(groups[row])
            count += members[groups[row]]
    left = [row for row in order if groups[row] not in held]
    return left, sorted(row for row in order if groups[row] in held)


def shuffled(rows: Sequence[int], seed: int) -> list[int]:
    """Return rows in an order that depends on them and ``seed`` alone, not on the order that they come in."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    ordered = sorted(rows)
    return [ordered[place] for place in order]


def in_proportion(rows: Sequence[int], kinds: Sequence[Any], seed: int) -> list[int]:
    """Return rows in an order every beginning of which has the shares of the kinds that all have, to within one row of each.

    Rows of one kind keep their order. Where the shares are no whole numbers, ``seed`` decides which kind is rounded up: row
    number ``k`` of ``n`` of a kind comes at ``(k + u) / n`` of the way, with one ``u`` below 1 for each kind.
    """
    members: dict[Any, list[int]] = {}
    for row, kind in zip(rows, kinds, strict=True):
        members.setdefault(kind, []).append(row)
    generator = torch.Generator().manual_seed(seed)
    offsets = dict(zip(sorted(members, key=str), torch.rand(len(members), generator=generator).tolist(), strict=True))
    places = {
        row: (number + offsets[kind]) / len(of_kind)
        for kind, of_kind in members.items()
        for number, row in enumerate(of_kind)
    }
    return sorted(rows, key=places.__getitem__)


def draw_shots(candidates: Iterable[Example], evaluated: Iterable[Example], count: int) -> tuple[Example, ...]:
    """Return the first ``count`` candidates that are not evaluated and share no group with evaluated ones.

    Each is of another group (another passage) too.

    Raises:
        ValueError: If there are fewer.
    """
    questions: set[str] = set()
    taken: set[str | None] = set()
    for example in evaluated:
        questions.add(example.question)
        taken.add(example.group)
    taken.discard(None)
    shots: list[Example] = []
    for example in candidates:
        if len(shots) == count:
            break
        if example.question in questions or example.group in taken:
            continue
        shots.append(example)
        questions.add(example.question)
        if example.group is not None:
            taken.add(example.group)
    if len(shots) < count:
        raise ValueError(
            f"num_shots is {count}, but only {len(shots)} training examples are neither evaluated nor share a passage"
            f" with what is; give --data.num_shots {len(shots)}, or --data.shots FILE.jsonl with fixed ones."
        )
    return tuple(shots)


def read_shots(path: str, count: int, ignored: Sequence[str] = ()) -> tuple[Example, ...]:
    """Return the first ``count`` worked examples of a file with the columns ``question`` and ``response``.

    Other columns may be filled where they are ``ignored`` or tell rows apart.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is broken (names file and row) or contains fewer.
    """
    remedy = "Give --data.shots train, or a file with the columns question and response."
    shots = []
    for where, row in read_rows(existing(Path(path), remedy)):
        row = _SHOTS.check(where, row, ignored)
        shots.append(Example(text(where, row, "question"), text(where, row, "response")))
    if len(shots) < count:
        raise ValueError(
            f"{path}: num_shots is {count}, but there are {len(shots)} examples; give --data.num_shots {len(shots)}."
        )
    return tuple(shots[:count])
