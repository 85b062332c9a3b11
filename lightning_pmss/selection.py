"""Which rows and columns of a frozen weight form its skeleton: pure functions on tensors.

The paper (PMSS, arXiv 2409.16722) selects rows and columns of the pretrained W; its Algorithm 1 is not publicly
available, so every rule here is *reconstructed* and each docstring names the source that it follows instead.
All rules choose **columns** of a matrix ``[out, in]``; rows are the columns of its transpose. They compute in float32
whatever the dtype of W, and draw random numbers only from the generator that they are given.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

Selector = Callable[[Tensor, int, torch.Generator, int], Tensor]
"""``(matrix [m, n] float32, rank, generator, oversample) -> column indices [rank] int64``, all different."""

ROW_MODES = ("independent", "nested")


def lupp(matrix: Tensor, rank: int, generator: torch.Generator, oversample: int) -> Tensor:
    """Pivots of LU with partial pivoting on a sketch of the rows: nearly the quality of pivoted QR, far cheaper.

    Source: Dong & Martinsson, "Simpler is better: a comparative study of randomized pivoting algorithms for CUR and
    interpolative decompositions" (Gaussian sketch ``Y = G W``, LU with partial pivoting of ``Y^T``). Step k of that LU
    sees k rows of Y only, so extra rows would change nothing: Y is first rotated to its leading ``rank`` directions.
    """
    m = matrix.shape[0]
    sketch_rows = min(rank + oversample, m)
    if sketch_rows < m:
        gaussian = torch.randn(sketch_rows, m, generator=generator, dtype=torch.float32, device="cpu").to(matrix.device)
        matrix = gaussian @ matrix
    directions = torch.linalg.eigh(matrix.double() @ matrix.double().T).eigenvectors[:, -rank:].flip(1)
    # The `_ex` form: an exactly singular matrix still has pivots.
    _, swaps, _ = torch.linalg.lu_factor_ex(matrix.T @ directions.to(matrix.dtype))
    # LAPACK reports the swaps one after the other; playing them back turns them into a permutation of the columns.
    order = list(range(matrix.shape[1]))
    for i, j in enumerate(swaps[:rank].tolist()):
        order[i], order[j - 1] = order[j - 1], order[i]
    return torch.tensor(order[:rank], device=matrix.device)


def pivoted_qr(matrix: Tensor, rank: int, generator: torch.Generator, oversample: int) -> Tensor:
    """Greedy column-pivoted QR (Golub 1965), stopped after ``rank`` steps: the faithful reading of "skeleton".

    Gives the pivots of LAPACK's ``geqp3`` without finishing the factorisation. The matrix itself is never changed: each
    step orthogonalises one column against the basis so far (twice, for accuracy) and takes its share from the norms.
    """
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


def leverage(matrix: Tensor, rank: int, generator: torch.Generator, oversample: int) -> Tensor:
    """The columns of largest leverage: squared norms of the columns of the leading ``rank`` right singular vectors.

    Source: Mahoney & Drineas, "CUR matrix decompositions for improved data analysis" (taken greedily, not sampled).
    """
    right = torch.linalg.svd(matrix, full_matrices=False).Vh[:rank]
    return _largest(right.square().sum(0), rank)


def norm(matrix: Tensor, rank: int, generator: torch.Generator, oversample: int) -> Tensor:
    """The columns of largest Euclidean norm (an ablation: ignores that large columns may be parallel)."""
    return _largest(matrix.square().sum(0), rank)


def random(matrix: Tensor, rank: int, generator: torch.Generator, oversample: int) -> Tensor:
    """Columns drawn uniformly without replacement (the control of every comparison)."""
    return torch.randperm(matrix.shape[1], generator=generator, device="cpu")[:rank].to(matrix.device)


def inverse_norm(matrix: Tensor, rank: int, generator: torch.Generator, oversample: int) -> Tensor:
    """Columns drawn without replacement with probability proportional to 1 / squared norm: the weakest ones.

    Source: CURLoRA (arXiv 2408.14572), which draws *with* replacement; a repeated column would only waste parameters.
    Zero columns are taken last, since they can carry no update.
    """
    squared = matrix.square().sum(0).double().cpu()
    # Gumbel top-k = sampling without replacement, with no limit on the number of categories.
    uniform = torch.rand(squared.shape[0], generator=generator, dtype=torch.float64, device="cpu").clamp_(min=1e-300)
    score = -torch.log(squared) - torch.log(-torch.log(uniform))
    score[squared == 0] = -torch.inf
    return _largest(score, rank).to(matrix.device)


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
        oversample: Extra rows of the sketch of ``lupp``.
        seed: With ``name``, the only source of randomness: the global random state is neither read nor changed.
        name: The module's name: layers of one shape get different random draws, and errors can say where.

    Returns:
        ``(rows [rank], cols [rank])``, int64 on the weight's device, without repetition, in the order chosen.

    Raises:
        ValueError: W is not a matrix, holds NaN or infinity, is all zeros, or an argument is out of range.
    """
    where = f"`{name}`: " if name else ""
    if selection not in SELECTORS:
        raise ValueError(f"selection={selection!r} is not known; choose one of {sorted(SELECTORS)}.")
    if row_mode not in ROW_MODES:
        raise ValueError(f"row_mode={row_mode!r} is not known; choose one of {list(ROW_MODES)}.")
    if weight.dim() != 2:
        raise ValueError(f"{where}a skeleton needs a matrix, got a weight of shape {tuple(weight.shape)}.")
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"{where}rank={rank} does not fit {tuple(weight.shape)}; the largest is {min(weight.shape)}.")
    matrix = weight.detach()
    # One pass without temporaries: NaN and infinity are among the extremes.
    least, most = torch.aminmax(matrix)
    largest = torch.maximum(most, -least)
    if not torch.isfinite(largest):
        raise ValueError(f"{where}the weight holds NaN or infinite values; load a sound checkpoint before converting.")
    if largest == 0:
        raise ValueError(f"{where}the weight is all zeros, so C U R can never change it; exclude this module.")
    # Squared norms of tiny or huge weights must neither vanish nor overflow, nor a float64 weight leave float32's range.
    if matrix.dtype == torch.float64:
        matrix = (matrix / largest).float()
    elif matrix.dtype == torch.float32:
        matrix = matrix / largest
    else:
        matrix = matrix.float().div_(largest.float())  # in place: one float32 copy, not two
    select = SELECTORS[selection]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    cols = select(matrix, rank, generator, oversample)
    rows = select(matrix.T if row_mode == "independent" else matrix[:, cols].T, rank, generator, oversample)
    return rows, cols


def projection_residual(weight: Tensor, cols: Tensor) -> float:
    """``||W - C C^+ W||_F / ||W||_F`` with ``C = W[:, cols]``: the share of W that its chosen columns do not span."""
    matrix = weight.detach()
    basis, triangle = torch.linalg.qr(matrix[:, cols].float())
    # Of columns that depend on one another, QR returns arbitrary directions that C does not span: leave those out.
    left, singular, _ = torch.linalg.svd(triangle)
    basis = basis @ left[:, singular > singular[0] * 1e-6]
    rest = total = 0.0
    for part in matrix.split(1024, dim=1):  # in blocks of columns: no copy of the whole matrix
        part = part.float()
        total += float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2
        part = part - basis @ (basis.T @ part)
        rest += float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2
    return (rest / total) ** 0.5


def _largest(score: Tensor, rank: int) -> Tensor:
    # A stable sort, not topk: ties go to the lower index on every device.
    return torch.sort(score, descending=True, stable=True).indices[:rank]
