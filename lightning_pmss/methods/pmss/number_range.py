"""Find out, before training, whether a layer's update and its gradient stay within the range of the dtypes they pass.

U is about ``V / |W|^2``. For weights near the ends of a dtype's range (1e-20 in float32, 1e-5 in float16) it overflows, so that
the output becomes NaN, or it vanishes, so that nothing is learned.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_pmss.layers.products import core_dtype, without_autocast
from lightning_pmss.methods.pmss.coordinates import Frame, PMSSCore, coordinate_frame, scaled

LIMIT = 0.5
"""Share of an update, or of a gradient, whose loss to over- or underflow is refused."""
_SIZE = 0.1  # entries of V after some training
_SAMPLE = 8


def why_out_of_range(
    weight: Tensor, slices: tuple[Tensor, Tensor], frame: Frame, coordinates: str, scale: float, dtype: torch.dtype
) -> str | None:
    """Why the update of a layer cannot be trained in a dtype, with the remedy, to be put behind its name; None if it can.

    Plays the layer's own products with a few inputs and gradients of usual size, against float64.

    Args:
        weight: W ``[out, in]``.
        slices: C ``[out, c]`` and R ``[r, in]``.
        frame: Of the layer's coordinates.
        coordinates: Their name.
        scale: Factor s of the layer.
        dtype: In which the layer computes.
    """
    columns, rows = (part.detach() for part in slices)
    largest = _largest(columns), _largest(rows)
    if 0 in largest:
        what = "columns" if largest[0] == 0 else "rows"
        return f"has nothing but zeros in the selected {what}, so C U R can never change it; exclude this module."
    lost = _lost(columns, rows, frame, scale, dtype)
    if lost <= LIMIT:
        return None
    # Slices that are nearly dependent lose accuracy at any magnitude, which the conversion warns of, and no more. A power of
    # two rounds nothing, so where no number leaves the range the figures are equal to the last bit.
    power = math.frexp(max(largest))[1]
    w, c, r = (scaled(part.detach().double(), -power).to(part.dtype) for part in (weight, columns, rows))
    usual = _lost(c, r, coordinate_frame(c, r, coordinates, weight=w), scale, dtype)
    if math.isfinite(lost) and lost <= 1.01 * usual:
        return None
    kind = str(dtype).removeprefix("torch.")
    fault = "the output becomes NaN" if math.isnan(lost) else "little or nothing of it is learned"
    remedies = ["load the model in float32 or bfloat16"] if dtype == torch.float16 else []
    remedies += ["lower its rank (rank_pattern)"] if not math.isfinite(usual) else []
    return (
        f"cannot be trained in {kind}: an update of weights of this size (at most {max(largest):.2g}) leaves the range of"
        f" {kind}, so that {fault}. {', '.join([*remedies, 'or exclude this module']) if remedies else 'Exclude this module'}."
    )


@torch.enable_grad()  # type: ignore[untyped-decorator]
def _lost(columns: Tensor, rows: Tensor, frame: Frame, scale: float, dtype: torch.dtype) -> float:
    """The share of an update, or of V's gradient, that is lost; NaN where one is not finite, infinity where one vanishes."""
    device = columns.device
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    # Inputs and gradients as they are beside such a weight: of size one, smaller only where the base's own product would
    # not be in range. Outside of float16, which has loss scaling, gradients are those of a mean over many tokens.
    x, g = random(_SAMPLE, rows.shape[1]).to(dtype), random(_SAMPLE, columns.shape[0]).to(dtype)
    x = scaled(x, min(0, -_power(rows)))
    g = scaled(g, min(0, -_power(columns.T)) - (0 if dtype == torch.float16 else 20))
    core = PMSSCore(columns.shape[1], rows.shape[0], frame, core_dtype(columns.dtype), device)
    with torch.no_grad():
        core.weight.copy_(_SIZE * random(*core.weight.shape))
    found = _played(columns.to(dtype), rows.to(dtype), core, scale, x, g)
    exact = _played(columns.double(), rows.double(), core.double(), scale, x.double(), g.double())
    shares = [_share(a.double(), b) for a, b in zip(found, exact, strict=True)]
    return math.nan if any(map(math.isnan, shares)) else max(shares)


def _played(
    columns: Tensor, rows: Tensor, core: PMSSCore, scale: float, x: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``(C U R x, gradient of V, some entries of C U R)``, in the dtypes of the arguments."""
    with without_autocast(x):
        update = core(scale)["U"]
        u = update.detach().to(x.dtype)
        h = x @ rows.T
        y = (h @ u.T) @ columns.T
        grad = (g @ columns).T @ h
        (grad_v,) = torch.autograd.grad(update, core.weight, grad.to(update.dtype))
        c, r = columns[:_SAMPLE].to(update.dtype), rows[:, :_SAMPLE].to(update.dtype)
        merged = (c @ update.detach() @ r).to(x.dtype)
    return y, grad_v, merged


def _share(found: Tensor, exact: Tensor) -> float:
    if not bool(found.isfinite().all()):
        return math.nan
    return _largest(found - exact) / _largest(exact) if bool(found.any()) else math.inf


def _power(rows: Tensor) -> int:
    """Of two, beside which products with these rows and inputs of size one are about one."""
    return math.frexp(_largest(rows) * rows.shape[1] ** 0.5)[1]


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())
