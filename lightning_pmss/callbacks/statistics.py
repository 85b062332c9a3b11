"""Restore running statistics, such as BatchNorm's, which the forward passes of a skipped step have changed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_Place = tuple[nn.Module, str]


class RunningStatistics:
    """Copy and restore the buffers that forward passes change, so that skipped batches have no effect on them.

    These are the buffers of norms with running statistics, and those of other modules from their first change on.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._moving: set[tuple[int, str]] = set()
        self._seen: dict[tuple[int, str], tuple[int, int]] = {}
        self._kept: list[tuple[_Place, Tensor]] = []

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the present values of these buffers."""
        self._kept = []
        for module in self.module.modules():
            norm = isinstance(module, nn.modules.batchnorm._NormBase)
            for name, buffer in module._buffers.items():
                if buffer is None or buffer.is_inference():
                    continue
                key, state = (id(module), name), (id(buffer), buffer._version)
                if norm or self._seen.setdefault(key, state) != state:
                    self._moving.add(key)
                if key in self._moving:
                    self._kept.append(((module, name), buffer.detach().clone()))

    @torch.no_grad()
    def give_back(self) -> None:
        """Restore the values of the last `keep`."""
        for (module, name), value in self._kept:
            buffer = module._buffers[name]
            if buffer is not None:
                buffer.copy_(value)
