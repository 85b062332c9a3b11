"""A converted layer whose weight holds W', while the pristine W is kept aside: how it is saved, loaded, cast and put back.

Merging changes W, and what an update is made of are slices of W: what was merged can neither be re-read nor subtracted
exactly. So everything but the forward pass goes on with the pristine W. A state dict holds that one, beside the adapter's
tensors, so that the update is never added twice wherever it is loaded; and what is loaded into a merged layer goes to the
pristine W and is merged again.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from lightning_pmss.layers.layout import Layout
from lightning_pmss.layers.products import without_autocast
from lightning_pmss.layers.quantised import dequantised, quantisation_of, requantised, value_dtype

if TYPE_CHECKING:
    from lightning_pmss.methods.method import Update

_BLOCK = 2**20  # elements of W merged at a time


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


class Mergeable(nn.Module):
    """A module whose state dict can be had as if it had never been converted."""

    def adapter_key(self, key: str) -> bool:
        """Whether the module's state dict has this key, without prefix, because it was converted."""
        raise NotImplementedError

    def plain_weights(self, name: str) -> tuple[dict[str, Tensor], dict[int, LayerDrift]]:
        """W' by key in the module's state dict, and what each rounding cost by ``id`` of the layer; nothing is changed.

        Args:
            name: Of the module, for errors.

        Raises:
            ValueError: W' is not finite.
        """
        raise NotImplementedError

    def plain_from(self, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """W' by key, as the base stores it, from the tensors of a state dict; the module's own stay out of it.

        Raises:
            ValueError: The state dict lacks some of them, or W' is not finite.
        """
        raise NotImplementedError

    def _pristine_in_place(self) -> AbstractContextManager[None]:
        """Inside, the weights are the pristine ones; what is put in their place becomes pristine."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        with self._pristine_in_place():
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        with self._pristine_in_place():
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class MergedLayer(Mergeable):
    """Mixin for a layer of one weight that can hold W' in its place.

    Attributes:
        weight: W, or W' while merged.
        pristine: While merged, the weight as it was, as the base stores it: on the CPU, codes where they were; else None.
        quantised: Whether the base keeps W in codes.
        layout: How ``weight`` is stored.
    """

    weight: nn.Parameter
    pristine: Tensor | None
    quantised: bool
    layout: Layout

    @property
    def transposed(self) -> bool:
        """Whether ``weight`` is stored ``[in, out]``."""
        return self.layout.transposed

    def as_stored(self, weight: Tensor) -> Tensor:
        """A weight ``[out, in]`` as the layer stores it."""
        return self.layout.stored(weight, tuple(self.stored_weight.shape))

    def of_one_device(self) -> tuple[Tensor, Update]:
        """The pristine W ``[out, in]`` and the update, on the device of the update."""
        raise NotImplementedError

    def merged_sum(self) -> tuple[Tensor, Tensor]:
        """(W', W' - W) in canonical layout, in float32 (float64 for a float64 base), from the pristine W."""
        return exact_sum(*self.of_one_device())

    def merged_from(self, state: Mapping[str, Tensor], prefix: str) -> Tensor:
        """W' as the base stores it, from the layer's tensors in a state dict; the layer's own stay out of it.

        Raises:
            ValueError: The state dict lacks some of them, or W' is not finite.
        """
        raise NotImplementedError

    def plain_weights(self, name: str) -> tuple[dict[str, Tensor], dict[int, LayerDrift]]:
        """See `Mergeable`; of a quantised layer on the CPU: the device that holds the codes need not have room for W'."""
        value, drift = self.merged_weight(name)
        return {"weight": value.cpu() if self.quantised else value}, {id(self): drift}

    def plain_from(self, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """See `Mergeable`."""
        return {"weight": self.merged_from(state, prefix)}

    @property
    def merged(self) -> bool:
        """Whether ``weight`` currently holds W' (the pristine W is kept aside until `unmerge`)."""
        return self.pristine is not None

    @property
    def stored_weight(self) -> Tensor:
        """The pristine weight as the base stores it, also while merged."""
        return self.weight if self.pristine is None else self.pristine

    def base_weight(self) -> Tensor:
        """The pristine W in canonical layout ``[out, in]``, also while merged."""
        if self.quantised:
            return dequantised(self, self.pristine)
        return self.layout.canonical(self.stored_weight.detach())

    @torch.no_grad()
    def merged_weight(self, name: str = "") -> tuple[Tensor, LayerDrift]:
        """W' with one rounding, in the layout in which the layer stores its weight; the layer is not changed.

        Raises:
            ValueError: W' is not finite; the message names the layer.
        """
        weight, update = self.of_one_device()
        rounded, drift = merge_update(weight, update, self._dense_dtype(), name)
        return self.as_stored(rounded), drift

    @torch.no_grad()
    def put_merged(self, name: str = "", *, requantise: bool = False) -> LayerDrift:
        """Put W' into the weight and keep the pristine one; nothing changes where an error is raised.

        Args:
            name: For errors.
            requantise: Into new codes, where the layer is quantised.
        """
        new, drift = self.merged_weight(name)
        if requantise:
            exact, update = self.merged_sum()
            codes = requantised(self, exact.to(self._dense_dtype()))
            drift = drift_of(dequantised(self, codes) - exact, exact, update)
            self._show(codes)
        else:
            self._show(new)
        return drift

    @torch.no_grad()
    def put_pristine(self) -> None:
        """Put the pristine weight back, bit for bit."""
        if self.pristine is None:
            return
        if self.quantised:
            codes = self.pristine
            self.pristine = None
            self.weight = codes  # type: ignore[assignment]
        else:
            self.weight.copy_(self.pristine)
            self.pristine = None

    def _dense_dtype(self) -> torch.dtype:
        return value_dtype(self) if self.quantised else self.stored_weight.dtype

    def _keep(self, weight: Tensor | None) -> None:
        """Keep the pristine weight. Codes are an `nn.Parameter`, which `__setattr__` would register: trained and saved."""
        self.__dict__["pristine"] = weight

    def _show(self, new: Tensor) -> None:
        """Let the weight be W'."""
        if self.pristine is None:
            self._keep(self.weight if self.quantised else self.weight.detach().to("cpu", copy=True))
        if self.quantised:
            self.weight = new if isinstance(new, nn.Parameter) else nn.Parameter(new, requires_grad=False)
        elif self.weight.dtype == new.dtype:
            self.weight.copy_(new)
        else:  # a state dict of another dtype was assigned
            self.weight = nn.Parameter(new.to(self.weight.device), requires_grad=self.weight.requires_grad)

    # -- state dicts, casts and moves ---------------------------------------------------------------------------------

    @contextmanager
    def _pristine_in_place(self) -> Iterator[None]:
        """Inside, the weight is the pristine one; what is put in its place becomes the pristine one."""
        if self.pristine is None:
            yield
            return
        own, shown = self.pristine, self._parameters["weight"]
        codes = isinstance(own, nn.Parameter)
        self._parameters["weight"] = own if codes else nn.Parameter(own, requires_grad=False)  # type: ignore[assignment]
        try:
            yield
        finally:
            kept = self._parameters["weight"]
            self._parameters["weight"] = shown
            self._keep(kept if codes or kept is None else kept.detach())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.merged and any(key.startswith(prefix) for key in state_dict):
            self.__dict__["loaded_as"] = prefix[:-1]  # see `merge_again`

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.pristine is not None and self.quantised:
            with torch.no_grad():
                moved = fn(self.pristine)
            self._keep(moved if isinstance(moved, nn.Parameter) else nn.Parameter(moved, requires_grad=False))
        elif self.pristine is not None:
            self.pristine = self.pristine.to(self.weight.dtype)  # it stays on the CPU, and in memory
        return self


def merge_again(layer: MergedLayer, keys: Any) -> None:
    """After a state dict was loaded into a layer and all below it: a merged one holds the new W'."""
    name = layer.__dict__.pop("loaded_as", None)
    if name is None or not layer.merged:
        return
    with torch.no_grad():
        rounded = layer.merged_sum()[0].to(layer._dense_dtype())
        if not bool(rounded.isfinite().all()):
            warnings.warn(f"`{name}`: the merged weight of what was loaded is not finite.", stacklevel=2)
        if quantisation_of(layer) is not None:
            layer._show(requantised(layer, rounded))
        else:
            layer._show(layer.as_stored(rounded))


def exact_sum(weight: Tensor, update: Update) -> tuple[Tensor, Tensor]:
    """W' and what is added to W, in float32 (float64 for a float64 W).

    Args:
        weight: The pristine W ``[out, in]``, any floating dtype.
        update: Of it, on the same device.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with without_autocast(weight):  # a caller's autocast would round the product
        change = update.delta(weight, dtype=wide)
    return weight.to(wide) + change, change


@torch.no_grad()
def merge_update(weight: Tensor, update: Update, dtype: torch.dtype, name: str = "") -> tuple[Tensor, LayerDrift]:
    """W' with one rounding: the one merge of models in memory and on disk.

    Computed in float32 (float64 for a float64 W) in blocks of rows, so that the half dozen wide copies stay small beside W.

    Args:
        weight: The pristine W ``[out, in]``, any floating dtype; not changed.
        update: Of it, on the same device.
        dtype: Of the result.
        name: Module name for errors.

    Raises:
        ValueError: W' is not finite.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    merged = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    sums = _Sums()
    step = max(1, _BLOCK // weight.shape[1])
    with without_autocast(weight):
        factors = update.factors(weight, wide)
        for start in range(0, weight.shape[0], step):
            block = slice(start, start + step)
            change = update.delta(weight, block, wide) if factors is None else factors.b[block] @ factors.a
            exact = weight[block].to(wide, copy=True).add_(change)  # a copy: `weight` may map the base's file
            rounded = exact.to(dtype)
            merged[block] = rounded
            sums.add(change, exact, rounded.to(wide, copy=True).sub_(exact))
    # NaN and infinity are among the extremes, which are found many times faster than by looking at every value.
    if not math.isfinite(sums.weight) or not all(bool(extreme.isfinite()) for extreme in torch.aminmax(merged)):
        raise ValueError(
            f"`{name}`: the merged weight is not finite (largest change {sums.largest:.3g}, dtype {dtype}); the run diverged,"
            " the base's own weights are not finite, or the dtype is too narrow. Nothing was merged."
        )
    return merged, sums.drift()


class _Sums:
    """Squared norms gathered block by block, in float64."""

    def __init__(self) -> None:
        self.max_error = self.error = self.weight = self.update = self.largest = 0.0

    def add(self, update: Tensor, exact: Tensor, error: Tensor) -> None:
        self.max_error = max(self.max_error, *(abs(float(extreme)) for extreme in torch.aminmax(error)))
        self.largest = max(self.largest, *(abs(float(extreme)) for extreme in torch.aminmax(update)))
        self.error += _square(error)
        self.weight += _square(exact)
        self.update += _square(update)

    def drift(self) -> LayerDrift:
        def ratio(part: float, whole: float) -> float:
            return math.sqrt(part / whole) if whole else 0.0

        return LayerDrift(self.max_error, ratio(self.error, self.weight), ratio(self.error, self.update))


def _square(matrix: Tensor) -> float:
    """Squared Frobenius norm: the long sums in float64, without a float64 copy."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())


def drift_of(error: Tensor, exact: Tensor, update: Tensor) -> LayerDrift:
    """The figures of an error."""
    norm, whole, size = (float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in (error, exact, update))
    return LayerDrift(float(error.abs().max()), norm / whole if whole else 0.0, norm / size if size else 0.0)
