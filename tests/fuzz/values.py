"""Damage values at random, by a seed: nested dicts and lists, and tensors. Files are damaged in `mutations`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

# Values that somebody's file had, or that Python's readers let through.
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 99, 10**39, -(10**39), 2**63, 0.5, 1e-45, 1e39, 1e308, "", "x", "2", "\n", "\x00",
    "../../x", "é\u2028\u202e", "a" * 5000, "nan", "(a+)+$", ".*", [], {}, [1], [[]], {"a": 1}, [None, None], [1.5, 2.5],
    [-1, 5], [10**30, 5], ["a", "b"],
]  # fmt: skip


def mutate_tree(random: Random, tree: Any, depth: int = 0) -> tuple[Any, str]:
    """A copy of nested dicts and lists with one place changed."""
    tree = copy.copy(tree)
    inside = [k for k in _places(tree) if isinstance(tree[k], (dict, list, tuple)) and len(tree[k])]
    if inside and random.random() < (0.9 if depth == 0 else 0.7):
        place = random.choice(inside)
        tree[place], done = mutate_tree(random, list(v) if isinstance(v := tree[place], tuple) else v, depth + 1)
        return tree, f"{place}.{done}"
    places = _places(tree)
    kind = random.choice(("set", "set", "set", "drop", "add", "rename", "swap", "number"))
    place = random.choice(places) if places else None
    if kind == "add" or place is None:
        value = copy.deepcopy(random.choice(ODD))
        if isinstance(tree, dict):
            name = random.choice(("x", "", "U", "a.b", "\n", place or "y"))
            tree[name] = value
        else:
            tree = [*tree, value]
        return tree, f"add {str(value)[:20]!r}"
    if kind == "drop":
        del tree[place]
        return tree, f"{place} dropped"
    if kind == "rename" and isinstance(tree, dict):
        new = random.choice((f"{place}x", "", "..", f"{place}\n", str(place).upper(), "weird/.\u202ename"))
        return {new if k == place else k: v for k, v in tree.items()}, f"{place} renamed {new!r}"
    if kind == "swap":
        other = random.choice(places)
        tree[place], tree[other] = tree[other], tree[place]
        return tree, f"{place} and {other} swapped"
    old = tree[place]
    if kind == "number" and isinstance(old, (int, float)) and not isinstance(old, bool):
        tree[place] = random.choice((old + 1, -old, old * 2, float(old), str(old), [old]))
    else:
        tree[place] = copy.deepcopy(random.choice(ODD))
    return tree, f"{place} = {str(tree[place])[:30]!r}"


def _places(tree: Any) -> list[Any]:
    return list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []


def mutate_tensor(random: Random, value: Tensor) -> tuple[Tensor, str]:
    """Other numbers, another type or another shape."""
    changes: dict[str, Callable[[], Tensor]] = {
        "nan": lambda: _filled(value, float("nan")),
        "inf": lambda: _filled(value, float("-inf")),
        "huge": lambda: _filled(value, 3e38),
        "tiny": lambda: _filled(value, 1e-45),
        "zeros": lambda: torch.zeros_like(value),
        "negative": lambda: _filled(value, -1),
        "same": lambda: torch.full_like(value, 3),
        "large": lambda: _filled(value, 10**6),
        "order": lambda: value.flip(0) if value.dim() else value,
        "double": lambda: value.double(),
        "half": lambda: value.half(),
        "long": lambda: value.nan_to_num().clamp(-1000, 1000).long(),
        "bool": lambda: value.bool(),
        "bytes": lambda: value.nan_to_num().clamp(0, 255).to(torch.uint8),
        "complex": lambda: value.to(torch.complex64),
        "float8": lambda: value.to(torch.float8_e4m3fn),
        "scalar": lambda: torch.tensor(1.0),
        "more": lambda: value[None],
        "flat": lambda: value.flatten(),
        "fewer": lambda: value[1:] if value.dim() else value,
        "empty": lambda: value.flatten()[:0],
        "nothing": lambda: torch.zeros(0, 2**40),
        "turned": lambda: value.T.contiguous() if value.dim() == 2 else value,
        "longer": lambda: torch.cat([value, value]) if value.dim() else value,
    }
    kind = random.choice(list(changes))
    return changes[kind]().contiguous(), kind


def _filled(value: Tensor, number: float) -> Tensor:
    changed = value.clone()
    flat = changed.view(-1)
    if value.is_floating_point():
        flat[: max(1, len(flat) // 3)] = number
    elif number == number and abs(number) < 2**31:
        flat[:1] = int(number)
    else:
        flat[:1] = 2**31 - 1
    return changed


def mutate_tensors(random: Random, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """One tensor changed, lost, foreign, renamed, or two swapped."""
    found, names = dict(tensors), list(tensors)
    name = random.choice(names)
    kind = random.choice(("change", "change", "change", "drop", "add", "rename", "swap"))
    if kind == "change":
        found[name], what = mutate_tensor(random, found[name])
        return found, f"{name}: {what}"
    if kind == "drop":
        del found[name]
    elif kind == "add":
        found[random.choice(("x", "x.U", "x.rows", ".", f"{name}.U", "\n", "U", "rows"))] = torch.ones(2)
    elif kind == "rename":
        found[random.choice((f"{name}x", name.upper(), f" {name}", f"{name}.weight", "é\u202e"))] = found.pop(name)
    else:
        other = random.choice(names)
        found[name], found[other] = found[other], found[name]
        return found, f"{name} and {other} swapped"
    return found, f"{name}: {kind}"
