"""Rules that combine the updates of several adapters, each as an exact LoRA ``B A``, into one LoRA.

``cat`` is the exact weighted sum. ``svd`` cuts it to a rank. ``linear``, ``ties``, ``dare_linear``, ``dare_ties`` and
``magnitude_prune`` combine the factors themselves, as peft's ``add_weighted_adapter`` does and with peft's own functions.
``lego`` is LoRA-LEGO (arXiv 2409.16167), which clusters the rank-one units of all adapters.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_pmss.methods.lora import lora_pair
from lightning_pmss.methods.method import Factors

SAME_RANKS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Rules that combine factors entry by entry."""
RULES = ("lego", "cat", "svd", *SAME_RANKS)
CUTTING = ("lego", "svd")
"""Rules that take a rank."""
ANY_UPDATE = ("svd",)
"""Rules that also take updates that are no product of thin matrices."""
PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Rules that take a density."""
UNITS = ("aligned", "raw", "normalised")
"""What ``lego`` clusters. "raw": units as they are. "normalised": a and b are divided by their norms, and a centre is the mean
of units as they are. "aligned", ours: units are flipped from ``(a, b)`` to ``(-a, -b)`` where they point against the main
direction of the pool, and a and b get one norm; both leave ``b a`` as it is, but not the distance between units."""


@dataclass(frozen=True)
class Rule:
    """A rule and its options.

    Attributes:
        name: One of `RULES`.
        rank: Of the result, for `CUTTING`; a layer whose updates have less keeps less.
        density: Share of the entries that `PRUNING` rules keep, in (0, 1].
        seed: Of the k-means of ``lego`` and the draws of ``dare``.
        units: What ``lego`` clusters, one of `UNITS`; "aligned" if None.

    Raises:
        ValueError: An unknown rule, or an option that is missing, out of range, or not the rule's.
    """

    name: str
    rank: int | None = None
    density: float | None = None
    seed: int = 0
    units: str | None = None

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise ValueError(f"rule={self.name!r} is not known; choose one of {', '.join(RULES)}.")
        if (self.name in CUTTING) != (self.rank is not None):
            need = "needs a rank: type --rank" if self.name in CUTTING else "has no rank: leave --rank out"
            raise ValueError(f"rule {self.name} {need}. {', '.join(CUTTING)} take one.")
        if self.rank is not None and (isinstance(self.rank, bool) or self.rank < 1):
            raise ValueError(f"rank={self.rank!r} is not a rank; type a whole number of at least 1.")
        if (self.name in PRUNING) != (self.density is not None):
            need = "needs a density: type --density" if self.name in PRUNING else "has no density: leave --density out"
            raise ValueError(f"rule {self.name} {need}. {', '.join(PRUNING)} take one.")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density={self.density!r} must be above 0 and at most 1.")
        if self.units is not None and self.name != "lego":
            raise ValueError(f"rule {self.name} clusters no units: leave --units out, or take --rule lego.")
        if self.units is not None and self.units not in UNITS:
            raise ValueError(f"units={self.units!r} is not known; choose one of {', '.join(UNITS)}.")

    def combined(self, parts: Sequence[tuple[float, Factors]], name: str = "") -> Factors:
        """The update of one layer.

        Args:
            parts: Weight and factors of each adapter, A ``[r, in]`` and B ``[out, r]``, float64. Rules of `SAME_RANKS` and
                ``lego`` depend on how the size of an update is shared between its weight, A and B.
            name: The layer, on which draws depend as on the seed.

        Raises:
            ValueError: The rule combines factors of one rank, and these have several.
        """
        if self.name == "cat":
            return _joined(parts)
        if self.name == "svd":
            a, b, _ = lora_pair(_joined(parts), self.rank)
            return Factors(a, b)
        if self.name == "lego":
            assert self.rank is not None
            return lego(parts, self.rank, seed=self.seed_of(name), units=self.units or UNITS[0])
        ranks = sorted({len(part.a) for _, part in parts})
        if len(ranks) > 1:
            raise ValueError(
                f"rule {self.name} combines factors of one rank, and these have {ranks}; take lego, svd or cat."
            )
        return self._by_entries(parts, name)

    def seed_of(self, name: str) -> int:
        """The seed of a layer's draws."""
        return zlib.crc32(f"{self.seed}:{name}".encode())

    def _by_entries(self, parts: Sequence[tuple[float, Factors]], name: str) -> Factors:
        """As peft: the root of a weight goes to each factor, its sign to A."""
        apply = _entry_rule(self)
        roots = torch.tensor([math.sqrt(abs(weight)) for weight, _ in parts], dtype=torch.float64)
        signs = torch.tensor([-1.0 if weight < 0 else 1.0 for weight, _ in parts], dtype=torch.float64)
        with torch.random.fork_rng(devices=[]):  # peft's functions draw from the global generator
            torch.manual_seed(self.seed_of(name))
            a = apply([part.a for _, part in parts], roots * signs)
            b = apply([part.b for _, part in parts], roots)
        return Factors(a, b)


