"""Selection of rows and columns: what every rule promises, and how good the two pivoted ones are."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_pmss.methods.pmss.config import ROW_MODES, SELECTIONS
from lightning_pmss.methods.pmss.selection import SELECTORS, projection_residual, select_skeleton

DRAWN = ("lupp", "random", "inverse_norm")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _gaussian(out: int, inp: int, seed: int = 0) -> Tensor:
    return torch.randn(out, inp, generator=torch.Generator().manual_seed(seed))


def _decaying(out: int, inp: int, power: float, seed: int = 0) -> Tensor:
    """Random singular vectors, singular values ``k ** -power``."""
    side = min(out, inp)
    left = torch.linalg.qr(_gaussian(out, side, seed)).Q
    right = torch.linalg.qr(_gaussian(inp, side, seed + 1)).Q
    return left * torch.arange(1, side + 1.0) ** -power @ right.T


def _check(rows: Tensor, cols: Tensor, shape: tuple[int, int], rank: int) -> None:
    for index, size in ((rows, shape[0]), (cols, shape[1])):
        assert index.dtype == torch.int64
        assert index.shape == (rank,)
        assert len(set(index.tolist())) == rank
        assert 0 <= int(index.min()) <= int(index.max()) < size


def test_every_selection_of_the_config_has_its_rule() -> None:
    assert tuple(SELECTORS) == SELECTIONS


@pytest.mark.parametrize("row_mode", ROW_MODES)
@pytest.mark.parametrize("selection", sorted(SELECTORS))
class TestEveryRule:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("out", "inp", "rank"), [(40, 13, 7), (13, 40, 7), (17, 17, 5), (1, 9, 1), (9, 1, 1)])
    def test_distinct_and_in_range(
        self, selection: str, row_mode: str, dtype: torch.dtype, out: int, inp: int, rank: int
    ) -> None:
        rows, cols = select_skeleton(_gaussian(out, inp).to(dtype), rank, selection=selection, row_mode=row_mode)
        _check(rows, cols, (out, inp), rank)

    @pytest.mark.parametrize(("out", "inp"), [(12, 12), (12, 20), (20, 12)])
    def test_full_rank_takes_every_index_of_the_small_side(
        self, selection: str, row_mode: str, out: int, inp: int
    ) -> None:
        rows, cols = select_skeleton(_gaussian(out, inp), 12, selection=selection, row_mode=row_mode)
        _check(rows, cols, (out, inp), 12)

    @pytest.mark.parametrize(
        "weight",
        [
            pytest.param(torch.diag(torch.tensor([2.0, 1.0, 0.0, 0.0, 0.0])), id="exactly singular"),
            pytest.param(torch.ones(6, 8), id="all columns equal"),
            pytest.param(_gaussian(12, 3) @ _gaussian(3, 20), id="rank 3"),
            pytest.param(_gaussian(12, 10).repeat(1, 2), id="each column twice"),
            pytest.param(torch.eye(9)[:, :4] @ torch.eye(4, 7), id="zero rows and columns"),
        ],
    )
    def test_dependent_columns_still_give_distinct_indices(self, selection: str, row_mode: str, weight: Tensor) -> None:
        rank = min(weight.shape)
        rows, cols = select_skeleton(weight, rank, selection=selection, row_mode=row_mode)
        _check(rows, cols, (weight.shape[0], weight.shape[1]), rank)

    def test_the_seed_and_the_name_alone_decide(self, selection: str, row_mode: str) -> None:
        weight = _gaussian(60, 50)

        def select(seed: int = 0, name: str = "a") -> tuple[list[int], list[int]]:
            rows, cols = select_skeleton(weight, 8, selection=selection, row_mode=row_mode, seed=seed, name=name)
            return rows.tolist(), cols.tolist()

        first = select()
        torch.manual_seed(1234)
        assert select() == first, "depends on the global random state"
        others = [select(seed=1), select(seed=2), select(name="b")]
        if selection in DRAWN:
            assert all(other != first for other in others)
        else:
            assert all(other == first for other in others)

    def test_leaves_the_global_random_states_alone(self, selection: str, row_mode: str) -> None:
        torch.manual_seed(0)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
        select_skeleton(_gaussian(60, 50), 8, selection=selection, row_mode=row_mode)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
        assert random.getstate() == before[2]

    @pytest.mark.parametrize("factor", [1e-20, 1e20])
    def test_scale_of_the_weight_does_not_count(self, selection: str, row_mode: str, factor: float) -> None:
        weight = _gaussian(30, 25)
        expected = select_skeleton(weight, 6, selection=selection, row_mode=row_mode)
        actual = select_skeleton(weight * factor, 6, selection=selection, row_mode=row_mode)
        assert [i.tolist() for i in actual] == [i.tolist() for i in expected]

    def test_float64_beyond_the_range_of_float32(self, selection: str, row_mode: str) -> None:
        weight = _gaussian(30, 25).double()
        expected = select_skeleton(weight, 6, selection=selection, row_mode=row_mode)
        for factor in (2.0**-300, 2.0**300):
            actual = select_skeleton(weight * factor, 6, selection=selection, row_mode=row_mode)
            assert [i.tolist() for i in actual] == [i.tolist() for i in expected]

    def test_weight_is_not_changed(self, selection: str, row_mode: str) -> None:
        weight = _gaussian(20, 15)
        copy = weight.clone()
        select_skeleton(weight, 5, selection=selection, row_mode=row_mode)
        assert torch.equal(weight, copy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "NaN or infinite"), (float("inf"), "NaN or infinite"), (None, "all zeros")]
)
def test_unusable_weights_are_refused(dtype: torch.dtype, value: float | None, message: str) -> None:
    weight = torch.zeros(5, 4, dtype=dtype) if value is None else _gaussian(5, 4).to(dtype)
    if value is not None:
        weight[3, 1] = value
    with pytest.raises(ValueError, match=f"`layers.0.q`: .*{message}"):
        select_skeleton(weight, 2, name="layers.0.q")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, r"rank=0 does not fit \(5, 4\); the largest is 4"),
        ({"rank": 5}, r"rank=5 does not fit"),
        ({"selection": "lup"}, r"selection='lup' is not known; choose one of .*lupp"),
        ({"row_mode": "both"}, r"row_mode='both' is not known; choose one of .*nested"),
        ({"weight": torch.ones(3)}, r"needs a matrix, got a weight of shape \(3,\)"),
    ],
)
def test_arguments_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_skeleton(**({"weight": _gaussian(5, 4), "rank": 2} | change))  # type: ignore[arg-type]


def test_nested_rows_are_those_of_the_selected_columns() -> None:
    weight = _decaying(40, 30, 1.0)
    for selection in ("pivoted_qr", "norm", "leverage"):
        rows, cols = select_skeleton(weight, 6, selection=selection, row_mode="nested")
        of_columns, _ = select_skeleton(weight[:, cols], 6, selection=selection)
        assert rows.tolist() == of_columns.tolist(), selection


def test_norm_and_inverse_norm_look_at_the_norms() -> None:
    weight = _gaussian(20, 12)
    weight[:, [3, 7]] *= 50
    weight[:, [5, 9]] /= 1e4
    assert set(select_skeleton(weight, 2, selection="norm")[1].tolist()) == {3, 7}
    weight[:, 1] = 0
    hits = [set(select_skeleton(weight, 2, selection="inverse_norm", seed=s)[1].tolist()) for s in range(10)]
    assert all(hit == {5, 9} for hit in hits)
    assert 1 in select_skeleton(weight, 12, selection="inverse_norm")[1].tolist()[-1:], "a zero column comes last"


def _pivots(matrix: np.ndarray, rank: int) -> list[int]:
    """Column-pivoted QR with explicit deflation, in float64: slow and plain."""
    rest, chosen = matrix.astype(np.float64).copy(), []
    for _ in range(rank):
        pivot = int(np.argmax((rest**2).sum(0)))
        chosen.append(pivot)
        direction = rest[:, pivot] / np.linalg.norm(rest[:, pivot])
        rest -= np.outer(direction, direction @ rest)
    return chosen


@pytest.mark.parametrize(("out", "inp"), [(50, 40), (40, 50), (30, 80)])
@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_pivoted_qr_gives_the_pivots_of_the_full_factorisation(out: int, inp: int, power: float) -> None:
    weight = _gaussian(out, inp, 3) if power == 0 else _decaying(out, inp, power, 3)
    rank = 20
    rows, cols = select_skeleton(weight, rank, selection="pivoted_qr")
    assert cols.tolist() == _pivots(weight.numpy(), rank)
    assert rows.tolist() == _pivots(weight.T.numpy(), rank)


def test_pivoted_qr_gives_the_pivots_of_lapack() -> None:
    linalg = pytest.importorskip("scipy.linalg", reason="compares with scipy, which is not installed")
    weight = _decaying(50, 60, 1.0, 5)
    _, _, pivots = linalg.qr(weight.double().numpy(), mode="economic", pivoting=True)
    assert select_skeleton(weight, 30, selection="pivoted_qr")[1].tolist() == pivots[:30].tolist()


def _residuals(weight: Tensor, rank: int, seeds: int = 5) -> dict[str, float]:
    """Mean residual of each rule over seeds, columns and rows, and the floor that no choice of columns can pass."""
    singular = torch.linalg.svdvals(weight.double())
    result = {"svd": float(singular[rank:].norm() / singular.norm())}
    for rule in ("pivoted_qr", "lupp", "random"):
        values = []
        for seed in range(seeds if rule in DRAWN else 1):
            rows, cols = select_skeleton(weight, rank, selection=rule, seed=seed)
            values += [projection_residual(weight, cols), projection_residual(weight.T, rows)]
        result[rule] = sum(values) / len(values)
    return result


@pytest.mark.parametrize(("out", "inp"), [(160, 120), (100, 200)])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("rank", [8, 32])
def test_pivoted_rules_lie_between_the_svd_and_chance(out: int, inp: int, power: float, rank: int) -> None:
    found = _residuals(_decaying(out, inp, power), rank)
    assert found["svd"] <= found["pivoted_qr"] * (1 + 1e-5), found
    assert found["svd"] <= found["lupp"] * (1 + 1e-5), found
    assert found["lupp"] < found["random"], found
    assert found["lupp"] < 1.06 * found["pivoted_qr"], found
    # random is far worse only where the spectrum decays
    assert found["pivoted_qr"] < {0.5: 0.97, 1.0: 0.90, 2.0: 0.80}[power] * found["random"], found


def test_oversampling_improves_lupp() -> None:
    def residual(oversample: int) -> float:
        weights = [_decaying(120, 90, 1.0, seed) for seed in range(6)]
        found = [projection_residual(w, select_skeleton(w, 16, oversample=oversample)[1]) for w in weights]
        return sum(found) / len(found)

    assert residual(20) < 0.99 * residual(0)


def test_lupp_sees_every_row() -> None:
    """With fewer rows than rank + oversample the sketch is W itself; its first rows must not decide alone."""
    weight = torch.zeros(30, 40)
    weight[24:] = _gaussian(6, 40)
    weight[:24] = 1e-3 * _gaussian(24, 40, 1)
    _, cols = select_skeleton(weight, 24, selection="lupp", oversample=10)
    best = projection_residual(weight, select_skeleton(weight, 24, selection="pivoted_qr")[1])
    assert projection_residual(weight[24:], cols[:6]) < 1e-3
    assert projection_residual(weight, cols) < 2 * best


def test_projection_residual_by_hand() -> None:
    weight = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 12.0]])
    assert projection_residual(weight, torch.tensor([2])) == pytest.approx(5 / 13)
    assert projection_residual(weight, torch.tensor([0, 1, 2])) == pytest.approx(0, abs=1e-6)
    # the definition with the pseudo-inverse, also on columns that depend on one another
    weight = _gaussian(9, 7)
    weight[:, 4] = -2 * weight[:, 2]
    cols = torch.tensor([1, 4, 2, 0])
    c = weight[:, cols].double()
    expected = (weight - c @ torch.linalg.pinv(c) @ weight.double()).norm() / weight.double().norm()
    assert projection_residual(weight, cols) == pytest.approx(float(expected), rel=1e-5)


def test_on_the_weights_of_a_trained_model(shared: Path) -> None:
    path = shared / "models" / "stories260K" / "model.safetensors"
    if not path.is_file():
        pytest.skip("needs a real model: models/stories260K is not in the shared folder")
    from safetensors.torch import load_file

    weights = {k: w for k, w in load_file(path).items() if k.endswith("proj.weight") and ".layers.2." in k}
    assert len(weights) == 7
    shares = []
    for key, weight in weights.items():
        found = _residuals(weight, 16)
        assert found["svd"] <= min(found["pivoted_qr"], found["lupp"]), (key, found)
        assert found["lupp"] < 1.03 * found["pivoted_qr"], (key, found)
        shares.append(found["lupp"] / found["random"])
    assert max(shares) < 1.005, shares
    assert sum(shares) / len(shares) < 0.97, shares


@pytest.mark.parametrize("selection", sorted(SELECTORS))
def test_the_default_dtype_does_not_matter(selection: str) -> None:
    """Lightning builds and converts models under ``bf16-true`` with bfloat16 as the default."""
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    expected = select_skeleton(weight, 5, selection=selection)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = select_skeleton(weight, 5, selection=selection)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
