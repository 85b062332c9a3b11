"""Large orthonormal frames on the CPU: U in blocks equals the plain product of the triangular factors."""

from __future__ import annotations

import pytest
import torch
from dense import random_like, relative
from torch import nn

from lightning_pmss import PMSSConfig, convert
from lightning_pmss.methods.pmss.coordinates import TriangularProducts


@pytest.mark.parametrize(("c", "r"), [(8, 8), (5, 7), (7, 4), (3, 2), (1, 1)])
def test_blocks_equal_the_plain_products(c: int, r: int) -> None:
    """Also where there are fewer rows than blocks."""
    left, right = random_like(c, c).triu(), random_like(r, r, seed=3).tril()
    v = random_like(c, r, seed=4).requires_grad_()
    found = TriangularProducts.apply(left, v, right)
    assert relative(found, left @ v @ right) < 1e-14
    assert torch.autograd.gradcheck(lambda v: TriangularProducts.apply(left, v, right), (v,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_frame_gives_the_same_u_and_gradient(dtype: torch.dtype) -> None:
    rank = 192  # from here on in blocks
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 200, dtype=dtype))
    convert(model, PMSSConfig(rank=rank, scale=1.0))
    core = model[0].core
    left, right = core.frame.left, core.frame.right
    assert torch.equal(left, left.triu())
    assert torch.equal(right, right.tril())
    with torch.no_grad():
        core.weight.normal_()
    u, plain = model[0].core_update(), left @ core.weight @ right
    assert type(u.grad_fn).__name__ == "TriangularProductsBackward"
    loss = random_like(rank, rank, dtype=dtype)
    found, expected = (torch.autograd.grad(t, core.weight, loss)[0] for t in (u, plain))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    assert relative(u, plain) < tolerance
    assert relative(found, expected) < tolerance


def test_indices_ascend() -> None:
    """In the order of memory; the family of updates is the same in any order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48))
    convert(model, PMSSConfig(rank=16))
    for index in (model[0].rows, model[0].cols):
        assert torch.equal(index, index.sort().values)
