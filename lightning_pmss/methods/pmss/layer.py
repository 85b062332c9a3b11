"""The converted linear layer: ``W' = W + s C U R`` around a base layer that stays a black box.

``C = W[:, cols] [out, c]`` and ``R = W[rows, :] [r, in]`` are slices of the frozen weight, so one side of the update costs
no product at all (``S_cols``, ``S_rows``: the 0/1 selectors with ``C = W S_cols`` and ``R = S_rows^T W``):

    W' = W (I + s S_cols U R)      input edit:   y = base(x + s scatter_cols(U (R x)))       C is never needed
    W' = (I + s C U S_rows^T) W    output edit:  y0 = W x;  y = y0 + s C (U y0[rows]) + b    R is never needed

Source: PMSS (arXiv 2409.16722), Figure 1, in ``nn.Linear``'s convention (W is the transpose of the paper's). The identities
are ours. What is trained is a tensor V in chosen coordinates, from which U is derived (`coordinates`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_pmss.layers.convertible import is_conv1d, why_no_own_weight
from lightning_pmss.layers.foreign_writers import watch_writers
from lightning_pmss.layers.guard import refuse_training
from lightning_pmss.layers.indices import IndexTensors
from lightning_pmss.layers.merged_layer import MergedLayer, merge_again, rounded_sum
from lightning_pmss.layers.parts import is_dtensor
from lightning_pmss.layers.quantised import SliceReader, is_quantised, whole_weight
from lightning_pmss.messages import some
from lightning_pmss.methods.pmss.coordinates import COORDINATES as COORDINATES
from lightning_pmss.methods.pmss.coordinates import CoreFrame as CoreFrame
from lightning_pmss.methods.pmss.coordinates import Frame, PMSSCore, coordinate_frame, core_dtype
from lightning_pmss.methods.pmss.edits import (
    InputEdit,
    LinearInputEdit,
    LinearOutputEdit,
    OutputEdit,
    compute_dtype,
    product,
    without_autocast,
)
from lightning_pmss.methods.pmss.merged_twice import is_merged
from lightning_pmss.methods.pmss.weight_edit import LinearWeightEdit

EDITS = ("auto", "input", "output", "weight")
MEMORY_MODES = ("keep", "regather")
OWN_PRODUCT = (
    "computes in the weight's own dtype, and the weight must be frozen; but this one is trained, or x or autocast has another"
    " dtype. Set edit='auto', or precision='32-true'."
)


class PMSSLinear(IndexTensors, MergedLayer):
    """Mixin that turns a linear layer into ``W' = W + s C U R``; instances are made by `PMSSLinear.adopt`.

    The concrete class is a dynamic subclass of the base layer's own class, so parameters keep their names and
    ``isinstance(layer, nn.Linear)`` stays true. In canonical layout ``W [out, in]`` (GPT-2's ``Conv1D`` stores W^T; see
    `transposed`)::

        W' = weight + weight[:, cols] @ core_update() @ weight[rows]

    Attributes:
        rows, cols: int64 ``[r]`` and ``[c]``; neither parameters nor buffers (`lightning_pmss.layers.indices`).
        core: `PMSSCore`, owner of the trained tensor.
        scale, coordinates, dropout, memory: As configured.
        fingerprint: Of the slices of W (`lightning_pmss.layers.fingerprint`), where it was taken while W was whole; else None.
        frame_dtype: Of W when the coordinates were computed of it; None: they were read from a file.
        on_trust: Converted without its weight, so that nobody has compared it with the fingerprint yet.
        edit: ``"input"``, ``"output"`` or ``"weight"``.
        base_class: What the layer was before it was converted.
        disabled: Whether the layer runs as the base does (see `lightning_pmss.named.disable_adapter`).
    """

    index_names = ("rows", "cols")
    base_class: ClassVar[type[nn.Module]]
    bias: nn.Parameter | None
    rows: Tensor
    cols: Tensor
    core: PMSSCore
    scale: float
    coordinates: str
    dropout: float
    edit: str
    memory: str
    fingerprint: Mapping[str, str] | None
    frame_dtype: torch.dtype | None
    on_trust: bool
    disabled: bool = False

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
        if isinstance(layer, PMSSLinear):
            raise ValueError("the layer is converted already; a converted layer is not converted again.")
        if reason := why_no_own_weight(layer):
            raise ValueError(f"this {type(layer).__name__} cannot be converted: {reason}.")
        shape = canonical_shape(layer)
        if edit == "weight" and (reason := why_no_weight_edit(layer, dropout)):
            raise ValueError(f"edit='weight' {reason}")
        layer.__class__ = _pmss_class(type(layer))
        assert isinstance(layer, PMSSLinear)
        weight = layer.weight
        layer.set_indices(weight.device, rows=rows, cols=cols)
        layer.core = PMSSCore(len(cols), len(rows), frame, core_dtype(weight.dtype), weight.device)
        layer.scale, layer.coordinates, layer.dropout, layer.memory = float(scale), coordinates, float(dropout), memory
        layer.transposed, layer.quantised = is_transposed(layer), is_quantised(layer)
        layer.edit = choose_edit(layer, shape) if edit == "auto" else edit
        layer.fingerprint = layer.pristine = None
        layer.frame_dtype = None
        layer.on_trust = weight.is_meta
        layer.register_load_state_dict_post_hook(merge_again)
        return layer

    @property
    def file_bytes(self) -> int:
        """Bytes of U and both index vectors in the adapter file, which stores U whatever the coordinates."""
        columns, rows = len(self.cols), len(self.rows)
        return columns * rows * core_dtype(self.core.weight.dtype).itemsize + 4 * (columns + rows)

    def core_update(self) -> Tensor:
        """``s U [c, r]``, everything folded in."""
        update: Tensor = self.core(self.scale)
        return update

    def set_update(self, update: Tensor) -> None:
        """The inverse of `core_update`: choose V such that ``s U`` equals ``update [c, r]`` within rounding.

        Raises:
            ValueError: See `PMSSCore.numbers_of`; nothing is changed then.
        """
        self.core.set_u(update, self.scale)

    def merged_sum(self) -> tuple[Tensor, Tensor]:
        """(W', W' - W) in canonical layout, in float32 (float64 for a float64 base), from the pristine W."""
        update = self.core_update().detach()
        rows, cols = self.indices_on(update.device)
        return merge_sum(self.base_weight().to(update.device), rows, cols, update)

    def merged_from(self, state: Mapping[str, Tensor], prefix: str) -> Tensor:
        """W' as the base stores it, from the layer's tensors in a state dict; the layer's own stay out of it."""
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if lost := [key for key in ("weight", "rows", "cols", "core.weight") if key not in own]:
            raise ValueError(f"the state dict has tensors of the adapter of `{prefix[:-1]}`, but lacks {some(lost)}.")
        core = {key.removeprefix("core."): value for key, value in own.items() if key.startswith("core.")}
        with torch.no_grad():
            update = PMSSCore.of_tensors(core, len(own["cols"]), len(own["rows"]))(self.scale)
            stored = own["weight"].to(update.device)
            weight = self.base_weight().to(update.device) if self.quantised else stored.T if self.transposed else stored
            exact, change = merge_sum(weight, own["rows"].long(), own["cols"].long(), update)
            merged, _ = rounded_sum(exact, change, self._dense_dtype() if self.quantised else stored.dtype, prefix[:-1])
        return merged.T.contiguous() if self.transposed else merged

    def adapter_key(self, key: str) -> bool:
        """Rows, columns, and what `PMSSCore` owns."""
        return key in self.index_names or key.startswith("core.")

    def slices(self) -> tuple[Tensor, Tensor]:
        """R ``[r, in]`` and C ``[out, c]`` of the pristine W, in its dtype; a collective where W is kept in parts."""
        with whole_weight(self, self.stored_weight) as stored:
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
        with whole_weight(self, self.stored_weight) as stored:
            weight = stored.T if self.transposed else stored
            rows, cols = self.rows.to(weight.device), self.cols.to(weight.device)
            frame = coordinate_frame(weight[:, cols], weight[rows], self.coordinates, name, weight=weight)
        self.core.set_frame(frame)
        self.frame_dtype = weight.dtype

    def reset_parameters(self) -> None:
        """Called by engines once a layer that was made on the meta device has memory: the base's own, where it has one."""
        if (base := getattr(super(), "reset_parameters", None)) is not None:
            base()

    def index_sizes(self) -> dict[str, int]:
        """Rows and columns of W."""
        return dict(zip(self.index_names, canonical_shape(self), strict=True))

    def forward(self, input: Tensor) -> Tensor:
        if self.disabled:
            return super().forward(input)
        if self.merged:
            if self.quantised and self.weight.is_floating_point():  # dense, behind a forward that may ask for codes
                bias = None if self.bias is None else self.bias.to(self.weight.dtype)
                output = F.linear(input.to(self.weight.dtype), self.weight, bias).to(input.dtype)
            else:
                output = super().forward(input)
            return refuse_training(self, output, self.core.weight)
        flat = input.reshape(-1, input.shape[-1])
        dtype = compute_dtype(flat)
        update = self.core_update()
        indices = self.indices_on(flat.device)
        own_product = self._own_product(flat.dtype, dtype)
        if self.edit == "weight":
            if reason := why_no_weight_edit(self, self.dropout) or (None if own_product else OWN_PRODUCT):
                raise ValueError(f"edit='weight' {reason}")
            y = LinearWeightEdit.apply(flat, self.weight, self.bias, update, *indices, self.transposed)
            return y.view(*input.shape[:-1], y.shape[-1])
        if own_product:
            edit = LinearInputEdit if self.edit == "input" else LinearOutputEdit
            u = update.to(dtype)
            y = edit.apply(flat, self.weight, self.bias, u, *indices, *self._options(flat))
            return y.view(*input.shape[:-1], y.shape[-1])
        source = SliceReader(self) if self.quantised else self.weight
        if self.edit == "input":
            edited = InputEdit.apply(flat, source, update.to(dtype), *indices, *self._options(flat))
            return super().forward(edited.view(input.shape))
        # The gather must come before the bias: in bfloat16 a large bias would swamp h.
        base = super().forward(input) if self.bias is None else product(input, self.weight, None, self.transposed)
        base = base.to(dtype) if self.quantised else base  # bitsandbytes answers in x's dtype, also under autocast
        flat = base.reshape(-1, base.shape[-1])
        update = update.to(flat.dtype)
        output = OutputEdit.apply(flat, source, update, *indices, *self._options(flat))
        output = output.view(base.shape)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def _own_product(self, *dtypes: torch.dtype) -> bool:
        """Whether the base product can be done within the edit: a frozen weight, a known forward, one dtype throughout."""
        weight = self.weight
        known = has_known_forward(self) and not self.quantised
        return known and not weight.requires_grad and all(d == weight.dtype for d in dtypes)

    def _options(self, flat: Tensor) -> tuple[Tensor | None, bool, bool]:
        """(dropout mask of h or None, keep the slices, transposed) for the edits."""
        mask = None
        if self.dropout > 0 and self.training:
            ones = torch.ones(flat.shape[0], self.rows.shape[0], dtype=compute_dtype(flat), device=flat.device)
            mask = F.dropout(ones, self.dropout)
        return mask, self.memory == "keep", self.transposed

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._refuse_merged(state_dict, prefix)
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

    def _refuse_merged(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """A merged weight without its U, or with it, would be the W to which U is added once more."""
        loaded, v = state_dict.get(f"{prefix}weight"), state_dict.get(f"{prefix}core.weight")
        if self.quantised or not isinstance(loaded, Tensor) or (v is not None and not bool(v.any())):
            return
        if any(is_dtensor(t) or t.is_meta or not t.is_floating_point() for t in (self.stored_weight, loaded)):
            return
        rows, cols = (state_dict.get(f"{prefix}{name}", getattr(self, name)) for name in self.index_names)
        if is_merged(self.base_weight(), loaded.T if self.transposed else loaded, rows, cols):
            raise ValueError(
                f"`{prefix}weight` of the state dict is this very weight with an update merged into it, and U would be added"
                " to it once more. Load it into a model that is not converted; into this one load the adapter"
                " (`load_adapter`), or a state dict that was taken of a converted model."
            )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The dynamic class has no importable name: pickle and deepcopy rebuild it from the base class.
        return _rebuild, (self.base_class,), self.__dict__

    def extra_repr(self) -> str:
        ranks = f"rank={self.cols.shape[0]}x{self.rows.shape[0]}"
        return f"{super().extra_repr()}, pmss({ranks}, edit={self.edit}, coordinates={self.coordinates})".lstrip(", ")


def merge_sum(weight: Tensor, rows: Tensor, cols: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """``W + W[:, cols] @ update @ W[rows]`` and what is added to W, in float32 (float64 for a float64 W).

    Args:
        weight: The pristine W ``[out, in]``, any floating dtype.
        rows: ``[r]`` int64.
        cols: ``[c]`` int64.
        update: ``s U [c, r]``.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    pristine = weight.to(wide)
    with without_autocast(weight):  # a caller's autocast would round the product
        change = pristine[:, cols] @ (update.to(wide) @ pristine[rows])
    return pristine + change, change


_CLASSES: dict[type[nn.Module], type[PMSSLinear]] = {}


def _pmss_class(base: type[nn.Module]) -> type[PMSSLinear]:
    watch_writers()
    if base not in _CLASSES:
        _CLASSES[base] = type(f"PMSS{base.__name__}", (PMSSLinear, base), {"__module__": __name__, "base_class": base})
    return _CLASSES[base]


def _rebuild(base: type[nn.Module]) -> PMSSLinear:
    cls = _pmss_class(base)
    return cls.__new__(cls)


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer stores W^T ``[in, out]``."""
    return is_conv1d(layer)


def canonical_shape(layer: nn.Module) -> tuple[int, int]:
    """``(out, in)`` from the layer's attributes, never from ``weight.shape``, which sharding engines empty."""
    if is_conv1d(layer):
        return int(layer.nf), int(layer.nx)  # type: ignore[arg-type]
    return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]


def choose_edit(layer: nn.Module, shape: tuple[int, int]) -> str:
    """Output edit where ``out < in`` and the base can leave its bias out, input edit where ``out > in``: the cheaper product.

    Square layers take the edit whose slice lies in memory without gaps: rows of a stored W, columns of a stored W^T. To
    gather the other one reads most of W (measured: up to half the time of the thin product itself).
    """
    out_features, in_features = shape
    thin = out_features < in_features or (out_features == in_features and is_transposed(layer))
    return "output" if thin and can_output_edit(layer) else "input"


def why_no_weight_edit(layer: nn.Module, dropout: float) -> str | None:
    """Why this layer cannot take the weight edit, with the remedy; None if it can."""
    dtype = layer.weight.dtype
    if layer.quantised if isinstance(layer, PMSSLinear) else is_quantised(layer):
        return "adds to W itself, and this one is kept in codes; set edit='auto'."
    if not has_known_forward(layer):
        return f"needs the product of a plain linear layer, which {type(layer).__name__} hides; set edit='auto'."
    if dtype not in (torch.float32, torch.float64):
        kind = str(dtype).removeprefix("torch.")
        return (
            f"rounds updates smaller than half a step of a {kind} weight away; set edit='auto', or load it in float32."
        )
    return "forms no h that dropout could act on; set dropout=0 or edit='auto'." if dropout > 0 else None


def can_output_edit(layer: nn.Module) -> bool:
    """Whether the layer's product can be had without its bias: no bias, or a forward that is known to us."""
    return getattr(layer, "bias", None) is None or has_known_forward(layer)


def has_known_forward(layer: nn.Module) -> bool:
    """Whether the base's forward is ``nn.Linear``'s or ``Conv1D``'s own."""
    base: type[Any] = layer.base_class if isinstance(layer, PMSSLinear) else type(layer)
    return base.forward is nn.Linear.forward or is_conv1d(layer)
