"""Fingerprints: exact on the weights, tolerant of the dtype they are loaded in."""

from __future__ import annotations

import itertools

import pytest
import torch

from lightning_pmss.layers.fingerprint import fingerprint, same_base

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _slices(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return weight[[3, 1, 7]], weight[:, [2, 0]]


@pytest.fixture
def checkpoint() -> torch.Tensor:
    return torch.randn(12, 9, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_one_checkpoint_in_every_dtype(checkpoint: torch.Tensor, stored: torch.dtype) -> None:
    checkpoint = checkpoint.to(stored)
    for trained, loaded in itertools.product(FLOATS, FLOATS):
        if stored == torch.float32 and {trained, loaded} == {torch.bfloat16, torch.float16}:
            continue  # both rounded what the other kept; see below
        record = fingerprint(*_slices(checkpoint.to(trained)))
        assert same_base(record, *_slices(checkpoint.to(loaded))), (trained, loaded)


def test_two_roundings_that_cannot_be_compared_are_refused(checkpoint: torch.Tensor) -> None:
    record = fingerprint(*_slices(checkpoint.to(torch.bfloat16)))
    assert not same_base(record, *_slices(checkpoint.to(torch.float16)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [(3, 5), (10, 2)])  # in a selected row, in a selected column
def test_one_unit_in_the_last_place_is_another_base(
    checkpoint: torch.Tensor, dtype: torch.dtype, place: tuple[int, int]
) -> None:
    weight = checkpoint.to(dtype)
    record = fingerprint(*_slices(weight))
    other = weight.clone()
    other[place] = (
        torch.nextafter(other[place].float(), torch.tensor(9.0))
        if dtype == torch.float32
        else (other[place] * (1 + torch.finfo(dtype).eps))
    )
    assert other[place] != weight[place]
    assert not same_base(record, *_slices(other))


def test_shape_and_order_count() -> None:
    weight = torch.arange(12.0)
    assert fingerprint(weight.view(3, 4), weight.view(6, 2)) != fingerprint(weight.view(4, 3), weight.view(6, 2))
    assert fingerprint(weight.view(3, 4), weight.view(6, 2)) != fingerprint(weight.view(6, 2), weight.view(3, 4))


def test_layout_in_memory_does_not_count(checkpoint: torch.Tensor) -> None:
    rows, columns = _slices(checkpoint)
    assert same_base(fingerprint(rows, columns), rows.T.contiguous().T, columns.T.contiguous().T)


def test_quantised_weights_are_refused() -> None:
    with pytest.raises(TypeError, match="torch.int8"):
        fingerprint(torch.zeros(2, 2, dtype=torch.int8), torch.zeros(2, 2, dtype=torch.int8))
