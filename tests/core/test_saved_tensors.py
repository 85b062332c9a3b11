"""What a converted layer keeps from forward to backward, to the byte: h, and the slice only if asked to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense import COORDINATES, EDITS, KINDS, base_layer, pmss_layer, random_like
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_pmss.layers.indices import index_tensors

TOKENS = 50


def _saved(module: nn.Module, x: Tensor, autocast: bool = False) -> list[Tensor]:
    """The tensors saved for backward, one per storage, without those that the module holds anyway."""
    held = *module.parameters(), *module.buffers(), *index_tensors(module).values()
    existing = {t.untyped_storage().data_ptr() for t in held}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in existing:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        y = module(x)
    y.float().sum().backward()  # after counting, so that no storage is freed and taken again meanwhile
    return list(kept.values())


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "inp", "rank"), [(40, 30, 8), (30, 40, 8), (64, 64, 3)])
@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_above_the_frozen_layer(
    kind: str, edit: str, coordinates: str, out: int, inp: int, rank: int, dtype: torch.dtype
) -> None:
    size = dtype.itemsize
    x = random_like(2, TOKENS // 2, inp, dtype=dtype).requires_grad_()
    frozen = _bytes(_saved(base_layer(kind, out, inp, dtype=dtype), x))
    assert frozen == 0, "a frozen layer keeps nothing but its weight"
    h = TOKENS * rank * size
    thin_side = inp if edit == "input" else out
    for memory, slice_bytes in (("regather", 0), ("keep", thin_side * rank * size)):
        layer = pmss_layer(
            kind, out, inp, rank, dtype=dtype, edit=edit, memory=memory, coordinates=coordinates, scale=0.5
        )
        # and U in the compute dtype; of a rotation B - 1 in float32
        turned = 4 * rank * rank if coordinates == "rotation" else 0
        assert _bytes(_saved(layer, x)) == h + slice_bytes + rank * rank * size + turned, memory


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("memory", ["keep", "regather"])
def test_nothing_of_the_size_of_activations_or_weight(edit: str, memory: str) -> None:
    rank, wide = 4, 48
    layer = pmss_layer(out=wide, inp=wide, rank=rank, dtype=torch.float32, edit=edit, memory=memory)
    for trained_input in (True, False):
        x = random_like(TOKENS, wide, dtype=torch.float32).requires_grad_(trained_input)
        for tensor in _saved(layer, x):
            assert tensor.numel() <= rank * max(TOKENS, wide), tuple(tensor.shape)
            assert tensor.untyped_storage().data_ptr() != x.untyped_storage().data_ptr(), "x is kept"


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("autocast", [False, True])
def test_no_float32_copy_of_the_activations_in_a_bfloat16_model(edit: str, autocast: bool) -> None:
    """Nor of h: what is kept per token has the compute dtype, also when the model trains in a chain."""
    dtype = torch.float32 if autocast else torch.bfloat16
    layers = [pmss_layer(out=48, inp=48, rank=4, dtype=dtype, edit=edit, seed=s) for s in range(3)]
    x = random_like(TOKENS, 48, dtype=torch.bfloat16).requires_grad_()
    for tensor in _saved(nn.Sequential(*layers), x, autocast):
        if tensor.dtype == torch.float32:
            assert tensor.numel() <= 4 * 48, f"float32 {tuple(tensor.shape)} is kept"


@pytest.mark.parametrize("memory", ["keep", "regather"])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_operation_of_a_bfloat16_layer_upcasts_what_tokens_are_many_of(kind: str, edit: str, memory: str) -> None:
    """Every tensor that any operation of a step makes, forward and backward, saved or not."""

    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[str, tuple[int, ...], torch.dtype]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            self.seen += [(str(func), tuple(t.shape), t.dtype) for t in made]
            return result

    layer = pmss_layer(kind, out=48, inp=36, rank=4, dtype=torch.bfloat16, edit=edit, memory=memory)
    x = random_like(TOKENS, 36, dtype=torch.bfloat16).requires_grad_()
    loss = random_like(TOKENS, 48, dtype=torch.bfloat16)
    with Watch() as watch:
        layer(x).backward(loss)
    per_token = [(name, dtype) for name, shape, dtype in watch.seen if TOKENS in shape]
    assert len(per_token) > 8
    assert not [name for name, dtype in per_token if dtype != torch.bfloat16]
    # nothing of the weight's size is made but the product's operand, which is a view of it
    assert not [name for name, shape, _ in watch.seen if sorted(shape) == [36, 48] and "aten.t" not in name]


def test_dropout_keeps_its_mask_and_nothing_else() -> None:
    x = random_like(TOKENS, 30, dtype=torch.float32).requires_grad_()
    layers = [pmss_layer(out=40, inp=30, rank=8, dtype=torch.float32, dropout=p) for p in (0.0, 0.5)]
    without, with_dropout = (_bytes(_saved(layer.train(), x)) for layer in layers)
    assert with_dropout - without == TOKENS * 8 * 4


def test_the_count_can_fail() -> None:
    """Plain autograd of the same update keeps x: the count must see it."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(48, 4, bias=False), nn.Linear(4, 48, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x * 1.0))
            return y

    x = random_like(TOKENS, 48, dtype=torch.float32).requires_grad_()
    assert _bytes(_saved(Plain(), x)) == TOKENS * (48 + 4) * 4
