"""Find a model's layers among the tensors of a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from lightning_pmss.files.adapter_file import AdapterFile
from lightning_pmss.layers.convertible import FLOATS
from lightning_pmss.store import misfit
from lightning_pmss.store.shards import ShardReader, few


def parse_dtype(dtype: str | torch.dtype | None, left_out: str) -> torch.dtype | None:
    """The dtype to write, from its name; None stays None, which means `left_out`.

    Raises:
        ValueError: It is no floating-point dtype that weights are written in.
    """
    if dtype is None:
        return None
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if found not in FLOATS:
        raise ValueError(f"dtype={dtype!r}: write float32, bfloat16, float16 or float64; left out, it is {left_out}.")
    return found


class Wording(NamedTuple):
    """Texts for error messages, per caller.

    Attributes:
        whose: Whose layers they are: "the adapter's".
        owner: The same by its name: "the adapter runs/adapter".
        expects: How it knows their shapes: "was trained on".
        missing: What to do where no tensor fits the names.
        ambiguous: What to do where several do.
        mismatch: What to do where a shape differs.
        quantised: Why no other dtype will do, and what to do.
    """

    whose: str
    owner: str
    expects: str
    missing: str
    ambiguous: str
    mismatch: str
    quantised: str


def resolve_names(adapter: AdapterFile, reader: ShardReader, base: Path) -> Callable[[str], str]:
    """Map the adapter's module names to the base's keys; see `match_names`."""
    in_python = "load_adapter(model, folder), then write_merged(model, output)."
    right_base = "Give the base that the adapter was trained on."
    wording = Wording(
        whose="the adapter's",
        owner=f"the adapter {adapter.folder}",
        expects="was trained on",
        missing=(
            "Give the base that the adapter was trained on; if its checkpoint stores these layers under other names, load "
            f"base and adapter in Python instead: {in_python}"
        ),
        ambiguous=f"Merge in Python instead: {in_python}",
        mismatch=right_base,
        quantised=(
            "a quantised form that cannot be merged into. Give the unquantised base; if the adapter was trained on these codes,"
            f" merge in Python instead: {in_python}"
        ),
    )
    return match_names(stored_shapes(adapter), reader, base, wording)


def refuse_misfits(adapter: AdapterFile, reader: ShardReader, rename: Callable[[str], str]) -> None:
    """Refuse tensors that cannot take the place of the base's: with other kinds of numbers, or too large for its dtype.

    Args:
        adapter: The adapter.
        reader: The base's files.
        rename: Of `resolve_names`.

    Raises:
        ValueError: There is one.
    """
    for name, value in (adapter.also_train | {n: fresh.value for n, fresh in adapter.fresh.items()}).items():
        for key in (rename(name), *(rename(alias) for alias in adapter.tied.get(name, ()))):
            if key in reader.tensors and (reason := misfit(value, reader.tensors[key].dtype)):
                raise ValueError(
                    f"{adapter.folder}: {few([name])} {reason}. Use an earlier adapter or checkpoint, or the base that it was"
                    " trained on."
                )


def stored_shapes(adapter: AdapterFile) -> dict[str, tuple[int, ...]]:
    """The shape that the base stores of each layer's weight; of those that the adapter file holds itself, none."""
    return {
        name: module.shape[::-1] if module.layout == "conv1d" else module.shape
        for name, module in adapter.modules.items()
        if f"{name}.weight" not in adapter.fresh
    }


def match_names(
    stored: Mapping[str, tuple[int, ...] | None], reader: ShardReader, base: Path, wording: Wording
) -> Callable[[str], str]:
    """How canonical module names become the keys of a checkpoint (without ``.weight``).

    A checkpoint may be stored with or without the model's base prefix (``transformer.h.0...`` or ``h.0...``), and the
    names may come from either. The names as they are go first; else exactly one prefix, added to or taken from every
    name that has a weight, must find all of them.

    Args:
        stored: Shape of each module's weight as the checkpoint stores it; None where it is not known.
        reader: The checkpoint.
        base: Its folder, for messages.
        wording: See `Wording`.

    Raises:
        ValueError: Nothing fits, or more than one prefix does; another shape; a dtype that is not floating-point.
    """
    keys = reader.tensors

    def fits(rename: Callable[[str], str]) -> bool:
        return all(f"{rename(name)}.weight" in keys for name in stored)

    def same(name: str) -> str:
        return name

    def adder(prefix: str) -> Callable[[str], str]:
        # Names outside the base model (a head) have no prefix in either form.
        return lambda name: name if any(key == name or key.startswith(name + ".") for key in keys) else prefix + name

    def remover(prefix: str) -> Callable[[str], str]:
        return lambda name: name.removeprefix(prefix)

    if fits(same):
        _check(stored, reader, same, base, wording)
        return same
    candidates = [adder(prefix) for prefix in _prefixes(keys)]
    candidates += [remover(prefix) for prefix in _prefixes(stored)]
    fitting = [rename for rename in candidates if fits(rename)]
    results = {tuple(rename(name) for name in stored) for rename in fitting}
    if not results:
        missing = [name for name in stored if f"{name}.weight" not in keys]
        raise ValueError(
            f"{base} has no weights for {len(missing)} of the {len(stored)} modules of {wording.owner}: {few(missing)}. "
            f"Its own tensors are called {few(list(keys), 3)}. {wording.missing}"
        )
    if len(results) > 1:
        options = [next(iter(names)) for names in results]
        raise ValueError(
            f"{base}: {wording.whose} module {next(iter(stored))} may be any of {few(sorted(options))}. {wording.ambiguous}"
        )
    _check(stored, reader, fitting[0], base, wording)
    return fitting[0]


def _prefixes(names: Iterable[str]) -> list[str]:
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for length in range(1, min(3, len(parts) - 1) + 1):
            found[".".join(parts[:length]) + "."] = None
    return list(found)


def _check(
    stored: Mapping[str, tuple[int, ...] | None],
    reader: ShardReader,
    rename: Callable[[str], str],
    base: Path,
    wording: Wording,
) -> None:
    for name, shape in stored.items():
        info = reader.tensors[f"{rename(name)}.weight"]
        if info.dtype not in FLOATS:  # first, since packed weights have other shapes, too
            raise ValueError(f"{base}: {info.key} is stored as {info.dtype}, {wording.quantised}")
        if len(info.shape) != 2 or shape not in (None, info.shape):
            wanted = "a matrix" if shape is None else list(shape)
            raise ValueError(
                f"{base}: {info.key} is stored as {list(info.shape)}, {wording.owner} {wording.expects} {wanted}. "
                f"{wording.mismatch}"
            )
