"""Find weights that share memory with other tensors of a model, as one Parameter or as several.

``nn.Parameter(other.weight.data)``, a view of it and slices of one large tensor are Parameters of their own, but to write
into one changes the other. Merging writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_pmss.layers.parts import is_dtensor


@dataclass(frozen=True)
class _Span:
    """A tensor, whose it is, and the addresses from its first to behind its last element."""

    owner: str
    tensor: Tensor
    start: int
    end: int


def shares_memory(names: Iterable[str], modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """The layers whose weights share elements with tensors of other modules, or with other tensors of their own.

    Args:
        names: Of layers with a ``weight``.
        modules: All modules of the model, by name.

    Returns:
        Name -> names of the other tensors, ``<module>.<tensor>``. Tensors without memory of their own (on the meta device,
        fake, kept in parts) are left out.
    """
    weights = {id(modules[name].weight): name for name in names}
    spans = []
    seen: set[int] = set()
    for owner, module in modules.items():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for key, tensor in own:
            if id(tensor) not in seen and _has_memory(tensor):
                seen.add(id(tensor))
                start = tensor.data_ptr()
                length = (
                    sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
                )
                spans.append(_Span(f"{owner}.{key}", tensor, start, start + length * tensor.element_size()))
    found: dict[str, list[str]] = {}
    reaching: list[_Span] = []
    for span in sorted(spans, key=lambda span: span.start):
        reaching = [other for other in reaching if other.end > span.start]
        for other in reaching:
            for one, second in ((span, other), (other, span)):
                if id(one.tensor) in weights and _overlap(span, other):
                    found.setdefault(weights[id(one.tensor)], []).append(second.owner)
        reaching.append(span)
    return found


def is_expanded(tensor: Tensor) -> bool:
    """Whether several elements of a tensor are one number in memory."""
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _has_memory(tensor: Tensor) -> bool:
    odd = (
        is_lazy(tensor) or isinstance(tensor, FakeTensor) or is_traceable_wrapper_subclass(tensor) or is_dtensor(tensor)
    )
    return not odd and not tensor.is_meta and tensor.numel() > 0 and tensor.data_ptr() != 0


def _overlap(first: _Span, second: _Span) -> bool:
    """Whether two tensors whose addresses interleave have an element in common; in doubt, yes."""
    a, b = first.tensor, second.tensor
    size = a.element_size()
    rows = a.dim() == b.dim() == 2 and a.stride(1) == b.stride(1) == 1 and a.stride(0) == b.stride(0)
    if not rows or b.element_size() != size or (second.start - first.start) % size:
        return True
    # Both lie in one matrix of this width, in which b begins `down` rows below a and `right` columns beside it.
    width = a.stride(0)
    down, right = divmod((second.start - first.start) // size, width)
    return any(
        _meet(a.shape[0], d, b.shape[0]) and _meet(a.shape[1], r, b.shape[1])
        for d, r in ((down, right), (down + 1, right - width))
    )


def _meet(length: int, start: int, other: int) -> bool:
    """Whether ``[0, length)`` and ``[start, start + other)`` have a number in common."""
    return start < length and start + other > 0
