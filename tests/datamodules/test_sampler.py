"""Orders of the samplers, and what the resumable loader accepts."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import zip_longest

import pytest
import torch
from torch.utils.data import DistributedSampler, TensorDataset

from lightning_pmss.datamodules.collate import InstructionCollator
from lightning_pmss.datamodules.sampler import LengthGroupedSampler, ResumableDataLoader, ShardSampler, WithFillers

LENGTHS = torch.randint(10, 200, (203,), generator=torch.Generator().manual_seed(0)).tolist()


def _epoch(sampler: LengthGroupedSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


def test_every_example_once_an_epoch() -> None:
    sampler = LengthGroupedSampler(LENGTHS, batch_size=8)
    assert isinstance(sampler, DistributedSampler)  # this is what makes Lightning leave it in place
    assert sorted(_epoch(sampler, 0)) == list(range(203))
    assert len(sampler) == 203


def test_order_depends_on_seed_and_epoch_only() -> None:
    first = LengthGroupedSampler(LENGTHS, batch_size=8, seed=3)
    torch.manual_seed(1)
    second = LengthGroupedSampler(LENGTHS, batch_size=8, seed=3)
    assert _epoch(first, 2) == _epoch(second, 2) == _epoch(pickle.loads(pickle.dumps(first)), 2)  # noqa: S301
    orders = {tuple(LengthGroupedSampler(LENGTHS, 8, seed).order(epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_global_random_state_is_untouched() -> None:
    before = torch.get_rng_state()
    _epoch(LengthGroupedSampler(LENGTHS, batch_size=8), 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_hold_similar_lengths_in_random_order() -> None:
    order = torch.tensor(_epoch(LengthGroupedSampler(LENGTHS, batch_size=8), 0))
    lengths = torch.tensor(LENGTHS)[order]
    padding = sum(int(batch.max() * len(batch) - batch.sum()) for batch in lengths.split(8))
    shuffled = torch.tensor(LENGTHS)
    padding_shuffled = sum(int(batch.max() * len(batch) - batch.sum()) for batch in shuffled.split(8))
    assert padding < 0.35 * padding_shuffled
    means = [batch.float().mean() for batch in lengths.split(8)[:-1]]
    assert means != sorted(means)
    assert means != sorted(means, reverse=True)


def test_a_small_data_set_is_mixed_anew_each_epoch() -> None:
    sampler = LengthGroupedSampler(LENGTHS[:64], batch_size=8)
    together = [{frozenset(batch) for batch in torch.tensor(_epoch(sampler, e)).split(8)} for e in (0, 1)]
    first, second = ({frozenset(map(int, batch)) for batch in epoch} for epoch in together)
    assert not first & second


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 7, 48, 203])
def test_ranks_get_equally_many_and_together_all(count: int, replicas: int) -> None:
    ranks = [LengthGroupedSampler(LENGTHS[:count], 8, num_replicas=replicas, rank=rank) for rank in range(replicas)]
    orders = [_epoch(sampler, 1) for sampler in ranks]
    assert {len(order) for order in orders} == {len(ranks[0])}
    seen = Counter(index for order in orders for index in order)
    assert set(seen) == set(range(count))
    assert sum(seen.values()) - count < max(replicas, 2)  # fewer repeated than there are ranks


def test_batches_of_all_ranks_are_similar() -> None:
    ranks = [LengthGroupedSampler(LENGTHS, 4, num_replicas=2, rank=rank) for rank in range(2)]
    lengths = torch.tensor(LENGTHS)
    both = [lengths[torch.tensor(_epoch(sampler, 0))].split(4)[:-1] for sampler in ranks]
    spread = [int(torch.cat(pair).max() - torch.cat(pair).min()) for pair in zip(*both, strict=True)]
    assert sum(spread) / len(spread) < 60  # of a range of 190


def test_skip_is_used_once() -> None:
    sampler = LengthGroupedSampler(LENGTHS, batch_size=8)
    whole = list(sampler)
    sampler.skip = 16
    assert list(sampler) == whole[16:]
    assert list(sampler) == whole


@pytest.mark.parametrize("lengths", [[], [5]])
def test_tiny_sizes(lengths: list[int]) -> None:
    assert list(LengthGroupedSampler(lengths, batch_size=8)) == list(range(len(lengths)))


def test_sampler_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        LengthGroupedSampler(LENGTHS, batch_size=0)
    with pytest.raises(ValueError, match="`rank` is 2 of `num_replicas` 2"):
        LengthGroupedSampler(LENGTHS, batch_size=1, num_replicas=2, rank=2)


@pytest.mark.parametrize("size", [0, 1, 5, 6])
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_shards_are_disjoint_and_complete(size: int, replicas: int) -> None:
    shards = [ShardSampler(size, replicas, rank) for rank in range(replicas)]
    assert sorted(index for shard in shards for index in shard if index < size) == list(range(size))
    alone = [list(shard) for shard in shards if size in list(shard)]
    assert alone == [[size]] * max(0, replicas - size if size else 0)  # a filler where a rank would have nothing
    assert [len(shard) for shard in shards] == [len(list(shard)) for shard in shards]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    filled = [ShardSampler(size, replicas, rank, fill=True) for rank in range(replicas)]
    assert sorted(index for shard in filled for index in shard if index < size) == list(range(size))
    assert {len(shard) for shard in filled} == {len(list(shard)) for shard in filled} == {-(-size // replicas)}
    assert all(index <= size for shard in filled for index in shard)


def test_fillers_are_computed_and_not_scored() -> None:
    rows = [{"id": n, "prompt_ids": [5], "response_ids": [6, 7], "prompt": "p", "target": "t"} for n in range(3)]
    collate = InstructionCollator(0, evaluation=True)
    batch = collate([WithFillers(rows)[index] for index in ShardSampler(3, 2, rank=1, fill=True)])
    assert batch["id"].tolist() == [1, -1]
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 6, 7]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, -100]]


def test_loader_refuses_orders_it_cannot_repeat() -> None:
    data = TensorDataset(torch.arange(4))
    with pytest.raises(TypeError, match="whose order can be repeated"):
        ResumableDataLoader(data, shuffle=True)
    with pytest.raises(TypeError, match="cannot repeat the order of a `SubsetRandomSampler`"):
        ResumableDataLoader(data, sampler=torch.utils.data.SubsetRandomSampler([0, 1]))


def test_loader_refuses_a_foreign_state() -> None:
    loader = ResumableDataLoader(TensorDataset(torch.arange(4)))
    with pytest.raises(ValueError, match=r"lacks \['batch_size'"):
        loader.load_state_dict({"epoch": 0, "batches": 1})


@pytest.mark.parametrize("sampled", ["grouped", "distributed", "sequential"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_without_a_trainer(sampled: str, num_workers: int) -> None:
    data = TensorDataset(torch.arange(10))

    def build() -> ResumableDataLoader[list[torch.Tensor]]:
        samplers = {
            "grouped": LengthGroupedSampler(list(range(10)), 2),
            "distributed": DistributedSampler(data, num_replicas=1, rank=0),
            "sequential": None,
        }
        return ResumableDataLoader(data, sampler=samplers[sampled], batch_size=2, num_workers=num_workers)

    loader = build()
    whole = [batch[0].tolist() for batch in loader]
    assert loader.state_dict()["batches"] == 5
    iterator = iter(loader)
    assert loader.state_dict()["batches"] == 0
    for _ in range(3):
        next(iterator)
    state = loader.state_dict()
    assert state["batches"] == 3  # workers have fetched more by now
    resumed = build()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert [batch[0].tolist() for batch in resumed] == whole[3:]
    assert [batch[0].tolist() for batch in resumed] == whole


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_shards_by_length(replicas: int) -> None:
    lengths = [3, 9, 3, 7, 1, 9, 2]
    shards = [list(ShardSampler(7, replicas, rank, lengths=lengths)) for rank in range(replicas)]
    assert sorted(index for shard in shards for index in shard) == list(range(7))
    for shard in shards:
        assert [lengths[index] for index in shard] == sorted((lengths[index] for index in shard), reverse=True)
    # What the ranks do at the same time is of similar length: together it is the order of one rank.
    alone = list(ShardSampler(7, lengths=lengths))
    assert alone == [1, 5, 3, 0, 2, 6, 4]
    assert [index for turn in zip_longest(*shards) for index in turn if index is not None] == alone
    filled = [list(ShardSampler(7, replicas, rank, fill=True, lengths=lengths)) for rank in range(replicas)]
    assert sorted(index for shard in filled for index in shard if index < 7) == list(range(7))
    assert {len(shard) for shard in filled} == {-(-7 // replicas)}
