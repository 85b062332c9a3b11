"""What is known of layers before they are converted: from a skeleton file, an adapter or a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_pmss.messages import some


@dataclass(frozen=True)
class GivenLayer:
    """One layer.

    Attributes:
        tensors: Some or all of the frozen and index tensors of its method, by name; indices int64, canonical layout.
        fingerprint: Of what the update reads of W; None where unknown.
        shape: (out, in) of W; None where unknown.
        figures: Fields of `LayerReport` that are known.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    fingerprint: Mapping[str, str] | None = None
    shape: tuple[int, int] | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Given:
    """The layers of a model by canonical module name.

    Attributes:
        layers: One entry per layer.
        source: Where it comes from, for messages.
        coordinates: Of the frozen tensors of PMSS in the file, also where they are other ones than wanted; None: it has none.
        options: What it was made with, as stored.
        complete: Whether the frozen tensors are there, so that they are not derived from W.
    """

    layers: Mapping[str, GivenLayer]
    source: str = "the skeleton"
    coordinates: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = False

    def refuse_lacking(self, name: str, derived: str) -> None:
        """Refuse a layer of which nothing is known.

        Args:
            name: The layer.
            derived: What its method derives from W, in words.

        Raises:
            ValueError: It has no entry.
        """
        if name not in self.layers:
            raise ValueError(
                f"{self.source} has no {derived} for `{name}`; it has those of {some(sorted(self.layers))}."
            )
