"""The one-sided skeleton, ``columns="all"``: ``W' = W + U W[rows]``, of which U ``[out, r]`` is trained.

It is PMSS with all columns: C then spans every output, so U is trained in its place. The features ``W[rows] x`` are entries of
the layer's own output ``y = W x``. The forward pass gathers them there, and the backward pass keeps these r numbers per token
and nothing of x::

    h = y[rows]        y' = y + U h + b          dU = g^T h          dx = W^T g + W[rows]^T (U^T g)

As a LoRA it is ``A = W[rows]``, ``B = U``, exactly. Ours; arXiv 2409.16722 selects columns and rows. Nearest published: PaCA
(arXiv 2503.01905), whose features are entries of x, and LoRA with a frozen random A (arXiv 2402.16842).

What is trained is V with ``U = s V right`` (or ``s gain V``): in orthonormal coordinates ``right @ W[rows]`` has orthonormal
rows, so that the update has the Frobenius norm of ``s V``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_pmss.layers.adapted import AdaptedLinear
from lightning_pmss.layers.applied import AppliedLayer
from lightning_pmss.layers.convertible import has_own_product
from lightning_pmss.layers.expert_stack import GroupedLayer
from lightning_pmss.layers.layout import picked
from lightning_pmss.layers.products import compute_dtype, dropped, product, without_autocast
from lightning_pmss.layers.quantised import dequantised_slice
from lightning_pmss.methods.given import Given
from lightning_pmss.methods.method import Factors, Kind, Method, Shape, Spec, Update, why_misshapen
from lightning_pmss.methods.pmss import sums
from lightning_pmss.methods.pmss.applied import applied_edit, why_not_applied
from lightning_pmss.methods.pmss.config import PMSSConfig
from lightning_pmss.methods.pmss.coordinates import Frame, coordinate_frame
from lightning_pmss.methods.pmss.edits import slice_of
from lightning_pmss.methods.pmss.experts import why_no_expert_options
from lightning_pmss.methods.pmss.merged_twice import is_merged
from lightning_pmss.methods.pmss.number_range import why_out_of_range
from lightning_pmss.methods.pmss.rounding import LIMIT, LOW_PRECISION, fitting_rank, rounding_error
from lightning_pmss.methods.pmss.selection import projection_residual, select_rows
from lightning_pmss.methods.pmss.skeleton import read_skeleton, why_no_skeleton
from lightning_pmss.store import why_no_index

_OUTPUTS = 8  # of a layer, for which its numbers are tried out: each has a U of its own


@dataclass(frozen=True)
class OneSidedUpdate(Update):
    """``W' = W + U W[rows]``.

    Attributes:
        U: ``[out, r]``, with the scale folded in, float32 (float64 on a float64 base).
        rows: int64 ``[r]``, rows of W in the canonical layout ``[out, in]``.
    """

    bound_to_base = True

    U: Tensor
    rows: Tensor

    @property
    def rank(self) -> int:
        return len(self.rows)

    @classmethod
    def why_not(cls, shape: Shape, tensors: Mapping[str, Tensor]) -> str | None:
        if reason := why_no_index(tensors["rows"], shape[0]):
            return f"rows {reason}. W is {list(shape)}"
        return why_misshapen(tensors, {"U": (shape[0], len(tensors["rows"]))})

    @classmethod
    def reads(cls, weight: Tensor, indices: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return (picked(weight, indices["rows"].to(weight.device), 0),)

    @classmethod
    def weighted(cls, updates: Sequence[tuple[float, OneSidedUpdate]]) -> OneSidedUpdate:
        # As two-sided updates with every column: their sum is over the union of the rows.
        every = torch.arange(len(updates[0][1].U), device=updates[0][1].U.device)
        u, rows, _ = sums.weighted([(weight, (u.U, u.rows, every)) for weight, u in updates])
        return cls(u, rows)

    def trimmed(self) -> OneSidedUpdate:
        used = self.U.ne(0).any(dim=0)
        used[0] |= not bool(used.any())  # never trained: one row stands for it
        return OneSidedUpdate(self.U[:, used], self.rows[used])

    def factors(self, weight: Tensor, dtype: torch.dtype) -> Factors:
        (r,) = self.reads(weight, {"rows": self.rows})
        return Factors(r.to(dtype), self.U.to(dtype))


class OneSidedLinear(AdaptedLinear):
    """A layer converted with ``columns="all"``. In canonical layout ``W [out, in]``::

        W' = weight + core_update() @ weight[rows]

    Attributes:
        rows: int64 ``[r]``; neither parameter nor buffer (`lightning_pmss.layers.indices`).
        core: Owner of the trained ``weight``, V ``[out, r]``.
    """

    rows: Tensor

    def core_update(self) -> Tensor:
        """U ``[out, r]`` with the scale."""
        update: Tensor = self.core(self.scale)["U"]
        return update

    def weight_rows(self) -> Tensor:
        """``W[rows] [r, in]`` of the pristine W, in its dtype; a collective where W is kept in parts."""
        return self.reads()[0]


class OneSidedEdit(torch.autograd.Function):
    """``y' = y + h U^T + b`` with ``y = x W^T`` and ``h = y[:, rows]``, row-wise over tokens; U carries the scale.

    x ``[tokens, in]``, weight as stored and frozen, bias ``[out]`` or None, U ``[out, r]``, all of one dtype; mask
    ``[tokens, r]`` or None multiplies h. Saved for backward: h, U, rows, mask, a reference to the weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        u: Tensor,
        rows: Tensor,
        mask: Tensor | None,
        transposed: bool,
    ) -> Tensor:
        y = product(x, weight, None, transposed)
        h = y.index_select(1, rows)  # before the bias: in bfloat16 a large one would swamp h
        h = h if mask is None else h * mask
        y.addmm_(h, u.T)
        if bias is not None:
            y += bias
        ctx.save_for_backward(h, u, rows, mask, weight)
        ctx.transposed = transposed
        return y

    @staticmethod
    @once_differentiable  # h is no input, so a second derivative would silently miss its part: refuse it
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        h, u, rows, mask, weight = ctx.saved_tensors
        grad_u = (h.T @ grad).T if ctx.needs_input_grad[3] else None  # up to five times as fast as grad.T @ h
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_h = grad @ u
            grad_h = grad_h if mask is None else grad_h * mask
            # A thin product into dx is cheaper than adding grad_h to a copy of the whole gradient of y (measured).
            grad_x = product(grad, weight, None, not ctx.transposed)
            grad_x.addmm_(grad_h, slice_of(weight, rows, 0, ctx.transposed, grad.dtype))
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, grad_u, None, None, None


