"""Merge the update into the weights and take it out again, in memory.

Merging changes W, and C and R are slices of W: what was merged can neither be re-read nor subtracted exactly. So the
pristine W is kept aside (on the CPU) and `unmerge` puts it back bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.conversion.roots import below, canonical_modules
from lightning_pmss.distributed.gathering import whole_tensors, whole_updates
from lightning_pmss.layers.adapted import AdaptedLinear
from lightning_pmss.layers.convertible import canonical_shape
from lightning_pmss.layers.expert_layer import holder
from lightning_pmss.layers.experts import AdaptedExperts
from lightning_pmss.layers.guard import refuse_disabled
from lightning_pmss.layers.matrices import AdaptedMatrices
from lightning_pmss.layers.merged_layer import LayerDrift, Mergeable, merge_update
from lightning_pmss.layers.parts import clean_name, clean_state, is_sharded
from lightning_pmss.layers.plain_state import plain_state_dicts
from lightning_pmss.layers.quantised import can_requantise, quantisation_of, value_dtype
from lightning_pmss.store import not_finite


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
        ValueError: No converted layer, already merged, disabled, a merged weight is not finite, or a quantised layer and
            neither of the two options.
    """
    layers = _unsharded_layers(model)
    refuse_disabled(layers.values(), "merged")
    refuse_quantised(layers, dequantise, requantise)
    if done := [name for name, layer in layers.items() if layer.merged]:
        raise ValueError(
            f"`{done[0]}` is merged already; merging starts from the pristine weights only: `unmerge` first."
        )
    for name, layer in layers.items():
        if broken := not_finite(layer.update().numbers()):
            raise ValueError(
                f"`{name}`: {broken[0]} holds NaN or infinite values; the run diverged. Nothing was merged."
            )
    drift = {}
    try:
        for name, layer in layers.items():
            drift[name] = layer.put_merged(name, requantise=requantise and layer.quantised)
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

    Keys are the clean names of ``model.state_dict()`` without the adapters', also where parts are compiled. Quantised layers
    give dense weights. Tensors that were not converted are the live ones.
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
    layers = {
        n: x for n, x in canonical_modules(model).items() if isinstance(x, AdaptedLinear) and id(holder(x)) in asked
    }
    if not is_sharded(model):
        with plain_state_dicts(model, asked) as cost:
            full = clean_state(model)
        state = {key: value for key, value in full.items() if under is None or below(key, under)}
        return state, {name: cost[id(layer)] for name, layer in layers.items()}
    refuse_disabled(layers.values(), "merged")
    updates = dict(whole_updates(model, layers))
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    state = dict(whole_tensors(model, under=under, keep=first))
    if not first:
        return {}, {}
    drift = {}
    names = {id(layer): name for name, layer in layers.items()}
    for full_name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, Mergeable) or not (under is None or below(clean_name(full_name), under)):
            continue
        start = f"{clean_name(full_name)}.".lstrip(".")
        for key in [k for k in state if k.startswith(start) and module.adapter_key(k.removeprefix(start))]:
            del state[key]
        for layer, weight in _weights_in(module, state, start):
            if id(layer) in names:
                name = names[id(layer)]
                canonical = layer.layout.canonical(weight)
                value, drift[name] = merge_update(canonical, updates[name].to("cpu"), canonical.dtype, name)
                weight.copy_(layer.layout.stored(value, tuple(weight.shape)))
    return state, drift


def _weights_in(module: Mergeable, state: Mapping[str, Tensor], start: str) -> Iterator[tuple[AdaptedLinear, Tensor]]:
    """(layer, its weight as `Layout` has it) of the converted layers of a module, in a state dict with its keys at `start`."""
    if isinstance(module, AdaptedExperts):
        for layer in module.layers().values():
            weight = state[f"{start}{layer.key}"][layer.index]
            yield layer, weight.T if module.is_transposed else weight
    elif isinstance(module, AdaptedMatrices):
        yield from ((layer, state[f"{start}{key}"]) for key, layer in module.layers().items())
    elif isinstance(module, AdaptedLinear):
        yield module, state[f"{start}weight"]


def _unsharded_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    if is_sharded(model):
        raise ValueError(
            "a sharded model cannot be merged in place; write the adapter and merge it into the base on disk"
            " (`python -m lightning_pmss merge`), which PMSSCallback does when `fit` ends."
        )
    return _layers(model)


def _layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    if not (layers := adapted_layers(model)):
        raise ValueError(f"{type(model).__name__} has no converted layer; `convert` or `load_adapter` comes first.")
    return layers


def _restore(layers: dict[str, AdaptedLinear]) -> None:
    for layer in layers.values():
        layer.put_pristine()


def refuse_quantised(layers: dict[str, AdaptedLinear], dequantise: bool, requantise: bool) -> None:
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
