"""A switch under ZeRO constructs, and does nothing else: no wait, no garbage collection, no collective of weights."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist

from integration_tests.support.scenarios import Spawn, scenarios
from integration_tests.support.zero import ds_config, make_engine, train_step

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]

SWITCHES, CYCLE = 100, 4
GRASS = {"active_layers": 2, "probe_steps": 0, "sampler": "cyclic", "sampling_interval": 1, "draw_ahead": 0}
RANKS = {stage: Spawn(2, before=gc.freeze, timeout=800) for stage in (1, 2, 3)}
FUNCTIONS = {
    "gc": (gc, ("collect",)),
    "accelerator": (type(deepspeed.accelerator.get_accelerator()), ("synchronize", "empty_cache")),
    "dist": (dist, ("barrier", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")),
}


def bytes_alive() -> int:
    """Of all tensors, each memory once."""
    gc.collect()
    found = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor):
            memory = item.untyped_storage()
            found[memory.data_ptr()] = memory.nbytes()
    return sum(found.values())


def many_switches(rank: int, world_size: int, stage: int) -> dict[str, Any]:
    engine = make_engine(ds_config(stage, GRASS, 1, torch.bfloat16), torch.bfloat16)
    called: Counter[str] = Counter()
    zero, alive, switched = engine.optimizer, {}, 0
    construct = type(zero).narrow

    def narrow(self, groups):
        nonlocal switched
        switched += 1
        with pytest.MonkeyPatch.context() as patch:
            for owner, names in FUNCTIONS.values():
                for name in names:
                    watched = _counting(called, name, getattr(owner, name))
                    patch.setattr(owner, name, watched)
            construct(self, groups)

    with mock.patch.object(type(zero), "narrow", narrow):
        for step in range(SWITCHES):
            train_step(engine, step, rank, world_size, 1)
            if step % CYCLE == 0 and step in (5 * CYCLE, SWITCHES - CYCLE):
                alive[step] = bytes_alive()
    engine.destroy()
    return {"called": dict(called), "alive": list(alive.values()), "switches": switched}


def _counting(called: Counter[str], name: str, original: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        called[name] += 1
        return original(*args, **kwargs)

    return call


@scenarios(*(pytest.param(run(many_switches, stage), id=f"stage{stage}") for stage, run in RANKS.items()))
def test_a_hundred_switches_wait_for_nothing_and_leak_nothing(runs):
    for told in runs:
        assert told["switches"] >= SWITCHES - 1 and told["called"] == {}
        first, last = told["alive"]
        assert last == first
