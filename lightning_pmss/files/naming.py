"""Find a model's layers among the tensors of a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from lightning_pmss.files.adapter_file import AdapterFile
from lightning_pmss.layers.convertible import FLOATS
from lightning_pmss.layers.layout import Layout
from lightning_pmss.store import misfit
from lightning_pmss.store.shards import ShardReader, few

Stored = tuple[tuple[int, int], Layout]
"""Shape ``(out, in)`` of W, and how a checkpoint stores it."""


def parse_dtype(dtype: str | torch.dtype | None, left_out: str) -> torch.dtype | None:
    """Return the dtype to write from its name; None stays None, which means ``left_out``.

    Raises:
        ValueError: Not a floating-point dtype of weights.
    """
    if dtype is None:
        return None
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if found not in FLOATS:
        raise ValueError(f"dtype={dtype!r}: write float32, bfloat16, float16 or float64; left out, it is {left_out}.")
    return found


class Wording(NamedTuple):
    """Texts of one caller for error messages.

    Attributes:
        whose: Owner of the layers: "the adapter's".
        owner: Owner by name: "the adapter runs/adapter".
        expects: Verb for the owner's shapes: "was trained on".
        missing: Remedy if no tensor fits the names.
        ambiguous: Remedy if several fit.
        mismatch: Remedy if a shape differs.
        quantised: Reason and remedy if a tensor is not floating-point.
    """

    whose: str
    owner: str
    expects: str
    missing: str
    ambiguous: str
    mismatch: str
    quantised: str


def resolve_names(
    adapter: AdapterFile, reader: ShardReader, base: Path, in_python: str, quantised: str
) -> Callable[[str], str]:
    """Map the adapter's module names to the base's keys, as `match_names`.

    Args:
        adapter: The adapter.
        reader: The base's files.
        base: Folder or file of the base, for messages.
        in_python: What to call in Python if the names do not fit, for messages.
        quantised: See `Wording`.
    """
    right_base = "Give the base that the adapter was trained on"
    wording = Wording(
        whose="the adapter's",
        owner=f"the adapter {adapter.folder}",
        expects="was trained on",
        missing=(
            f"{right_base}; if its checkpoint stores these layers under other names, load base and adapter in Python instead:"
            f" {in_python}"
        ),
        ambiguous=f"Load base and adapter in Python instead: {in_python}",
        mismatch=f"{right_base}.",
        quantised=quantised,
    )
    return match_names(stored_shapes(adapter), reader, base, wording)


def base_weight(adapter: AdapterFile, reader: ShardReader, rename: Callable[[str], str], name: str) -> Tensor:
    """Read a layer's W ``[out, in]`` from the base, or from the adapter if it is a fresh tensor."""

    def stored() -> Tensor:
        return reader.read(f"{rename(name)}.weight")

    fresh = adapter.fresh_weight(name)
    return adapter.modules[name].canonical(stored() if fresh is None else fresh.whole(stored))


def refuse_wrong_base(
    adapter: AdapterFile, reader: ShardReader, rename: Callable[[str], str], first: str, limit: int = 20
) -> NoReturn:
    """Raise for a mismatch in the layer ``first``; compare some more layers, so the message shows if it is one or all."""
    others = [name for name in adapter.modules if name != first][:limit]
    wrong = [n for n in others if not adapter.modules[n].is_of(base_weight(adapter, reader, rename, n))]
    raise ValueError(adapter.wrong_base([first, *wrong], str(reader.folder)))


def refuse_misfits(adapter: AdapterFile, reader: ShardReader, rename: Callable[[str], str]) -> None:
    """Refuse tensors that cannot replace the base's: of another kind of dtype, or with values too large for it.

    Args:
        adapter: The adapter.
        reader: The base's files.
        rename: Result of `resolve_names`.

    Raises:
        ValueError: A tensor does not fit.
    """
    for name, value in (adapter.also_train | {n: fresh.value for n, fresh in adapter.fresh.items()}).items():
        for key in (rename(name), *(rename(alias) for alias in adapter.tied.get(name, ()))):
            if key in reader.tensors and (reason := misfit(value, reader.tensors[key].dtype)):
                raise ValueError(
                    f"{adapter.folder}: {few([name])} {reason}. Use an earlier adapter or checkpoint, or the base that it was"
                    " trained on."
                )


def stored_shapes(adapter: AdapterFile) -> dict[str, Stored]:
    """How the base stores each layer's weight, without the weights that the adapter file contains."""
    return {
        name: (module.shape, module.layout)
        for name, module in adapter.modules.items()
        if f"{name}.weight" not in adapter.fresh
    }


def match_names(
    stored: Mapping[str, Stored | None], reader: ShardReader, base: Path, wording: Wording
) -> Callable[[str], str]:
    """Find the function that maps canonical module names to the keys of a checkpoint (without ``.weight``).

    Both the checkpoint and the names may have the model's base prefix or not (``transformer.h.0...`` or ``h.0...``). Unchanged
    names are tried first; else exactly one prefix, added to or removed from every name with a weight, must find all of them.

    Args:
        stored: Shape ``(out, in)`` and layout of each module's weight; None if they are not known: then a matrix.
        reader: The checkpoint.
        base: Its folder, for messages.
        wording: See `Wording`.

    Raises:
        ValueError: No prefix fits, or several do; another shape; a dtype that is not floating-point.
    """
    keys = reader.matrices

    def fits(rename: Callable[[str], str]) -> bool:
        return all(f"{rename(name)}.weight" in keys for name in stored)

    def same(name: str) -> str:
        return name

    def adder(prefix: str) -> Callable[[str], str]:
        # Names outside the base model (a head) never have the prefix.
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
            f"Its own tensors are called {few(list(reader.tensors), 3)}. {wording.missing}"
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
    stored: Mapping[str, Stored | None],
    reader: ShardReader,
    rename: Callable[[str], str],
    base: Path,
    wording: Wording,
) -> None:
    for name, expected in stored.items():
        info = reader.matrices[f"{rename(name)}.weight"]
        if info.dtype not in FLOATS:  # first, because packed weights also have other shapes
            raise ValueError(f"{base}: {info.key} is stored as {info.dtype}, {wording.quantised}")
        if len(info.shape) != 2 if expected is None else not expected[1].fits(expected[0], info.shape):
            wanted = "a matrix" if expected is None else expected[1].described(expected[0])
            raise ValueError(
                f"{base}: {info.key} is stored as {list(info.shape)}, {wording.owner} {wording.expects} {wanted}. "
                f"{wording.mismatch}"
            )
