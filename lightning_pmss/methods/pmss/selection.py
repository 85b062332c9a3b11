"""Which rows and columns of a frozen weight form its skeleton: pure functions on tensors.

The paper (PMSS, arXiv 2409.16722) selects rows and columns of the pretrained W; its Algorithm 1 is not publicly
available, so every rule here is *reconstructed* and each docstring names the source that it follows instead.
All rules choose **columns** of a matrix ``[out, in]``; rows are the columns of its transpose. They compute in float32
whatever the dtype of W, and draw random numbers only from the generator that they are given.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_pmss.methods.pmss.config import ROW_MODES

_BLOCK = 2**22  # elements that are converted to float32 at a time: W itself is never copied


@dataclass(frozen=True)
class Scaled:
    """A weight [m, n] in its own dtype, read as float32 with its largest magnitude divided out.

    Squared norms of tiny or huge weights must neither vanish nor overflow, nor a float64 weight leave float32's range.
    """

    weight: Tensor
    largest: Tensor

    @property
    def T(self) -> Scaled:  # noqa: N802 - as of a tensor
        return Scaled(self.weight.T, self.largest)

    def whole(self) -> Tensor:
        """All of it, float32."""
        return self._read(self.weight)

    def rmultiply(self, left: Tensor) -> Tensor:
        """``left @ W`` [k, n] for a float32 ``left`` [k, m]."""
        if self.outer == 1:
            return torch.cat([left @ block for _, block in self.blocks(1)], dim=1)
        result = left.new_zeros(left.shape[0], self.weight.shape[1])
        for place, block in self.blocks(0):
            result.addmm_(left[:, place], block)
        return result

    @property
    def outer(self) -> int:
        """The dimension whose steps are the longest in memory: blocks are cut along it."""
        return int(self.weight.stride(0) < self.weight.stride(1))

    def blocks(self, dim: int) -> Iterator[tuple[slice, Tensor]]:
        """Places along `dim`, and W there in float32."""
        size, other = self.weight.shape[dim], self.weight.shape[1 - dim]
        step = max(1, _BLOCK // other)
        for start in range(0, size, step):
            place = slice(start, min(start + step, size))
            yield place, self._read(self.weight[place] if dim == 0 else self.weight[:, place])

    def _read(self, part: Tensor) -> Tensor:
        if part.dtype == torch.float64:
            return (part / self.largest).float()
        if part.dtype == torch.float32:
            return part / self.largest
        return part.float().div_(self.largest.float())  # in place: one float32 copy, not two


Selector = Callable[[Scaled, int, torch.Generator, int], Tensor]
"""``(matrix [m, n], rank, generator, oversample) -> column indices [rank] int64``, all different."""


def lupp(matrix: Scaled, rank: int, generator: torch.Generator, oversample: int) -> Tensor:
    """Pivots of LU with partial pivoting on a sketch of the rows: nearly the quality of pivoted QR, far cheaper.

    Source: Dong & Martinsson, "Simpler is better: a comparative study of randomized pivoting algorithms for CUR and
    interpolative decompositions" (LU with partial pivoting of ``Y^T``, Y a sketch of W's rows). Ours around it: see
    `_sketch` and `_pivots`.
    """
    return _pivots(_sketch(matrix, rank, generator, oversample), rank)


def _lupp_both(matrix: Scaled, rank: int, generator: torch.Generator, oversample: int) -> tuple[Tensor, Tensor]:
    """Rows and columns: the rows are sketched in the leading row space that the sketch for the columns has found."""
    sketch = _sketch(matrix, rank, generator, oversample)
    cols = _pivots(sketch, rank)
    return _pivots(matrix.T.rmultiply(torch.linalg.qr(sketch.T).Q.T), rank), cols


def _sketch(matrix: Scaled, rank: int, generator: torch.Generator, oversample: int) -> Tensor:
    """``Q^T W`` with Q a basis of ``W G``: the Gaussian G samples the range of W, and W is projected on that.

    Source: Halko, Martinsson & Tropp, "Finding structure with randomness". A sketch ``G W`` costs half as much; on the
    weights of a trained model its pivots left up to 5 % more of W than those of pivoted QR, these up to 2 %.
    """
    m, n = matrix.weight.shape
    width = min(rank + max(rank // 4, min(rank // 2, 64)) + oversample, m, n)
    if width == m:
        return matrix.whole()
    if width == n:  # G would change nothing
        sampled = matrix.whole()
    else:
        gaussian = torch.randn(width, n, generator=generator, dtype=torch.float32, device="cpu")
        sampled = matrix.T.rmultiply(gaussian.to(matrix.weight.device)).T
    return matrix.rmultiply(torch.linalg.qr(sampled).Q.T)


def _pivots(sketch: Tensor, rank: int) -> Tensor:
    """The columns that a sketch [width, n] stands for: LU proposes `width` of them, and pivoted QR keeps `rank`.

    Step k of the LU sees k rows only, so the sketch is rotated to its principal directions first.
    """
    gram = sketch.new_zeros(len(sketch), len(sketch), dtype=torch.float64)
    for part in sketch.split(1024, dim=1):  # no float64 copy of the whole sketch
        gram.addmm_(part.double(), part.double().T)
    principal = torch.linalg.eigh(gram).eigenvectors.flip(1)
    directions = sketch.T @ principal.to(sketch.dtype)
    # The `_ex` form: an exactly singular matrix still has pivots.
    _, swaps, _ = torch.linalg.lu_factor_ex(directions)
    # LAPACK reports the swaps one after the other; playing them back turns them into a permutation of the columns.
    order = list(range(directions.shape[0]))
    for i, j in enumerate(swaps.tolist()):
        order[i], order[j - 1] = order[j - 1], order[i]
    proposed = torch.tensor(order[: len(swaps)], device=sketch.device)
    if len(proposed) == rank:
        return proposed
    # A small matrix and many small steps: no work for a GPU.
    candidates = directions[proposed].T.cpu()
    # The best number of directions is unknown: few favour the largest directions of W, all include its tail. At low ranks
    # several numbers are tried, and the choice with the smallest residual of the sketch is kept.
    spare = len(proposed) - rank
    numbers = dict.fromkeys(rank + spare * i // 4 for i in range(5)) if rank <= 64 else [rank]
    choices = [proposed[_greedy(candidates[:n].contiguous(), rank).to(sketch.device)] for n in numbers]
    return min(choices, key=lambda kept: projection_residual(directions.T, kept)) if len(choices) > 1 else choices[0]


def pivoted_qr(matrix: Scaled, rank: int, generator: torch.Generator, oversample: int) -> Tensor:
    """Greedy column-pivoted QR (Golub 1965), stopped after ``rank`` steps: the faithful reading of "skeleton".

    Gives the pivots of LAPACK's ``geqp3`` without finishing the factorisation. The matrix itself is never changed: each
    step orthogonalises one column against the basis so far (twice, for accuracy) and takes its share from the norms.
    """
    return _greedy(matrix.whole(), rank)


def _greedy(matrix: Tensor, rank: int) -> Tensor:
    m, n = matrix.shape
    basis = matrix.new_zeros(m, rank)
    remaining = matrix.double().square().sum(0)
    chosen = torch.zeros(rank, dtype=torch.int64, device=matrix.device)
    for k in range(rank):
        pivot = remaining.argmax()
        vector = matrix[:, pivot]
        for _ in range(2):
            vector = vector - basis[:, :k] @ (basis[:, :k].T @ vector)
        length = torch.linalg.vector_norm(vector)
        basis[:, k] = torch.where(length > 0, vector / length, torch.zeros_like(vector))
        chosen[k] = pivot
        remaining = (remaining - (basis[:, k] @ matrix).double().square()).clamp_(min=0)
        # A column is taken once, even when nothing is left of any other (rank-deficient matrix).
        remaining[chosen[: k + 1]] = -1.0
    return chosen


def leverage(matrix: Scaled, rank: int, generator: torch.Generator, oversample: int) -> Tensor:
    """The columns of largest leverage: squared norms of the columns of the leading ``rank`` right singular vectors.

    Source: Mahoney & Drineas, "CUR matrix decompositions for improved data analysis" (taken greedily, not sampled).
    """
    right = torch.linalg.svd(matrix.whole(), full_matrices=False).Vh[:rank]
    return _largest(right.square().sum(0), rank)


def norm(matrix: Scaled, rank: int, generator: torch.Generator, oversample: int) -> Tensor:
    """The columns of largest Euclidean norm (an ablation: ignores that large columns may be parallel)."""
    return _largest(matrix.whole().square().sum(0), rank)


def random(matrix: Scaled, rank: int, generator: torch.Generator, oversample: int) -> Tensor:
    """Columns drawn uniformly without replacement (the control of every comparison)."""
    return torch.randperm(matrix.weight.shape[1], generator=generator, device="cpu")[:rank].to(matrix.weight.device)


def inverse_norm(matrix: Scaled, rank: int, generator: torch.Generator, oversample: int) -> Tensor:
    """Columns drawn without replacement with probability proportional to 1 / squared norm: the weakest ones.

    Source: CURLoRA (arXiv 2408.14572), which draws *with* replacement; a repeated column would only waste parameters.
    Zero columns are taken last, since they can carry no update.
    """
    squared = matrix.whole().square().sum(0).double().cpu()
    # Gumbel top-k = sampling without replacement, with no limit on the number of categories.
    uniform = torch.rand(squared.shape[0], generator=generator, dtype=torch.float64, device="cpu").clamp_(min=1e-300)
    score = -torch.log(squared) - torch.log(-torch.log(uniform))
    score[squared == 0] = -torch.inf
    return _largest(score, rank).to(matrix.weight.device)


SELECTORS: dict[str, Selector] = {
    "lupp": lupp,
    "pivoted_qr": pivoted_qr,
    "leverage": leverage,
    "norm": norm,
    "random": random,
    "inverse_norm": inverse_norm,
}


def select_skeleton(
    weight: Tensor,
    rank: int,
    *,
    selection: str = "lupp",
    row_mode: str = "independent",
    oversample: int = 10,
    seed: int = 0,
    name: str = "",
) -> tuple[Tensor, Tensor]:
    """Choose the rows and the columns of a weight.

    Args:
        weight: W ``[out, in]``, any floating dtype, any device.
        rank: How many rows and how many columns, ``1 <= rank <= min(out, in)``.
        selection: A name in ``SELECTORS``.
        row_mode: ``"independent"`` chooses rows as the columns of ``W^T``; ``"nested"`` (the classical skeleton of
            Goreinov, Tyrtyshnikov and Zamarashkin) as the columns of ``C^T`` with ``C = W[:, cols]``.
        oversample: Extra rows of the sketch of ``lupp``, beside a quarter to a half of the rank.
        seed: With ``name``, the only source of randomness: the global random state is neither read nor changed.
        name: The module's name: layers of one shape get different random draws, and errors can say where.

    Returns:
        ``(rows [rank], cols [rank])``, int64 on the weight's device, without repetition, in the order chosen.

    Raises:
        ValueError: W is not a matrix, holds NaN or infinity, is all zeros, or an argument is out of range.
    """
    if row_mode not in ROW_MODES:
        raise ValueError(f"row_mode={row_mode!r} is not known; choose one of {list(ROW_MODES)}.")
    select, scaled, generator = _prepared(weight, rank, selection, seed, name)
    if select is lupp and row_mode == "independent":
        return _lupp_both(scaled, rank, generator, oversample)
    cols = select(scaled, rank, generator, oversample)
    of_rows = scaled.T if row_mode == "independent" else Scaled(scaled.weight[:, cols].T, scaled.largest)
    rows = select(of_rows, rank, generator, oversample)
    return rows, cols


def select_rows(
    weight: Tensor, rank: int, *, selection: str = "lupp", oversample: int = 10, seed: int = 0, name: str = ""
) -> Tensor:
    """Choose rows of a weight alone: int64 ``[rank]``. Arguments and errors are those of `select_skeleton`."""
    select, scaled, generator = _prepared(weight, rank, selection, seed, name)
    return select(scaled.T, rank, generator, oversample)


def _prepared(
    weight: Tensor, rank: int, selection: str, seed: int, name: str
) -> tuple[Selector, Scaled, torch.Generator]:
    """The rule, W without its magnitude, and the source of randomness; all arguments are checked."""
    where = f"`{name}`: " if name else ""
    if selection not in SELECTORS:
        raise ValueError(f"selection={selection!r} is not known; choose one of {sorted(SELECTORS)}.")
    if weight.dim() != 2:
        raise ValueError(f"{where}a skeleton needs a matrix, got a weight of shape {tuple(weight.shape)}.")
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"{where}rank={rank} does not fit {tuple(weight.shape)}; the largest is {min(weight.shape)}.")
    matrix = weight.detach()
    largest = _extreme(matrix)
    if not torch.isfinite(largest):
        raise ValueError(f"{where}the weight holds NaN or infinite values; load a sound checkpoint before converting.")
    if largest == 0:
        raise ValueError(f"{where}the weight is all zeros, so C U R can never change it; exclude this module.")
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    return SELECTORS[selection], Scaled(matrix, largest), generator


def projection_residual(weight: Tensor, cols: Tensor) -> float:
    """``||W - C C^+ W||_F / ||W||_F`` with ``C = W[:, cols]``: the share of W that its chosen columns do not span."""
    matrix = weight.detach()
    largest = _extreme(matrix)
    basis, triangle = torch.linalg.qr(Scaled(matrix[:, cols], largest).whole())
    # Of columns that depend on one another, QR returns arbitrary directions that C does not span: leave those out.
    left, singular, _ = torch.linalg.svd(triangle)
    basis = basis @ left[:, singular > singular[0] * 1e-6]
    scaled = Scaled(matrix, largest)
    covered = scaled.rmultiply(basis.T)
    blocks = partial(scaled.blocks, scaled.outer)
    total = sum(_square(block) for _, block in blocks())
    rest = total - _square(covered)
    if rest < 0.01 * total:  # the difference would be mostly rounding
        rest = 0.0
        for place, block in blocks():
            fit = basis[place] @ covered if scaled.outer == 0 else basis @ covered[:, place]
            rest += _square(block - fit)
    return (max(rest, 0.0) / total) ** 0.5


def _square(matrix: Tensor) -> float:
    """Squared Frobenius norm: long sums in float64, without a float64 copy."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())


def _extreme(matrix: Tensor) -> Tensor:
    """The largest magnitude, in one pass without temporaries; NaN and infinity are among the extremes."""
    least, most = torch.aminmax(matrix)
    return torch.maximum(most, -least)


def _largest(score: Tensor, rank: int) -> Tensor:
    # A stable sort, not topk: ties go to the lower index on every device.
    return torch.sort(score, descending=True, stable=True).indices[:rank]
