"""Merge the update into the weights and take it out again, in memory.

Merging changes W, and C and R are slices of W: what was merged can neither be re-read nor subtracted exactly. So the
pristine W is kept aside (on the CPU) and `unmerge` puts it back bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pmss.conversion import pmss_layers
from lightning_pmss.edits import without_autocast
from lightning_pmss.gathering import whole_tensors, whole_update
from lightning_pmss.layers import PMSSLinear, canonical_shape
from lightning_pmss.quantised import (
    can_requantise,
    dequantised,
    is_quantised,
    quantisation_of,
    requantised,
    value_dtype,
)
from lightning_pmss.roots import below, canonical_modules
from lightning_pmss.whole import clean_name, is_sharded


@dataclass
class LayerDrift:
    """What the one rounding of a merge cost: the merged weight in W's dtype against the float32 (float64) sum.

    Attributes:
        max_error: Largest absolute error of an element.
        relative_error: ``||rounded - exact||_F / ||exact||_F``.
        lost_update: ``||rounded - exact||_F / ||update||_F``: the error measured by what was learned; 0 for a zero U.
    """

    max_error: float
    relative_error: float
    lost_update: float


@dataclass
class MergeReport:
    """Drift per layer; ``print`` it for a line."""

    layers: dict[str, LayerDrift]

    @property
    def max_error(self) -> float:
        return max((d.max_error for d in self.layers.values()), default=0.0)

    @property
    def relative_error(self) -> float:
        """The largest relative error of any layer."""
        return max((d.relative_error for d in self.layers.values()), default=0.0)

    @property
    def lost_update(self) -> float:
        return max((d.lost_update for d in self.layers.values()), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        sums = {name: getattr(self, name) for name in ("max_error", "relative_error", "lost_update")}
        return asdict(self) | sums

    def __str__(self) -> str:
        return (
            f"{len(self.layers)} layers merged with one rounding each: largest error {self.max_error:.2e}, relative"
            f" {self.relative_error:.2e} of a weight, {self.lost_update:.2%} of an update"
        )


def merge_weight(
    weight: Tensor, rows: Tensor, cols: Tensor, update: Tensor, name: str, dtype: torch.dtype | None = None
) -> tuple[Tensor, LayerDrift]:
    """``W + W[:, cols] @ update @ W[rows]`` with one rounding.

    Args:
        weight: The pristine W ``[out, in]``, any floating dtype.
        rows: ``[r]`` int64.
        cols: ``[c]`` int64.
        update: ``s U [c, r]``.
        name: Module name for errors.
        dtype: Of the result; default: W's.

    Returns:
        W' in this dtype, computed in float32 (float64 for a float64 W), and what the rounding cost.

    Raises:
        ValueError: W' is not finite; nothing was changed.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    pristine = weight.to(wide)
    with without_autocast(weight):  # a caller's autocast would round the product
        delta = pristine[:, cols] @ (update.to(wide) @ pristine[rows])
    exact = pristine + delta
    rounded = exact.to(dtype or weight.dtype)
    if not torch.isfinite(rounded).all():
        raise ValueError(
            f"`{name}`: the merged weight is not finite (largest |s U| {float(update.abs().max()):.3g}, dtype"
            f" {rounded.dtype}); the run diverged or the dtype is too narrow. Nothing was merged."
        )
    # U may come in float32 while W is narrower: the error is taken against the wide sum, not against itself.
    error = rounded.to(wide) - exact
    norm, size, whole = (float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in (error, delta, exact))
    return rounded, LayerDrift(float(error.abs().max()), norm / whole if whole else 0.0, norm / size if size else 0.0)


def merged_weight(layer: PMSSLinear, name: str = "") -> tuple[Tensor, LayerDrift]:
    """W' of one layer in the layout in which the layer stores its weight, from the pristine W; the layer is not changed."""
    update = layer.core_update().detach()
    weight = layer.base_weight().to(update.device)
    dtype = value_dtype(layer) if layer.quantised else None
    rows, cols = layer.indices_on(update.device)
    merged, drift = merge_weight(weight, rows, cols, update, name, dtype)
    return (merged.T.contiguous() if layer.transposed else merged), drift