def lego(parts: Sequence[tuple[float, Factors]], rank: int, *, seed: int = 0, units: str = UNITS[0]) -> Factors:
    """LoRA-LEGO (arXiv 2409.16167), reconstructed from two implementations by others; the authors released no code.

    Each rank-one piece of each adapter is a unit ``[a, b]``. The units of all adapters are clustered by k-means into ``rank``
    clusters. A centre is scaled to the mean size (largest entry) of its units, and the output by ``sqrt(r / rank)``, where r is
    the mean rank of the adapters. Those implementations spread LoRA's factor over both halves; here a weight is spread so.

    Args:
        parts: See `Rule.combined`.
        rank: Of the result; at least the number of all units: their exact sum, without clusters and without scaling.
        seed: Of the k-means (scikit-learn, 10 starts).
        units: One of `UNITS`.
    """
    pool = torch.cat([_units(weight, part) for weight, part in parts])
    inputs = parts[0][1].a.shape[1]
    if len(pool) <= rank:
        return _split(pool, inputs)
    if units == "aligned":
        pool = _aligned(pool, inputs)
    points = _normalised(pool, inputs) if units == "normalised" else pool
    try:
        from sklearn.cluster import KMeans
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "rule lego uses k-means of scikit-learn, which is not installed: pip install 'lightning-pmss[combine]'",
            name=error.name,
        ) from error
    found = KMeans(rank, n_init=10, max_iter=300, random_state=seed).fit(points.cpu().numpy())
    labels = torch.from_numpy(found.labels_).long()
    centres = torch.zeros(rank, pool.shape[1], dtype=pool.dtype).index_add_(0, labels, pool.cpu())
    counts = torch.bincount(labels, minlength=rank).clamp(min=1)[:, None]
    centres /= counts
    sizes = (
        torch.zeros(rank, 1, dtype=pool.dtype).index_add_(0, labels, pool.cpu().abs().amax(1, keepdim=True)) / counts
    )
    own = centres.abs().amax(1, keepdim=True)
    centres = torch.where(own > 0, centres * (sizes / own.clamp(min=torch.finfo(own.dtype).tiny)), centres)
    a, b = _split(centres, inputs)
    mean_rank = sum(len(part.a) for _, part in parts) / len(parts)
    return Factors(a, math.sqrt(mean_rank / rank) * b)


def _units(weight: float, part: Factors) -> Tensor:
    """``[a, b]`` of each rank-one piece, ``[r, in + out]``, with the root of the weight in each half; no zero pieces."""
    root, sign = math.sqrt(abs(weight)), -1.0 if weight < 0 else 1.0
    units = torch.cat([root * sign * part.a, root * part.b.T], 1)
    used = part.a.ne(0).any(1) & part.b.ne(0).any(0)
    return units[used]


def _split(units: Tensor, inputs: int) -> Factors:
    return Factors(units[:, :inputs].contiguous(), units[:, inputs:].T.contiguous())


def _aligned(units: Tensor, inputs: int) -> Tensor:
    a, b = units[:, :inputs], units[:, inputs:]
    ratio = (b.norm(dim=1, keepdim=True) / a.norm(dim=1, keepdim=True)).sqrt()
    units = torch.cat([a * ratio, b / ratio], 1)
    main = torch.linalg.svd(units, full_matrices=False).Vh[0]
    return torch.where((units @ main)[:, None] < 0, -units, units)


def _normalised(units: Tensor, inputs: int) -> Tensor:
    a, b = units[:, :inputs], units[:, inputs:]
    return torch.cat([a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)], 1)


def _joined(parts: Sequence[tuple[float, Factors]]) -> Factors:
    return Factors(torch.cat([part.a for _, part in parts]), torch.cat([weight * part.b for weight, part in parts], 1))


def _entry_rule(rule: Rule) -> Callable[[list[Tensor], Tensor], Tensor]:
    try:
        from peft.utils import merge_utils
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"rule {rule.name} uses peft's functions, and peft is not installed: pip install 'lightning-pmss[combine]'",
            name=error.name,
        ) from error
    if rule.name == "linear":
        return lambda tensors, weights: merge_utils.task_arithmetic(tensors, weights)
    function = getattr(merge_utils, rule.name)
    return lambda tensors, weights: function(tensors, weights, rule.density)