class OneSided(Method[PMSSConfig]):
    """``W' = W + s V (T^-1 W[rows])``: V trained, the rows of W selected."""

    config_class = PMSSConfig
    update_class = OneSidedUpdate
    layer_class = OneSidedLinear
    doing = "selecting rows"
    derived = "rows"
    trained = "U"

    def specs(self, shape: Shape, rank: int) -> dict[str, Spec]:
        """V, the factor of the coordinates, rows."""
        found = {
            "weight": Spec((shape[0], rank), Kind.TRAINED),
            "rows": Spec((rank,), Kind.INDEX, shape[0]),
            "right": Spec((rank, rank), Kind.FROZEN),
            "gain": Spec((1, 1), Kind.FROZEN),
        }
        unused = {"orthonormal": {"gain"}, "spectral": {"right"}}.get(self.config.coordinates, {"right", "gain"})
        return {name: spec for name, spec in found.items() if name not in unused}

    def derive(self, weight: Tensor | None, rank: int, name: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows by ``config.selection``, and the factor of the coordinates."""
        config, found = self.config, dict(given)
        if "rows" not in found:
            assert weight is not None
            rows = select_rows(
                weight, rank, selection=config.selection, oversample=config.oversample, seed=config.seed, name=name
            )
            found["rows"] = rows.sort().values  # gathers then read memory in order
        if weight is not None and not any(part in found for part in Frame._fields):
            (r,) = OneSidedUpdate.reads(weight, found)
            found |= coordinate_frame(None, r, config.coordinates, name).present()
        return found

    def read_given(self) -> Given | None:
        """``skeleton_file``."""
        config = self.config
        return None if config.skeleton_file is None else read_skeleton(config.skeleton_file, config.coordinates, "all")

    def why_underived(self, given: Given | None, name: str) -> str | None:
        """Rows, and coordinates other than raw, need W, or a skeleton file that has them."""
        return why_no_skeleton(given, self.config.coordinates)

    def values(self, tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """U from V."""
        v = tensors["weight"]
        # In float32 also under DeepSpeed's bf16 engine, which stores V and `right` in bfloat16.
        wide = torch.promote_types(v.dtype, torch.float32)
        if (right := tensors.get("right")) is not None:
            with without_autocast(v):
                return {"U": scale * (v.to(wide) @ right.to(wide))}
        return {"U": scale * v.to(wide) * tensors.get("gain", 1.0)}

    def numbers(
        self, update: OneSidedUpdate, frozen: Mapping[str, Tensor], scale: float, name: str
    ) -> dict[str, Tensor]:
        """V from U, solved in float64."""
        v = update.U.detach().double()
        if (right := frozen.get("right")) is not None:
            v = torch.linalg.solve(right.double().to(v.device), v, left=False)
        if (gain := frozen.get("gain")) is not None:
            v = v / gain.double().to(v.device)
        v = v / scale
        numbers = v.to(next(iter(frozen.values())).dtype if frozen else update.U.dtype)
        lost = float(torch.linalg.vector_norm(numbers.double() - v))  # not finite where the numbers are not
        if not lost <= 1e-3 * float(torch.linalg.vector_norm(v)):
            kind = str(numbers.dtype).removeprefix("torch.")
            raise ValueError(
                f"`{name}`: with scale {scale:.3g} its update needs trained numbers up to {float(v.abs().max()):.3g}, which"
                f" {kind} cannot hold. Load it with a scale near 1."
            )
        return {"weight": numbers}

    def fitted(self, weight: Tensor, update: OneSidedUpdate, rank: int, scale: float, name: str) -> dict[str, Tensor]:
        """Filled up with rows that are not in use, for which U is zero."""
        update = update.to(weight.device)
        rows = sums.filled(update.rows, rank, weight.shape[0])
        frame = sums.frame_of_rows(weight[rows], len(update.rows), self.config.coordinates)
        wider = OneSidedUpdate(F.pad(update.U, (0, rank - update.rank)), rows)
        frozen = frame.present()
        return self.numbers(wider, frozen, scale, name) | {"rows": rows} | frozen

    def for_several(self) -> PMSSConfig:
        """The same, without the skeleton file of one of them."""
        return replace(self.config, skeleton_file=None)

    def why_untrainable(
        self, weight: Tensor, tensors: Mapping[str, Tensor], scale: float, dtype: torch.dtype
    ) -> str | None:
        """See `number_range`; tried for a few outputs."""
        (rows,) = OneSidedUpdate.reads(weight, tensors)
        eye = torch.eye(min(_OUTPUTS, len(weight)), dtype=rows.dtype, device=rows.device)
        frame = Frame(right=tensors.get("right"), gain=tensors.get("gain"))
        if frame.right is not None:
            frame = frame._replace(left=eye.to(frame.right))
        return why_out_of_range(weight[: len(eye)], (eye, rows), frame, self.config.coordinates, scale, dtype)

    def looks_merged(self, base: Tensor, loaded: Tensor, indices: Mapping[str, Tensor]) -> bool:
        """See `merged_twice`."""
        return is_merged(base, loaded, indices["rows"], None)

    def describe(self, layer: Any) -> str:
        """For the layer's ``repr``."""
        config = self.config
        return f"pmss(rank={layer.rank}, columns='all', coordinates={config.coordinates!r}, scale={layer.scale:g})"

    def prepare(self, layer: OneSidedLinear) -> None:
        """Nothing: the forward reads the options."""

    def forward(self, layer: OneSidedLinear, x: Tensor) -> Tensor:
        """Features from the layer's own product, or from x where a black box computes that product."""
        flat = x.reshape(-1, x.shape[-1])
        dtype = compute_dtype(flat)
        u = layer.core_update().to(dtype)
        (rows,) = layer.indices_on(flat.device)
        dropout = self.config.dropout if layer.training else 0.0
        if has_own_product(layer, flat.dtype, dtype):
            mask = F.dropout(flat.new_ones(len(flat), len(rows)), dropout) if dropout else None
            y = OneSidedEdit.apply(flat, layer.weight, layer.bias, u, rows, mask, layer.transposed)
            return y.view(*x.shape[:-1], y.shape[-1])
        if layer.quantised:
            features = dequantised_slice(layer, rows, 0, dtype)
        else:
            features = slice_of(layer.weight, rows, 0, layer.transposed, dtype)
        h = F.linear(x.to(dtype), features.detach())  # autograd keeps these rows, and nothing of x
        y = layer.base(x)
        return y + F.linear(dropped(h, self.config.dropout, layer.training), u).to(y.dtype)

    def why_no_experts(self) -> str | None:
        """See `why_no_expert_options`."""
        return why_no_expert_options(self.config)

    def grouped(self, layer: GroupedLayer, x: Tensor) -> Tensor:
        """The same of all experts: features from each token's own product."""
        y = layer.base(x)
        h = layer.groups.take(y, layer.indices["rows"])
        return y + layer.linear(dropped(h, self.config.dropout, layer.training), layer.values()["U"])

    def why_not_applied(self, layer: nn.Module) -> str | None:
        """See `lightning_pmss.methods.pmss.applied`."""
        return why_not_applied(layer, self.config)

    def applied(self, layer: AppliedLayer, x: Tensor) -> Tensor:
        """See `lightning_pmss.methods.pmss.applied`."""
        return applied_edit(layer, x, self.config)

    def kept_per_token(self, shape: Shape, rank: int) -> int:
        """h ``[r]``."""
        return rank

    def figures(self, weight: Tensor | None, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
        """The residual of the rows, and what rounding takes of an update."""
        low = dtype if dtype in LOW_PRECISION else torch.bfloat16  # in which autocast may compute
        right = tensors.get("right")
        frame = Frame() if right is None else Frame(torch.eye(len(right)), right.cpu())
        error = rounding_error(frame, low)
        found = {"rounding_error": error, "fitting_rank": fitting_rank(frame, low) if error > LIMIT else None}
        if weight is not None:
            found["residual"] = projection_residual(weight.T, tensors["rows"].to(weight.device))
        return found