@torch.no_grad()
def merge(model: nn.Module, *, dequantise: bool = False, requantise: bool = False) -> MergeReport:
    """Put W' into every converted layer, so that the model runs at the base's cost.

    The pristine weights are kept on the CPU (as many bytes as the converted layers have) until `unmerge`; those of quantised
    layers stay where they are. While merged, U has no effect and gets no gradient. After an error the weights are as they were.

    Args:
        model: Converted, not merged.
        dequantise: Quantised layers get a dense W' in the dtype that their codes were made from, and take its memory.
        requantise: Quantised layers (4-bit ones of bitsandbytes) get the codes of W'; the report says what this costs.

    Raises:
        ValueError: No converted layer, already merged, a merged weight is not finite, or a quantised layer and neither of
            the two options.
    """
    layers = _unsharded_layers(model)
    refuse_quantised(layers, dequantise, requantise)
    if done := [name for name, layer in layers.items() if layer.merged]:
        raise ValueError(
            f"`{done[0]}` is merged already; merging starts from the pristine weights only: `unmerge` first."
        )
    for name, layer in layers.items():
        if not torch.isfinite(layer.core_update()).all():
            raise ValueError(f"`{name}`: U holds NaN or infinite values; the run diverged. Nothing was merged.")
    drift = {}
    try:
        for name, layer in layers.items():
            if layer.quantised:
                drift[name] = _merge_quantised(layer, name, requantise)
                continue
            new, drift[name] = merged_weight(layer, name)
            layer.pristine = layer.weight.detach().to("cpu", copy=True)
            layer.weight.copy_(new)
    except BaseException:  # also out of memory or an interrupt: never half merged
        _restore(layers)
        raise
    return MergeReport(drift)


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Put the pristine weights back, bit for bit.

    Raises:
        ValueError: The model is not merged.
    """
    layers = _unsharded_layers(model)
    if not any(layer.merged for layer in layers.values()):
        raise ValueError("the model is not merged, so there is nothing to unmerge.")
    _restore(layers)


@contextmanager
def merged(model: nn.Module, **options: bool) -> Iterator[MergeReport]:
    """Run a block with merged weights, as for evaluation: ``with merged(model): ...``; options as for `merge`."""
    report = merge(model, **options)
    try:
        yield report
    finally:
        unmerge(model)


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict as if it had never been converted, with W' in the converted layers; the model is unchanged.

    Keys are those of ``model.state_dict()`` without the adapters'. Quantised layers give dense weights. Tensors that
    were not converted are the live ones.
    """
    return merged_state(model)[0]


@torch.no_grad()
def merged_state(
    model: nn.Module, under: Sequence[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, LayerDrift]]:
    """`merged_state_dict` and, by canonical module name, what the rounding of each merge cost.

    On a sharded model this is a collective, and rank 0 gets the whole state on its CPU, the others an empty one.

    Args:
        model: Converted.
        under: Clean full names of modules, to get only what lies in these.
    """
    _layers(model)
    asked = {
        id(m)
        for name, m in model.named_modules(remove_duplicate=False)
        if under is None or below(clean_name(name), under)
    }
    # Also those that the model's own conversion has left alone.
    layers = {n: x for n, x in canonical_modules(model).items() if isinstance(x, PMSSLinear) and id(x) in asked}
    if not is_sharded(model):
        state: dict[str, Tensor] = {
            key: value for key, value in model.state_dict().items() if under is None or below(clean_name(key), under)
        }
        _dequantise_state(model, state)
        results = {}
        for name, layer in layers.items():
            value, cost = merged_weight(layer, name)
            # The device that holds the codes need not have room for all of the dense weights.
            results[name] = (value.cpu() if layer.quantised else value), cost
    else:
        updates = {name: whole_update(model, layer) for name, layer in layers.items()}
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        state, results = dict(whole_tensors(model, under=under, keep=first)), {}
        if not first:
            return {}, {}
    drift = {}
    names = {id(layer): name for name, layer in layers.items()}
    for full, module in model.named_modules(remove_duplicate=False):
        if id(module) in names and (under is None or below(clean_name(full), under)):
            assert isinstance(module, PMSSLinear)
            name = names[id(module)]
            start = f"{clean_name(full)}." if clean_name(full) else ""
            own = {f"{start}{what}" for what in module.index_names}
            for key in [k for k in state if k in own or k.startswith(f"{start}core.")]:
                del state[key]
            if name not in results:
                weight = state[f"{start}weight"]
                canonical = weight.T if module.transposed else weight
                value, cost = merge_weight(canonical, module.rows.cpu(), module.cols.cpu(), updates[name].cpu(), name)
                results[name] = (value.T.contiguous() if module.transposed else value), cost
            state[f"{start}weight"], drift[name] = results[name]
    return state, drift


