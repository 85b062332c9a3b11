"""Find an adapter's layers among the tensors of a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from lightning_pmss.files.adapter_file import AdapterFile
from lightning_pmss.files.shards import ShardReader, few

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def resolve_names(adapter: AdapterFile, reader: ShardReader, base: Path) -> Callable[[str], str]:
    """How the adapter's module names become the base's keys.

    A checkpoint may be stored with or without the model's base prefix (``transformer.h.0...`` or ``h.0...``), and the
    adapter may come from either. The names as they are go first; else exactly one prefix, added to or taken from every
    name that has a weight, must find all of them.

    Raises:
        ValueError: nothing fits, or more than one prefix does.
    """
    keys = reader.tensors

    def fits(rename: Callable[[str], str]) -> bool:
        return all(f"{rename(name)}.weight" in keys for name in adapter.modules)

    def same(name: str) -> str:
        return name

    def adder(prefix: str) -> Callable[[str], str]:
        # Names outside the base model (a head) have no prefix in either form.
        return lambda name: name if any(key == name or key.startswith(name + ".") for key in keys) else prefix + name

    def remover(prefix: str) -> Callable[[str], str]:
        return lambda name: name.removeprefix(prefix)

    if fits(same):
        _check_shapes(adapter, reader, same, base)
        return same
    candidates = [adder(prefix) for prefix in _prefixes(keys)]
    candidates += [remover(prefix) for prefix in _prefixes(adapter.modules)]
    fitting = [rename for rename in candidates if fits(rename)]
    results = {tuple(rename(name) for name in adapter.modules) for rename in fitting}
    if not results:
        missing = [name for name in adapter.modules if f"{name}.weight" not in keys]
        raise ValueError(
            f"{base} has no weights for {len(missing)} of the {len(adapter.modules)} modules of the adapter "
            f"{adapter.folder}: {few(missing)}. Its own tensors are called {few(list(keys), 3)}. Give the base that "
            "the adapter was trained on; if its checkpoint stores these layers under other names, load base and "
            "adapter in Python instead: load_adapter(model, folder), then write_merged(model, output)."
        )
    if len(results) > 1:
        options = [next(iter(names)) for names in results]
        raise ValueError(
            f"{base}: the adapter's module {next(iter(adapter.modules))} may be any of {few(sorted(options))}. "
            "Merge in Python instead: load_adapter(model, folder), then write_merged(model, output)."
        )
    _check_shapes(adapter, reader, fitting[0], base)
    return fitting[0]


def _prefixes(names: Iterable[str]) -> list[str]:
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for length in range(1, min(3, len(parts) - 1) + 1):
            found[".".join(parts[:length]) + "."] = None
    return list(found)


def _check_shapes(adapter: AdapterFile, reader: ShardReader, rename: Callable[[str], str], base: Path) -> None:
    for name, module in adapter.modules.items():
        info = reader.tensors[f"{rename(name)}.weight"]
        stored = module.shape[::-1] if module.layout == "conv1d" else module.shape
        if info.shape != stored:
            raise ValueError(
                f"{base}: {info.key} is stored as {list(info.shape)}, the adapter {adapter.folder} was trained on "
                f"{list(stored)}. Give the base that the adapter was trained on."
            )
        if info.dtype not in FLOATS:
            raise ValueError(
                f"{base}: {info.key} is stored as {info.dtype}, a quantised form that cannot be merged into. "
                "Give the unquantised base."
            )
