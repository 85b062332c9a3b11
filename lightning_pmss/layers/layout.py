"""How a base stores the matrix W ``[out, in]`` that a method changes."""

from __future__ import annotations

import enum
import math

from torch import Tensor


class Layout(enum.StrEnum):
    """The layouts, under the names that files have for them.

    LINEAR: W. CONV1D: W^T, as transformers' ``Conv1D``. CONVOLUTION: ``[out, in, *kernel]``, of which W is the flat view, a
    column for each input channel and place in the kernel. EMBEDDING: W^T, a row for each id. PARAMETER: W, which is a
    parameter of another module; the layer's name is the parameter's.
    """

    LINEAR = "linear"
    CONV1D = "conv1d"
    CONVOLUTION = "convolution"
    EMBEDDING = "embedding"
    PARAMETER = "parameter"

    @property
    def transposed(self) -> bool:
        """Whether W^T is stored."""
        return self in (Layout.CONV1D, Layout.EMBEDDING)

    def canonical(self, stored: Tensor) -> Tensor:
        """W ``[out, in]`` of a tensor as it is stored: a view (a copy of a convolution's in another memory format)."""
        if self is Layout.CONVOLUTION:
            return stored.flatten(1)
        return stored.T if self.transposed else stored

    def stored(self, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse: W ``[out, in]`` as it is stored; of a convolution in this shape."""
        if self is Layout.CONVOLUTION:
            return weight.view(shape)
        return weight.T.contiguous() if self.transposed else weight

    def fits(self, shape: tuple[int, int], stored: tuple[int, ...]) -> bool:
        """Whether a tensor of the shape `stored` may be W of this shape."""
        if self is Layout.CONVOLUTION:
            return len(stored) > 2 and stored[0] == shape[0] and math.prod(stored[1:]) == shape[1]
        return stored == (shape[::-1] if self.transposed else shape)

    def described(self, shape: tuple[int, int]) -> str:
        """The shape in which W of this shape is stored, for messages."""
        if self is Layout.CONVOLUTION:
            return f"a convolution [{shape[0]}, ...] of {shape[1]} numbers for each output"
        return str(list(shape[::-1] if self.transposed else shape))


def picked(weight: Tensor, index: Tensor, dim: int) -> Tensor:
    """Rows (dim 0) or columns (dim 1) of W, contiguous. Of a view of W^T torch would copy all of W first."""
    if weight.stride(0) == 1 and weight.stride(1) > 1:
        return weight.T.index_select(1 - dim, index).T.contiguous()
    return weight.index_select(dim, index)
