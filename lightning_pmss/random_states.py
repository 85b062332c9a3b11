"""States of all random generators that a training step uses."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """States of all random generators that a training step uses, as plain values and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [
            name,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    python, numpy = as_kept(states)
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in states["cuda"]])


def as_kept(states: Mapping[str, Any]) -> tuple[Any, Any]:
    """Arguments for ``random.setstate`` and ``numpy.random.set_state`` from stored states."""
    version, internal, gauss = states["python"]
    name, keys, position, has_gauss, cached = states["numpy"]
    return (version, tuple(internal), gauss), (name, keys.numpy().astype(np.uint32), position, has_gauss, cached)
