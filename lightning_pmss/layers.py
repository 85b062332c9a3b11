"""The converted linear layer: ``W' = W + s C U R`` around a base layer that stays a black box.

``C = W[:, cols] [out, c]`` and ``R = W[rows, :] [r, in]`` are slices of the frozen weight, so one side of the update costs
no product at all (``S_cols``, ``S_rows``: the 0/1 selectors with ``C = W S_cols`` and ``R = S_rows^T W``):

    W' = W (I + s S_cols U R)      input edit:   y = base(x + s scatter_cols(U (R x)))       C is never needed
    W' = (I + s C U S_rows^T) W    output edit:  y0 = W x;  y = y0 + s C (U y0[rows]) + b    R is never needed

Source: PMSS (arXiv 2409.16722), Figure 1, in ``nn.Linear``'s convention (W is the transpose of the paper's). The identities
are ours. What is trained is a tensor V in chosen *coordinates*, from which U is derived (reconstructed: with U itself
trained, as drawn in the figure, one learning rate does not fit layers whose norms differ by a factor of hundreds).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_pmss.edits import InputEdit, OutputEdit, compute_dtype, without_autocast
from lightning_pmss.whole import fill, is_dtensor, whole, whole_shape

COORDINATES = ("orthonormal", "spectral", "raw")
EDITS = ("auto", "input", "output")
MEMORY_MODES = ("keep", "regather")


class Frame(NamedTuple):
    """What turns the trained V ``[c, r]`` into U: ``U = gain * (left @ V @ right)``; parts that a frame lacks are None."""

    left: Tensor | None = None
    right: Tensor | None = None
    gain: Tensor | None = None


def coordinate_frame(columns: Tensor, rows: Tensor, coordinates: str, name: str = "") -> Frame:
    """Compute the frame of one layer from its slices.

    Args:
        columns: C ``[out, c]``.
        rows: R ``[r, in]``.
        coordinates: ``"raw"``: U = V. ``"spectral"``: U = V / (norm2(C) norm2(R)), one scalar. ``"orthonormal"``: with thin
            QR ``C = Q_C T_C``, ``R^T = Q_R T_R``: U = T_C^-1 V T_R^-T, so that ``C U R = Q_C V Q_R^T`` and the update's
            Frobenius norm is V's.
        name: Module name for errors.

    Returns:
        Tensors in float32 (float64 for a float64 base), computed in float64.

    Raises:
        ValueError: The slices are linearly dependent, so that orthonormal coordinates do not exist.
    """
    dtype = core_dtype(columns.dtype)
    if coordinates == "raw":
        return Frame()
    t_c = torch.linalg.qr(columns.detach().double(), mode="r").R
    t_r = torch.linalg.qr(rows.detach().double().T, mode="r").R
    singular = torch.linalg.svdvals(t_c), torch.linalg.svdvals(t_r)
    if coordinates == "spectral":
        return Frame(gain=(1.0 / (singular[0][0] * singular[1][0])).to(dtype))
    # Slices that depend on one another up to float32 rounding have no usable inverse factors.
    usable = [int((s > s[0] * 1e-5).sum()) for s in singular]
    if usable[0] < t_c.shape[0] or usable[1] < t_r.shape[0]:
        raise ValueError(
            f"`{name}`: the {t_c.shape[0]} selected columns and {t_r.shape[0]} rows have only numerical rank {usable[0]} and"
            f" {usable[1]}; set rank_pattern={{{name!r}: {min(usable)}}} or coordinates='spectral', or exclude the module."
        )
    eye_c, eye_r = (torch.eye(t.shape[0], dtype=t.dtype, device=t.device) for t in (t_c, t_r))
    left = torch.linalg.solve_triangular(t_c, eye_c, upper=True)
    right = torch.linalg.solve_triangular(t_r, eye_r, upper=True).T.contiguous()
    return Frame(left.to(dtype), right.to(dtype))


def core_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """U is float32 whatever the base, float64 on a float64 base."""
    return torch.float64 if weight_dtype == torch.float64 else torch.float32


class CoreFrame(nn.Module):
    """The frozen factors of the coordinates, apart from V: sharding engines must never mix frozen and trained tensors.

    Parameters, not buffers, because engines split parameters and replicate buffers.
    """

    left: nn.Parameter | None
    right: nn.Parameter | None
    gain: nn.Parameter | None

    def __init__(self, frame: Frame, device: torch.device) -> None:
        super().__init__()
        for name, factor in zip(Frame._fields, frame, strict=True):
            # FSDP2 shards neither scalars nor transposed tensors.
            value = None if factor is None else torch.atleast_2d(factor).to(device).contiguous()
            kept = None if value is None else nn.Parameter(value, requires_grad=False)
            self.register_parameter(name, kept)
        # On the meta device the values wait here until the parameters get memory (see `reset_parameters`).
        self.waiting = frame if device.type == "meta" else None

    def forward(self, v: Tensor) -> Tensor:
        """U ``[c, r]`` from V ``[c, r]``."""
        if self.left is not None and self.right is not None:
            # In bfloat16 the inverse factors would lose what the slices' condition number multiplies; DeepSpeed's bf16 engine
            # keeps V and the factors in it (and a float32 master of V), so at least the products are wide.
            wide = torch.promote_types(v.dtype, torch.float32)
            with without_autocast(v):
                return self.left.to(wide) @ v.to(wide) @ self.right.to(wide)
        assert self.gain is not None
        return v * self.gain

    @torch.no_grad()
    def set(self, frame: Frame) -> None:
        """Replace the factors."""
        for name, new in zip(Frame._fields, frame, strict=True):
            old = getattr(self, name)
            if new is not None and old is not None:
                fill(old, new.reshape(old.shape))

    def reset_parameters(self) -> None:
        """Called by engines once parameters that were made on the meta device have memory."""
        if self.waiting is not None:
            self.set(self.waiting)
            self.waiting = None


class PMSSCore(nn.Module):
    """Owns the one trained tensor, ``weight [c, r]`` (V), and turns it into ``s U`` when called.

    A module of its own, so that sharding wrappers can treat it apart from the frozen weight; what it returns is always a new
    tensor, since wrappers take V's memory back when the call ends. Stays float32 when its parent is cast to a
    lower precision (``bf16-true``): small Adam steps on a bfloat16 U would be rounded away.
    """

    weight: nn.Parameter
    frame: CoreFrame | None

    def __init__(self, columns: int, rows: int, frame: Frame, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(columns, rows, dtype=dtype, device=device))
        self.frame = CoreFrame(frame, device) if any(part is not None for part in frame) else None

    def forward(self, scale: float = 1.0) -> Tensor:
        """``scale * U [c, r]``, in V's own dtype, also under autocast."""
        return scale * (self.weight if self.frame is None else self.frame(self.weight))

    def set_frame(self, frame: Frame) -> None:
        """Replace the coordinates' factors; V is left as it is."""
        if self.frame is not None:
            self.frame.set(frame)

    @torch.no_grad()
    def set_u(self, u: Tensor) -> None:
        """Choose V such that the core yields ``u`` (solved in float64)."""
        v = u.to(self.weight.device, torch.float64)
        if (frame := self.frame) is not None and frame.left is not None and frame.right is not None:
            v = torch.linalg.solve(frame.left.double(), v)
            v = torch.linalg.solve(frame.right.double(), v, left=False)
        if frame is not None and frame.gain is not None:
            v = v / frame.gain.double()
        self.weight.copy_(v)

    def reset_parameters(self) -> None:
        """Called by engines once parameters that were made on the meta device have memory: V starts at zero."""
        nn.init.zeros_(self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PMSSCore:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype in (torch.float32, torch.float64) else tensor.to(moved.device)

        return super()._apply(keep_precision, recurse)


class PMSSLinear(nn.Module):
    """Mixin that turns a linear layer into ``W' = W + s C U R``; instances are made by `PMSSLinear.adopt`.

    The concrete class is a dynamic subclass of the base layer's own class, so parameters keep their names and
    ``isinstance(layer, nn.Linear)`` stays true. In canonical layout ``W [out, in]`` (GPT-2's ``Conv1D`` stores W^T; see
    `transposed`)::

        W' = weight + weight[:, cols] @ core_update() @ weight[rows]

    Attributes:
        rows, cols: int64 buffers ``[r]`` and ``[c]``.
        core: `PMSSCore`, owner of the trained tensor.
        scale, coordinates, dropout, memory: As configured.
        fingerprint: Of the slices of W (`lightning_pmss.fingerprint`), where it was taken while W was whole; else None.
        on_trust: Converted without its weight, so that nobody has compared it with the fingerprint yet.
        edit: ``"input"`` or ``"output"``.
        transposed: Whether ``weight`` is stored ``[in, out]``.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    rows: Tensor
    cols: Tensor
    core: PMSSCore
    scale: float
    coordinates: str
    dropout: float
    edit: str
    memory: str
    transposed: bool
    fingerprint: Mapping[str, str] | None
    pristine: Tensor | None
    waiting: tuple[Tensor, Tensor] | None
    on_trust: bool

    @staticmethod
    def adopt(
        layer: nn.Module,
        rows: Tensor,
        cols: Tensor,
        frame: Frame,
        *,
        scale: float = 1.0,
        coordinates: str = "orthonormal",
        dropout: float = 0.0,
        edit: str = "auto",
        memory: str = "regather",
    ) -> PMSSLinear:
        """Turn a supported layer into a PMSS layer, in place: the module object and its parameters stay the same."""
        shape = canonical_shape(layer)
        layer.__class__ = _pmss_class(type(layer))
        assert isinstance(layer, PMSSLinear)
        weight = layer.weight
        layer.register_buffer("rows", rows.to(weight.device, torch.int64))
        layer.register_buffer("cols", cols.to(weight.device, torch.int64))
        layer.core = PMSSCore(len(cols), len(rows), frame, core_dtype(weight.dtype), weight.device)
        layer.scale, layer.coordinates, layer.dropout, layer.memory = float(scale), coordinates, float(dropout), memory
        layer.transposed = is_transposed(layer)
        layer.edit = choose_edit(layer, shape) if edit == "auto" else edit
        layer.fingerprint = layer.pristine = None
        # On the meta device the indices wait here until the layer gets memory (see `reset_parameters`).
        layer.waiting = (rows.cpu(), cols.cpu()) if weight.is_meta else None
        layer.on_trust = weight.is_meta
        return layer

    @property
    def merged(self) -> bool:
        """Whether ``weight`` currently holds W' (the pristine W is kept aside until `unmerge`)."""
        return self.pristine is not None

    def core_update(self) -> Tensor:
        """``s U [c, r]``, everything folded in."""
        update: Tensor = self.core(self.scale)
        return update

    def set_update(self, update: Tensor) -> None:
        """The inverse of `core_update`: choose V such that ``s U`` equals ``update [c, r]`` within rounding."""
        self.core.set_u(update.double() / self.scale)

    def base_weight(self) -> Tensor:
        """The pristine W in canonical layout ``[out, in]``, also while merged."""
        weight = self.weight.detach() if self.pristine is None else self.pristine
        return weight.T if self.transposed else weight

    def slices(self) -> tuple[Tensor, Tensor]:
        """R ``[r, in]`` and C ``[out, c]`` of the pristine W, in its dtype; a collective where W is kept in parts."""
        with whole(self.weight if self.pristine is None else self.pristine) as stored:
            weight = stored.T if self.transposed else stored
            rows, cols = self.rows.to(weight.device), self.cols.to(weight.device)
            return weight.index_select(0, rows), weight.index_select(1, cols)

    def weight_rows(self) -> Tensor:
        """R ``[r, in]`` of the pristine W, in its dtype."""
        return self.slices()[0]

    def weight_columns(self) -> Tensor:
        """C ``[out, c]`` of the pristine W, in its dtype."""
        return self.slices()[1]

    def refresh_frame(self, name: str = "") -> None:
        """Recompute the coordinates after the weight or the indices were replaced; V is left as it is."""
        rows, columns = self.slices()
        self.core.set_frame(coordinate_frame(columns, rows, self.coordinates, name))

    def reset_parameters(self) -> None:
        """Called by engines once a layer that was made on the meta device has memory: the base's own, then the indices."""
        if (base := getattr(super(), "reset_parameters", None)) is not None:
            base()
        if self.waiting is not None:
            self.rows.copy_(self.waiting[0])
            self.cols.copy_(self.waiting[1])
            self.waiting = None

    def forward(self, input: Tensor) -> Tensor:
        if self.merged:
            return super().forward(input)
        update = self.core_update()
        if self.edit == "input":
            flat = input.reshape(-1, input.shape[-1])
            dtype = compute_dtype(flat)
            edited = InputEdit.apply(flat, self.weight, update.to(dtype), self.rows, self.cols, *self._options(flat))
            return super().forward(edited.view(input.shape))
        # The gather must come before the bias: in bfloat16 a large bias would swamp h.
        base = super().forward(input) if self.bias is None else _product(self, input)
        flat = base.reshape(-1, base.shape[-1])
        update = update.to(flat.dtype)
        output = OutputEdit.apply(flat, self.weight, update, self.rows, self.cols, *self._options(flat))
        output = output.view(base.shape)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def _options(self, flat: Tensor) -> tuple[Tensor | None, bool, bool]:
        """(dropout mask of h or None, keep the slices, transposed) for the edits."""
        mask = None
        if self.dropout > 0 and self.training:
            ones = torch.ones(flat.shape[0], self.rows.shape[0], dtype=compute_dtype(flat), device=flat.device)
            mask = F.dropout(ones, self.dropout)
        return mask, self.memory == "keep", self.transposed

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        before = (self.rows.clone(), self.cols.clone())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        new_weight = f"{prefix}weight" in state_dict
        # The indices that were stored count, not those selected now. The factors follow, unless they come along.
        moved = any(a.is_meta or not torch.equal(a, b) for a, b in zip(before, (self.rows, self.cols), strict=True))
        if new_weight or moved:
            if not is_dtensor(self.weight):  # else it was taken before sharding, or is compared when training starts
                self.fingerprint = None
            if not any(key.startswith(f"{prefix}core.frame.") for key in state_dict):
                self.refresh_frame(prefix[:-1])

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The dynamic class has no importable name: pickle and deepcopy rebuild it from the base class.
        return _rebuild, (type(self).__mro__[2],), self.__dict__

    def extra_repr(self) -> str:
        ranks = f"rank={self.cols.shape[0]}x{self.rows.shape[0]}"
        return f"{super().extra_repr()}, pmss({ranks}, edit={self.edit}, coordinates={self.coordinates})".lstrip(", ")


_CLASSES: dict[type[nn.Module], type[PMSSLinear]] = {}


def _pmss_class(base: type[nn.Module]) -> type[PMSSLinear]:
    if base not in _CLASSES:
        _CLASSES[base] = type(f"PMSS{base.__name__}", (PMSSLinear, base), {"__module__": __name__})
    return _CLASSES[base]


def _rebuild(base: type[nn.Module]) -> PMSSLinear:
    cls = _pmss_class(base)
    return cls.__new__(cls)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D`` (recognised by name, since the core never imports transformers)."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(layer).__mro__)


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer stores W^T ``[in, out]``."""
    return is_conv1d(layer)


def is_supported(layer: nn.Module) -> bool:
    """Whether `PMSSLinear.adopt` can convert this layer: a floating-point ``nn.Linear`` (or subclass) or ``Conv1D``."""
    if not (isinstance(layer, nn.Linear) or is_conv1d(layer)) or isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return False
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.is_floating_point() and len(whole_shape(weight)) == 2


def canonical_shape(layer: nn.Module) -> tuple[int, int]:
    """``(out, in)`` from the layer's attributes, never from ``weight.shape``, which sharding engines empty."""
    if is_conv1d(layer):
        return int(layer.nf), int(layer.nx)  # type: ignore[arg-type]
    return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]


def choose_edit(layer: nn.Module, shape: tuple[int, int]) -> str:
    """Output edit where ``out <= in`` and the base can leave its bias out, else input edit: the cheaper thin product."""
    out_features, in_features = shape
    return "output" if out_features <= in_features and can_output_edit(layer) else "input"


def can_output_edit(layer: nn.Module) -> bool:
    """Whether the layer's product can be had without its bias: no bias, or a forward that is known to us."""
    base: type[Any] = type(layer).__mro__[2] if isinstance(layer, PMSSLinear) else type(layer)
    return getattr(layer, "bias", None) is None or base.forward is nn.Linear.forward or is_conv1d(layer)


def _product(layer: PMSSLinear, input: Tensor) -> Tensor:
    """``W x`` without the bias, for the layers of which `can_output_edit` holds."""
    return input @ layer.weight if layer.transposed else F.linear(input, layer.weight)