def _dequantise_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put dense weights in the place of codes and scales; converted layers get theirs afterwards."""
    for full, module in model.named_modules(remove_duplicate=False):
        converted = isinstance(module, PMSSLinear) and module.quantised
        if f"{full}.weight".lstrip(".") not in state:
            continue
        if not converted and not (isinstance(module, nn.Linear) and is_quantised(module)):
            continue
        start = f"{full}." if full else ""
        for key in [k for k in state if k.startswith((f"{start}weight", f"{start}SCB"))]:
            del state[key]
        if not converted:
            state[f"{start}weight"] = dequantised(module, dtype=value_dtype(module)).cpu()


def _unsharded_layers(model: nn.Module) -> dict[str, PMSSLinear]:
    if is_sharded(model):
        raise ValueError(
            "a sharded model cannot be merged in place; write the adapter and merge it into the base on disk"
            " (`python -m lightning_pmss merge`), which PMSSCallback does when `fit` ends."
        )
    return _layers(model)


def _layers(model: nn.Module) -> dict[str, PMSSLinear]:
    if not (layers := pmss_layers(model)):
        raise ValueError(f"{type(model).__name__} has no converted layer; `convert` or `load_adapter` comes first.")
    return layers


def _restore(layers: dict[str, PMSSLinear]) -> None:
    for layer in layers.values():
        if layer.pristine is not None and layer.quantised:
            layer.__dict__["pristine"], layer.weight = None, layer.pristine  # type: ignore[assignment]
        elif layer.pristine is not None:
            layer.weight.copy_(layer.pristine)
            layer.pristine = None


def refuse_quantised(layers: dict[str, PMSSLinear], dequantise: bool, requantise: bool) -> None:
    quantised = {name: layer for name, layer in layers.items() if layer.quantised}
    if dequantise and requantise:
        raise ValueError("dequantise=True and requantise=True exclude one another; type one of them.")
    if quantised and not (dequantise or requantise):
        name, layer = next(iter(quantised.items()))
        extra = sum(math.prod(canonical_shape(m)) * value_dtype(m).itemsize for m in quantised.values())
        raise ValueError(
            f"`{name}` is quantised ({quantisation_of(layer)}), and merging into its codes would round much of the update away:"
            f" merge(model, dequantise=True) makes {len(quantised)} dense weights ({extra / 1e9:.2f} GB more);"
            " requantise=True merges into new codes and reports the error; write_merged(model, folder) writes a dense model."
        )
    if requantise and (others := [n for n, m in quantised.items() if not can_requantise(m)]):
        raise ValueError(
            f"`{others[0]}` ({quantisation_of(quantised[others[0]])}): requantise=True is for bitsandbytes 4-bit only;"
            " type dequantise=True."
        )


def _merge_quantised(layer: PMSSLinear, name: str, requantise: bool) -> LayerDrift:
    new, drift = merged_weight(layer, name)
    if requantise:
        base = layer.base_weight()
        rows, cols = layer.indices_on(base.device)
        exact, _ = merge_weight(base, rows, cols, layer.core_update().detach(), name)
        codes = requantised(layer, exact.to(value_dtype(layer)))
        error = dequantised(layer, codes) - exact
        norms = [float(torch.linalg.matrix_norm(t)) for t in (error, exact, exact - base)]
        drift = LayerDrift(float(error.abs().max()), norms[0] / norms[1], norms[0] / norms[2] if norms[2] else 0.0)
    kept = layer.weight
    layer.weight = codes if requantise else nn.Parameter(new, requires_grad=False)
    layer.__dict__["pristine"] = kept  # not by setattr, which would register it as a parameter
    return drift
