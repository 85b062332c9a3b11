"""Two processes: Lightning keeps our samplers, nothing is evaluated twice, and a resumed run sees the same batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launch import on_two_processes


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks(tiny_tokenizer: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("two_ranks.py")
    on_two_processes([script, tiny_tokenizer, tmp_path])
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [rank["sampler"] for rank in ranks] == 2 * ["LengthGroupedSampler"]
    assert [len(rank["batches"]) for rank in ranks] == [6, 6]
    for epoch in range(2):
        rows = [tuple(r) for rank in ranks for batch in rank["batches"][3 * epoch : 3 * epoch + 3] for r in batch]
        assert len(rows) == 22  # 21 rows, one repeated
    for rank in ranks:
        assert rank["rest"] == rank["batches"][4:]
    assert ranks[0]["batches"] != ranks[1]["batches"]
    epochs = [rank["evaluated"][: len(rank["evaluated"]) // 2] for rank in ranks]
    assert [len(epoch) for epoch in epochs] == [5, 4]
    assert sorted(epochs[0] + epochs[1]) == list(range(9))  # each row once, by length
    assert [rank["evaluated"] for rank in ranks] == [2 * epoch for epoch in epochs]
    assert [rank["accuracy"] for rank in ranks] == 2 * [pytest.approx(1 / 9)]
    assert [rank["one"] for rank in ranks] == [[0], [-1]]  # one example on two ranks: the other one gets a filler
    assert [rank["accuracy_of_one"] for rank in ranks] == [1.0, 1.0]
