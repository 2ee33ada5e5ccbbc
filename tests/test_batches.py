"""Global batches depend on the seed and their size alone; ranks share them without a gap."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grass_dist.errors import ConfigError
from grass_dist.finetune.data.batches import (
    Examples,
    GlobalBatches,
    MicroBatches,
    check_divides,
    permutation,
    share,
)

SEEDS = st.integers(0, 2**63 - 1)


def examples(n: int) -> list[dict[str, list[int]]]:
    return [{"input_ids": [index], "labels": [-100]} for index in range(n)]


class FakeStream:
    """Items are numbers, in another order each epoch; ``made`` lists those whose example was asked for."""

    def __init__(self, n: int) -> None:
        self.n, self.made = n, []

    def epoch(self, seed: int, epoch: int) -> Iterator[int]:
        return iter(permutation(self.n, seed, epoch).tolist())

    def example(self, item: int) -> dict[str, list[int]]:
        self.made.append(item)
        return {"input_ids": [item], "labels": [-100]}


def steps(train, count: int, **options) -> list[list[list[int]]]:
    """For each step, for each micro-batch, the numbers of its examples."""
    source = MicroBatches(train, **options)
    return [[[example["input_ids"][0] for example in micro] for micro in step] for step in islice(source, count)]


@settings(deadline=None)
@given(n=st.integers(1, 40), batch=st.integers(1, 24), seed=SEEDS)
def test_every_epoch_is_a_permutation_and_none_is_left_out(n, batch, seed):
    batches = GlobalBatches(n, batch, seed)
    number = -(-3 * n // batch)
    sequence = [index for k in range(number) for index in batches.indices(k)]
    for epoch in range(3):
        assert sorted(sequence[epoch * n : (epoch + 1) * n]) == list(range(n))
        assert sequence[epoch * n : (epoch + 1) * n] == permutation(n, seed, epoch).tolist()


@settings(deadline=None)
@given(n=st.integers(1, 40), batch=st.integers(1, 24), seed=SEEDS, k=st.integers(0, 30))
def test_a_global_batch_does_not_depend_on_earlier_ones(n, batch, seed, k):
    used = GlobalBatches(n, batch, seed)
    in_order = [used.indices(step) for step in range(k + 1)]
    assert GlobalBatches(n, batch, seed).indices(k) == in_order[k]
    assert [used.indices(step) for step in reversed(range(k + 1))] == in_order[::-1]


def test_orders_differ_between_seeds_and_between_epochs():
    orders = {tuple(permutation(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_order_is_the_same_in_every_version():
    assert permutation(8, 0, 0).tolist() == [5, 0, 6, 1, 7, 2, 4, 3]
    assert GlobalBatches(8, 4, 0).indices(1) == [5, 0, 6, 1, 7, 2, 4, 3][4:]


def test_share_by_hand():
    batch = list(range(8))
    assert share(batch, 0, 2, 2) == [[0, 1], [4, 5]]
    assert share(batch, 1, 2, 2) == [[2, 3], [6, 7]]
    assert share(batch, 0, 1, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@given(world=st.sampled_from([1, 2, 4]), micro=st.integers(1, 4), accumulation=st.integers(1, 3))
def test_the_shares_of_the_ranks_make_up_the_global_batch(world, micro, accumulation):
    batch = list(range(world * micro * accumulation))
    shares = [share(batch, rank, world, micro) for rank in range(world)]
    assert all(len(part) == accumulation and all(len(m) == micro for m in part) for part in shares)
    by_micro_batch = [item for i in range(accumulation) for part in shares for item in part[i]]
    assert by_micro_batch == batch


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 30), seed=SEEDS, streaming=st.booleans())
def test_global_batches_are_the_same_on_any_number_of_ranks(n, seed, streaming):
    def global_batches(world: int, micro: int) -> list[list[int]]:
        options = {"seed": seed, "global_batch_size": 8, "micro_batch_size": micro, "world_size": world}
        train = FakeStream(n) if streaming else examples(n)
        ranks = [steps(train, 6, rank=rank, **options) for rank in range(world)]
        return [
            [item for i in range(8 // (world * micro)) for rank in ranks for item in rank[step][i]] for step in range(6)
        ]

    alone = global_batches(1, 8)
    assert alone == [GlobalBatches(n, 8, seed).indices(k) for k in range(6)]
    for world, micro in [(1, 1), (1, 2), (2, 1), (2, 4), (4, 1), (4, 2)]:
        assert global_batches(world, micro) == alone


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 30), start=st.integers(0, 12), rank=st.integers(0, 1), streaming=st.booleans())
def test_resuming_at_a_step_gives_the_tail(n, start, rank, streaming):
    train = FakeStream(n) if streaming else examples(n)
    options = {"seed": 5, "global_batch_size": 4, "micro_batch_size": 2, "rank": rank, "world_size": 2}
    assert steps(train, 4, start_step=start, **options) == steps(train, start + 4, **options)[start:]


def test_a_rank_makes_its_own_examples_of_a_stream_only():
    stream = FakeStream(8)
    mine = steps(stream, 3, seed=0, global_batch_size=4, micro_batch_size=1, rank=1, world_size=2, start_step=1)
    assert stream.made == [item for step in mine for micro in step for item in micro]
    assert len(stream.made) == 6


def test_iterating_again_starts_again():
    source = MicroBatches(examples(7), seed=1, global_batch_size=2, micro_batch_size=2, rank=0, world_size=1)
    assert list(islice(source, 5)) == list(islice(source, 5))


@pytest.mark.parametrize(
    ("batch", "world", "micro", "fix"),
    [(6, 2, 2, "use 4 or 8."), (3, 4, 1, "use 4, or a smaller micro_batch_size."), (0, 1, 1, "use 1, or a smaller")],
)
def test_a_global_batch_that_cannot_be_shared(batch, world, micro, fix):
    with pytest.raises(ConfigError, match=rf"^train\.global_batch_size={batch}: .*; {fix}") as caught:
        check_divides(batch, world, micro)
    assert str(caught.value).count("\n") == 0
    with pytest.raises(ConfigError, match="global_batch_size"):
        MicroBatches(examples(9), seed=0, global_batch_size=batch, micro_batch_size=micro, rank=0, world_size=world)


def test_share_refuses_a_batch_that_does_not_divide():
    with pytest.raises(ConfigError, match=r"^train\.global_batch_size=3: "):
        share([1, 2, 3], 0, 2, 1)


def test_no_examples():
    options = {"seed": 0, "global_batch_size": 2, "micro_batch_size": 1, "rank": 0, "world_size": 1}
    with pytest.raises(ConfigError, match=r"^data\.name=0: there are no examples"):
        MicroBatches([], **options)
    with pytest.raises(ConfigError, match=r"^data\.streaming=True: the stream has no examples in epoch 0"):
        steps(FakeStream(0), 1, **options)


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=60)


@settings(deadline=None)
@given(lengths=LENGTHS, batch=st.integers(1, 9), seed=SEEDS, k=st.integers(0, 30))
def test_grouped_epochs_are_permutations_that_depend_on_no_past(lengths, batch, seed, k):
    n = len(lengths)
    batches = GlobalBatches(n, batch, seed, np.array(lengths))
    sequence = [index for step in range(-(-3 * n // batch)) for index in batches.indices(step)]
    for epoch in range(3):
        assert sorted(sequence[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert GlobalBatches(n, batch, seed, np.array(lengths)).indices(k) == batches.indices(k)


def test_batches_of_one_length_are_made_in_every_epoch():
    """Of 4 lengths, 25 of each; an epoch begins in the middle of a batch of 8."""
    lengths = np.repeat([10, 20, 30, 40], 25)
    batches = GlobalBatches(100, 8, 3, lengths)
    found = [set(lengths[batches.indices(k)]) for k in range(50)]  # four epochs
    whole = [k for k in range(50) if 8 * k // 100 == (8 * k + 7) // 100]
    mixed = [k for k in whole if len(found[k]) > 1]
    assert len(mixed) <= 4 * 4  # where a length ends within a batch, and the end of an epoch
    firsts = [min(found[k]) for k in whole]
    assert firsts != sorted(firsts), "batches come in a random order"


def test_grouping_leaves_less_padding_on_any_number_of_ranks():
    generator = np.random.default_rng(0)
    train = Examples({"input_ids": [i] * int(m), "labels": [0]} for i, m in enumerate(generator.integers(1, 200, 400)))
    assert train.lengths().tolist() == [len(example["input_ids"]) for example in train]

    def padding(by_length: bool, world: int, micro: int) -> tuple[int, list[set[int]]]:
        wasted, seen = 0, [set() for _ in range(20)]
        options = {"seed": 1, "global_batch_size": 16, "micro_batch_size": micro, "world_size": world}
        for rank in range(world):
            source = MicroBatches(train, rank=rank, by_length=by_length, **options)
            for step, parts in enumerate(islice(source, 20)):
                for part in parts:
                    sizes = [len(example["input_ids"]) for example in part]
                    wasted += max(sizes) * len(sizes) - sum(sizes)
                    seen[step] |= {example["input_ids"][0] for example in part}
        return wasted, seen

    grouped, of_two = padding(True, 2, 4)
    assert grouped < padding(False, 2, 4)[0] / 5
    assert of_two == padding(True, 1, 16)[1] == padding(True, 4, 2)[1]
