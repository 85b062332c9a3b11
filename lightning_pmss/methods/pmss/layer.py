"""The products of a PMSS layer: ``W' = W + s C U R`` beside a base layer that stays a black box.

``C = W[:, cols] [out, c]`` and ``R = W[rows, :] [r, in]`` are slices of the frozen weight, so one side of the update costs
no product at all (``S_cols``, ``S_rows``: the 0/1 selectors with ``C = W S_cols`` and ``R = S_rows^T W``):

    W' = W (I + s S_cols U R)      input edit:   y = base(x + s scatter_cols(U (R x)))       C is never needed
    W' = (I + s C U S_rows^T) W    output edit:  y0 = W x;  y = y0 + s C (U y0[rows]) + b    R is never needed

Source: PMSS (arXiv 2409.16722), Figure 1, in ``nn.Linear``'s convention (W is the transpose of the paper's). The identities
are ours. What is trained is a tensor V in chosen coordinates, from which U is derived (`coordinates`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_pmss.layers.adapted import AdaptedLinear
from lightning_pmss.layers.convertible import has_known_forward, has_own_product, layout_of
from lightning_pmss.layers.operators import operator_of
from lightning_pmss.layers.parts import clean_name
from lightning_pmss.layers.products import compute_dtype, product
from lightning_pmss.layers.quantised import SliceReader, is_quantised
from lightning_pmss.methods.pmss.coordinates import PMSSCore
from lightning_pmss.methods.pmss.edits import InputEdit, Options, OutputEdit
from lightning_pmss.methods.pmss.weight_edit import LinearWeightEdit

OWN_PRODUCT = (
    "computes in the weight's own dtype, and the weight must be frozen; but this one is trained, or x or autocast has another"
    " dtype. Set edit='auto', or precision='32-true'."
)


class PMSSLinear(AdaptedLinear):
    """A layer converted to PMSS. In canonical layout ``W [out, in]``::

        W' = weight + weight[:, cols] @ core_update() @ weight[rows]

    Attributes:
        rows, cols: int64 ``[r]`` and ``[c]``; neither parameters nor buffers (`lightning_pmss.layers.indices`).
        core: `PMSSCore`, owner of the trained tensor.
        coordinates, dropout, memory: As configured.
        edit: ``"input"``, ``"output"`` or ``"weight"``.
    """

    rows: Tensor
    cols: Tensor
    core: PMSSCore
    coordinates: str
    dropout: float
    edit: str
    memory: str

    def core_update(self) -> Tensor:
        """``s U [c, r]``, everything folded in."""
        update: Tensor = self.core(self.scale)["U"]
        return update

    def slices(self) -> tuple[Tensor, Tensor]:
        """R ``[r, in]`` and C ``[out, c]`` of the pristine W, in its dtype; a collective where W is kept in parts."""
        rows, columns = self.reads()
        return rows, columns

    def weight_rows(self) -> Tensor:
        """R ``[r, in]`` of the pristine W, in its dtype."""
        return self.slices()[0]

    def weight_columns(self) -> Tensor:
        """C ``[out, c]`` of the pristine W, in its dtype."""
        return self.slices()[1]

    def edited(self, x: Tensor) -> Tensor:
        """The layer's forward pass."""
        flat = x.reshape(-1, x.shape[-1])
        dtype = compute_dtype(flat)
        own_product = has_own_product(self, flat.dtype, dtype)
        if self.edit == "weight":
            y = self._weight_edit(flat, own_product)
            return y.view(*x.shape[:-1], y.shape[-1])
        if not own_product and self.edit == "output":
            return self._behind_the_base(x, dtype)
        u, source = self.core_update().to(dtype), SliceReader(self) if self.quantised else self.weight
        edit = InputEdit if self.edit == "input" else OutputEdit
        bias = self.bias if own_product else None
        y = edit.apply(flat, source, bias, u, *self.indices_on(flat.device), *self._options(flat, own_product))
        return y.view(*x.shape[:-1], y.shape[-1]) if own_product else self.base(y.view(x.shape))

    def _weight_edit(self, flat: Tensor, own_product: bool) -> Tensor:
        if reason := why_no_weight_edit(self, self.dropout) or (None if own_product else OWN_PRODUCT):
            raise ValueError(f"edit='weight' {reason}")
        update, indices = self.core_update(), self.indices_on(flat.device)
        y: Tensor = LinearWeightEdit.apply(flat, self.weight, self.bias, update, *indices, self.transposed)
        return y

    def _behind_the_base(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The output edit of a base product that is not ours."""
        # The gather must come before the bias: in bfloat16 a large bias would swamp h.
        y = self.base(x) if self.bias is None else product(x, self.weight, None, self.transposed)
        y = y.to(dtype) if self.quantised else y  # bitsandbytes answers in x's dtype, also under autocast
        flat = y.reshape(-1, y.shape[-1])
        u, source = self.core_update().to(flat.dtype), SliceReader(self) if self.quantised else self.weight
        indices = self.indices_on(flat.device)
        changed = OutputEdit.apply(flat, source, None, u, *indices, *self._options(flat, False)).view(y.shape)
        return changed if self.bias is None else changed + self.bias.to(changed.dtype)

    def _options(self, flat: Tensor, own_product: bool) -> tuple[Tensor | None, Options]:
        """The dropout mask of h or None, and the options of the edits."""
        mask = None
        if self.dropout > 0 and self.training:
            ones = torch.ones(flat.shape[0], self.rows.shape[0], dtype=compute_dtype(flat), device=flat.device)
            mask = F.dropout(ones, self.dropout)
        return mask, Options(own_product, self.memory == "keep", self.transposed)


def choose_edit(layer: nn.Module, shape: tuple[int, int]) -> str:
    """Output edit where ``out < in`` and the base can leave its bias out, input edit where ``out > in``: the cheaper product.

    Square layers take the edit whose slice lies in memory without gaps: rows of a stored W, columns of a stored W^T. To
    gather the other one reads most of W (measured: up to half the time of the thin product itself).
    """
    if operator_of(layer) is not None:  # x has patches or ids, of which no input can be edited
        return "output"
    out_features, in_features = shape
    thin = out_features < in_features or (out_features == in_features and layout_of(layer).transposed)
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


def pmss_layers(model: nn.Module) -> dict[str, PMSSLinear]:
    """The layers of a model that were converted to PMSS, by their names in it."""
    return {clean_name(name): layer for name, layer in model.named_modules() if isinstance(layer, PMSSLinear)}
