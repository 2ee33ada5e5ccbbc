"""The parts of parameters that the ranks of DDP update, and the states of parts that are not a rank's own."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel

from grass_dist import GrassConfig, GrassOptimizer, UnsupportedModel
from grass_dist.backends.ddp import DdpSharding, chunk, pack, part_of, unpack
from grass_dist.model.discovery import find_layers
from grass_dist.ranks import Ranks
from tests.tiny import take_steps, tiny

RANKS = st.integers(1, 9)
SHAPES = st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=1, max_size=5)
CONFIG = GrassConfig(active_layers=3, probe_steps=0, sampling_interval=2, update_interval=2)


@given(st.integers(0, 200), st.integers(0, 3), RANKS)
def test_parts_are_those_of_a_dtensor_by_rows(rows, columns, ranks):
    tensor = torch.arange(rows * columns).view(rows, columns)
    parts = [part_of(tensor, rank, ranks) for rank in range(ranks)]
    assert torch.equal(torch.cat(parts), tensor)
    expected = [len(part) for part in tensor.chunk(ranks)] if rows else [0]
    sizes = [len(part) for part in parts]
    assert sizes == expected + [0] * (ranks - len(expected)) and sizes[0] == chunk(tensor.shape, ranks)


def owners(shape, ranks):
    """The number of the rank that updates each entry, from 0."""
    if not shape:
        return torch.zeros(())
    rows = torch.arange(shape[0]) // max(1, chunk(torch.Size(shape), ranks))
    return rows.view(-1, *[1] * (len(shape) - 1)).expand(shape).float()


@given(st.lists(st.integers(1, 5), max_size=3), RANKS)
def test_a_part_is_memory_of_the_tensor(shape, ranks):
    tensor = torch.zeros(shape)
    for rank in range(ranks):
        part_of(tensor, rank, ranks).fill_(rank if shape else 0)
    assert torch.equal(tensor, owners(shape, ranks))


@given(SHAPES, RANKS, st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_each_rank_has_updated_is_everywhere_afterwards(shapes, ranks, dtype):
    copies = [[torch.full(shape, -1.0, dtype=dtype) for shape in shapes] for _ in range(ranks)]
    for rank, params in enumerate(copies):
        for param in params:
            part_of(param, rank, ranks).fill_(rank if param.ndim else 0)
    packed = [pack(params, rank, ranks) for rank, params in enumerate(copies)]
    assert len({part.numel() for part in packed}) == 1
    for params in copies:
        unpack(params, torch.cat(packed), ranks)
        for param in params:
            assert torch.equal(param, owners(param.shape, ranks).to(dtype))


@pytest.fixture
def ddp():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DistributedDataParallel
    dist.destroy_process_group()


def test_one_rank_divides_nothing(ddp):
    model = ddp(tiny())
    optimizer = GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=CONFIG)
    take_steps(model, optimizer, range(3))
    tensor = torch.zeros(4, 3)
    assert optimizer.grass.backend.sharding.state_shard(tensor) is tensor
    state = optimizer.state_dict()["state"]
    params = optimizer.param_groups[0]["params"]
    assert state and all(s["exp_avg"].shape == params[i].shape for i, s in state.items())


class TwoRanks(Ranks):
    """As if it were rank 1 of 2."""

    world_size, rank = 2, 1


def test_a_parameter_that_is_not_contiguous_is_refused_by_name():
    model = tiny()
    model.layers[1].up.weight = torch.nn.Parameter(torch.zeros(8, 16).t())
    with pytest.raises(UnsupportedModel, match=r"^1 parameters are not contiguous .*layers\.1\.up\.weight.*False\.$"):
        DdpSharding(TwoRanks()).divide_states(find_layers(model).layers)


def trained(steps=3):
    model = tiny()
    optimizer = GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=CONFIG)
    take_steps(model, optimizer, range(steps))
    return model, optimizer


def changed(state, change):
    return {**state, "state": {i: change(dict(entry)) for i, entry in state["state"].items()}}


def test_a_state_of_another_shape_is_refused():
    def halved(entry):
        return {k: v if v.ndim == 0 else v.flatten()[: v.numel() // 2] for k, v in entry.items()}

    saved = changed(trained()[1].state_dict(), halved)
    with pytest.raises(
        ValueError, match=r"^The saved exp_avg of layers\.0\.norm\.weight is of shape \(4,\) where the par"
    ):
        trained(0)[1].load_state_dict(saved)
