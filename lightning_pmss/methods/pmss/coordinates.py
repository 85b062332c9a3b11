"""What is trained: a tensor V in chosen *coordinates*, from which U of ``W' = W + s C U R`` is derived.

Reconstructed: with U itself trained, as drawn in the paper's figure, one learning rate does not fit layers whose norms differ
by a factor of hundreds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_pmss.layers.adapter import Adapter, FrozenTensors
from lightning_pmss.layers.products import core_dtype, without_autocast
from lightning_pmss.methods.pmss.rotation import cayley_minus_identity, cayley_parameters, packed_shape


class Frame(NamedTuple):
    """What turns the trained V ``[c, r]`` into U: ``U = gain * (left @ V @ right)``; parts that a frame lacks are None.

    With a core M ``[c, r]`` fewer numbers are trained, and ``V = M @ cayley_minus_identity(gain * numbers)`` (`rotation`).
    """

    left: Tensor | None = None
    right: Tensor | None = None
    gain: Tensor | None = None
    core: Tensor | None = None

    def present(self) -> dict[str, Tensor]:
        """The parts that there are, by name."""
        return {name: part for name, part in self._asdict().items() if part is not None}


def coordinate_frame(
    columns: Tensor | None, rows: Tensor, coordinates: str, name: str = "", *, weight: Tensor | None = None
) -> Frame:
    """Compute the frame of one layer from its slices.

    Args:
        columns: C ``[out, c]``; None for a one-sided skeleton, whose frame has no `left`.
        rows: R ``[r, in]``.
        coordinates: ``"raw"``: U = V. ``"spectral"``: U = V / (norm2(C) norm2(R)), one scalar. ``"orthonormal"``: with thin
            QR ``C = Q_C T_C``, ``R^T = Q_R T_R``: U = T_C^-1 V T_R^-T, so that ``C U R = Q_C V Q_R^T`` and the update's
            Frobenius norm is V's. ``"rotation"``: the same with V made by turning what W has there.
        name: Module name for errors.
        weight: W ``[out, in]``, which ``"rotation"`` needs.

    Returns:
        Tensors in float32 (float64 for a float64 base), computed in float64 on slices of magnitude one, so that neither
        tiny nor huge weights leave its range on the way.

    Raises:
        ValueError: The slices hold NaN or infinity, or are linearly dependent, so that orthonormal coordinates do not exist.
    """
    dtype = core_dtype(rows.dtype)
    slices = [part.detach() for part in (columns, rows) if part is not None]
    largest = max(float(part.abs().max()) for part in slices)
    if not math.isfinite(largest):
        raise ValueError(f"`{name}`: the selected rows or columns hold NaN or infinite values; load sound weights.")
    if coordinates == "raw":
        return Frame()
    power = math.frexp(largest)[1]  # scaling by a power of two rounds nothing
    if columns is None:
        return _one_sided(slices[0], power, coordinates, name)
    c, r = (scaled(part.double(), -power) for part in slices)
    t_c, t_r = torch.linalg.qr(c, mode="r").R, torch.linalg.qr(r.T, mode="r").R
    singular = torch.linalg.svdvals(t_c), torch.linalg.svdvals(t_r)
    if coordinates == "spectral":
        return rescaled(Frame(gain=(1.0 / (singular[0][0] * singular[1][0])).to(dtype)), -power)
    usable = [_usable(s) for s in singular]
    if usable[0] < t_c.shape[0] or usable[1] < t_r.shape[0]:
        fewer = f"set rank_pattern={{{name!r}: {min(usable)}}} or" if min(usable) else "set"
        raise ValueError(
            f"`{name}`: the {t_c.shape[0]} selected columns and {t_r.shape[0]} rows have only numerical rank {usable[0]} and"
            f" {usable[1]}; {fewer} coordinates='spectral', or exclude the module."
        )
    eye_c, eye_r = (torch.eye(t.shape[0], dtype=t.dtype, device=t.device) for t in (t_c, t_r))
    left = torch.linalg.solve_triangular(t_c, eye_c, upper=True)
    right = torch.linalg.solve_triangular(t_r, eye_r, upper=True).T.contiguous()
    frame = Frame(left.to(dtype), right.to(dtype))
    if coordinates == "rotation":
        assert weight is not None
        frame = _rotating(frame, c, r, weight, power, name)
    return rescaled(frame, -power)


def _one_sided(rows: Tensor, power: int, coordinates: str, name: str) -> Frame:
    """The frame of rows alone, computed on ``rows / 2**power``."""
    dtype, rows = core_dtype(rows.dtype), scaled(rows.double(), -power)
    t_r = torch.linalg.qr(rows.T, mode="r").R
    singular = torch.linalg.svdvals(t_r)
    if coordinates == "spectral":
        return Frame(gain=scaled((1.0 / singular[0]).to(dtype), -power))
    if (usable := _usable(singular)) < len(rows):
        fewer = f"set rank_pattern={{{name!r}: {usable}}} or" if usable else "set"
        raise ValueError(
            f"`{name}`: the {len(rows)} selected rows have only numerical rank {usable}; {fewer} coordinates='spectral', or"
            " exclude the module."
        )
    eye = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    right = torch.linalg.solve_triangular(t_r, eye, upper=True).T.contiguous().to(dtype)
    return Frame(right=scaled(right, -power))


def _usable(singular: Tensor) -> int:
    """The numerical rank: slices that depend on one another up to float32 rounding have no usable inverse factors."""
    return int((singular > singular[0] * 1e-5).sum())


def rescaled(frame: Frame, power: int) -> Frame:
    """The frame of ``W / 2**power``, from that of W."""
    left, right, gain, core = frame
    return Frame(
        None if left is None else scaled(left, power),
        None if right is None else scaled(right, power),
        None if gain is None else scaled(gain, 2 * power if core is None else power),
        None if core is None else scaled(core, -power),
    )


def scaled(tensor: Tensor, power: int) -> Tensor:
    """``tensor * 2**power``; in steps, since the factor itself may leave the range of the dtype."""
    while power:
        step = max(-100, min(100, power))
        tensor, power = tensor * 2.0**step, power - step
    return tensor


def _rotating(frame: Frame, columns: Tensor, rows: Tensor, weight: Tensor, power: int, name: str) -> Frame:
    """The frame with ``M = Q_C^T W Q_R`` and the gain with which, near zero, the update has about the norm of the numbers.

    All of slices, and of a W, that are divided by ``2**power``.
    """
    assert frame.left is not None
    assert frame.right is not None
    if len(rows) < 2:
        raise ValueError(
            f"`{name}`: with rank 1 there is nothing to rotate; type a rank of at least 2, or exclude the module."
        )
    wide = frame.left.dtype
    q_c, q_r = columns.to(wide) @ frame.left, rows.T.to(wide) @ frame.right.T
    core = q_c.T @ scaled(weight.to(wide), -power) @ q_r
    mean_square = core.square().sum() / core.shape[1]
    return frame._replace(core=core, gain=(8 * mean_square).rsqrt())


def check_frame(frame: Frame, coordinates: str, columns: int | None, rows: int) -> str | None:
    """Why these factors, finite but of unknown origin, are none of a layer with so many columns and rows; None if they fit.

    Args:
        frame: The factors.
        coordinates: Their name.
        columns: C; None for a one-sided skeleton, which has no factor for columns.
        rows: R.
    """
    parts: tuple[str, ...] = Frame._fields
    parts = {"raw": (), "spectral": ("gain",), "orthonormal": ("left", "right")}.get(coordinates, parts)
    parts = tuple(part for part in parts if part != "left" or columns is not None)
    if present := [part for part, value in frame._asdict().items() if (value is not None) != (part in parts)]:
        return (
            f"in {coordinates} coordinates a layer has {', '.join(parts) or 'none'}, and {present[0]} does not fit that"
        )
    if frame.gain is not None and (frame.gain.numel() != 1 or not float(frame.gain) > 0):
        return "gain is not one positive number"
    if frame.core is not None and frame.core.shape != (columns, rows):
        return f"core is {list(frame.core.shape)}, and must be {[columns, rows]}"
    for part, value, size in (("left", frame.left, columns), ("right", frame.right, rows)):
        if value is None or size is None:
            continue
        if value.shape != (size, size):
            return f"{part} is {list(value.shape)}, and must be {[size, size]}"
        triangle = value.triu() if part == "left" else value.tril()
        diagonal = value.diagonal().abs()
        # Inverse factors of slices that `coordinate_frame` takes are far from singular.
        if not torch.equal(triangle, value) or not float(diagonal.min()) > 1e-8 * float(diagonal.max()):
            return f"{part} is not an invertible triangle"
    return None


def trained_shape(coordinates: str, rank: int) -> tuple[int, int]:
    """Of what is trained in a layer with `rank` rows and columns."""
    return packed_shape(rank) if coordinates == "rotation" else (rank, rank)


class TriangularProducts(torch.autograd.Function):
    """``left @ v @ right`` for upper triangular left ``[c, c]`` and lower triangular right ``[r, r]``, both frozen.

    In four blocks a side, which leave out most of the zeros: 5/8 of the multiply-adds.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, v: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        v = torch.cat([left[i:j, i:] @ v[i:] for i, j in _quarters(len(left))])
        return torch.cat([v[:, i:] @ right[i:, i:j] for i, j in _quarters(len(right))], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        left, right = ctx.saved_tensors
        grad = torch.cat([grad[:, :j] @ right[i:j, :j].T for i, j in _quarters(len(right))], 1)
        return None, torch.cat([left[:j, i:j].T @ grad[:j] for i, j in _quarters(len(left))]), None


def _quarters(size: int) -> list[tuple[int, int]]:
    edges = [size * k // 4 for k in range(5)]
    return list(pairwise(edges))


class CoreFrame(FrozenTensors):
    """The frozen factors of the coordinates, apart from V."""

    left: nn.Parameter | None
    right: nn.Parameter | None
    gain: nn.Parameter | None
    core: nn.Parameter | None

    def __init__(self, frame: Frame, device: torch.device) -> None:
        super().__init__(frame.present(), device)
        for name in Frame._fields:
            if name not in self._parameters:
                self.register_parameter(name, None)

    def forward(self, v: Tensor) -> Tensor:  # type: ignore[override]
        """U ``[c, r]`` from what is trained."""
        if self.left is not None and self.right is not None:
            # Rounding errors of the inverse factors are multiplied by the slices' condition number, so the products are in
            # float32, also under DeepSpeed's bf16 engine, which stores V and the factors in bfloat16.
            wide = torch.promote_types(v.dtype, torch.float32)
            with without_autocast(v):
                left, right = self.left.to(wide), self.right.to(wide)
                if self.core is not None and self.gain is not None:
                    v = self.core.to(wide) @ cayley_minus_identity(v.to(wide) * self.gain.to(wide), len(right))
                if v.device.type == "cpu" and min(v.shape) >= 192:  # elsewhere kernels count, not multiply-adds
                    u: Tensor = TriangularProducts.apply(left, v.to(wide), right)
                    return u
                return left @ v.to(wide) @ right
        assert self.gain is not None
        return v * self.gain


class PMSSCore(Adapter):
    """Owns the one trained tensor, ``weight`` (V ``[c, r]``, or the numbers of a rotation), and turns it into ``s U``."""

    weight: nn.Parameter
    frame: CoreFrame | None  # type: ignore[assignment]

    def __init__(self, columns: int, rows: int, frame: Frame, dtype: torch.dtype, device: torch.device) -> None:
        shape = (columns, rows) if frame.core is None else packed_shape(rows)
        super().__init__(self.values_of, {"weight": torch.zeros(shape, dtype=dtype, device=device)}, {}, device)
        self.frame = CoreFrame(frame, device) if frame.present() else None

    def forward(self, scale: float = 1.0) -> dict[str, Tensor]:
        """``{"U": scale * U [c, r]}``, in V's own dtype, also under autocast."""
        if self.frame is None:
            return {"U": scale * self.weight}
        if self.frame.core is not None:  # scaled afterwards it would be no rotation
            return {"U": self.frame(scale * self.weight)}
        u: Tensor = self.frame(self.weight)
        return {"U": u if scale == 1 else scale * u}

    @staticmethod
    def values_of(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """What a core with these tensors returns: ``weight`` and the parts of its `Frame`, given whole."""
        frame = Frame(*(tensors.get(part) for part in Frame._fields))
        columns, rows = (tensors["weight"] if frame.core is None else frame.core).shape
        core = PMSSCore(columns, rows, frame, tensors["weight"].dtype, tensors["weight"].device)
        made: dict[str, Tensor] = torch.func.functional_call(core, {"weight": tensors["weight"]}, (scale,))
        return made

    @torch.no_grad()
    def numbers_of(self, u: Tensor, scale: float = 1.0, name: str = "") -> Tensor:
        """What ``weight`` must hold for ``forward(scale)`` to yield ``u`` (solved in float64); nothing is changed.

        Args:
            u: ``s U [c, r]``.
            scale: S.
            name: Module name for errors.

        Raises:
            ValueError: In ``rotation`` coordinates u does not turn W; or the numbers are too large or too small for the
                dtype in which V is kept.
        """
        v = u.to(self.weight.device, torch.float64)
        if (frame := self.frame) is not None and frame.left is not None and frame.right is not None:
            v = torch.linalg.solve(frame.left.double(), v)
            v = torch.linalg.solve(frame.right.double(), v, left=False)
        if frame is not None and frame.core is not None:
            v = cayley_parameters(frame.core.double(), v, name)
        if frame is not None and frame.gain is not None:
            v = v / frame.gain.double()
        v = v / scale
        numbers = v.to(self.weight.dtype)
        lost = float(torch.linalg.vector_norm(numbers.double() - v))  # not finite where the numbers are not
        if not lost <= 1e-3 * float(torch.linalg.vector_norm(v)) or not is_finite(self, numbers, scale):
            kind = str(numbers.dtype).removeprefix("torch.")
            raise ValueError(
                f"`{name}`: with scale {scale:.3g} its update needs trained numbers up to {float(v.abs().max()):.3g}, which"
                f" {kind} cannot hold. Load it with a scale near 1."
            )
        return numbers

    def reset_parameters(self) -> None:
        """Called by engines once parameters that were made on the meta device have memory: V starts at zero."""
        nn.init.zeros_(self.weight)


@torch.no_grad()
def is_finite(core: PMSSCore, numbers: Tensor, scale: float) -> bool:
    """Whether U would be finite, were it made of these numbers in place of the core's own."""
    made = torch.func.functional_call(core, {"weight": numbers}, (scale,))
    return bool(made["U"].isfinite().all())
