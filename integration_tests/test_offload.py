"""States that come and go: the same run to the bit on every backend, and no more memory than is said.

The bytes that move are counted exactly by the soak (`soak_trainings.Account`), which test_soak.py runs in short.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

import grass_dist
from integration_tests.support.model import (
    ADAMW,
    CLIP,
    GLOBAL_BATCH,
    decay_groups,
    global_batch,
    model_of,
    schedule,
    wrapped,
)
from integration_tests.support.ranks import run_ranks
from integration_tests.support.training import full, local

pytestmark = pytest.mark.timeout(400)

STEPS = 50
BASE = {
    **{"active_layers": 3, "probe_steps": 2, "sampling_interval": 4, "update_interval": 6, "seed": 7},
    "temperature": 2.0,
}
CASES: dict[str, dict[str, Any]] = {
    "three layers": {},
    "one layer": {"active_layers": 1, "sampling_interval": 2},
    "all layers": {"active_layers": 8},
    "six of eight": {"active_layers": 6, "sampling_interval": 3, "draw_ahead": 0},
    "layers of unequal sizes": {"uneven": True},
    "bf16": {"dtype": torch.bfloat16},
}
MODES: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "interval": {"mode": "interval", "prefetch_steps": 2, "chaos": 1},
    "stream": {"mode": "stream", "slots": 2, "chaos": 2},
}
EARLY: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "interval": {"mode": "interval", "update_in_backward": True, "chaos": 3},
    "stream": {"mode": "stream", "slots": 2, "update_in_backward": True, "chaos": 4},
}
"""Without clipping."""


def train_torch(
    rank: int,
    world_size: int,
    backend: str,
    offload: dict,
    *,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float32,
    uneven: bool = False,
    clips: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """A training under FSDP2, HSDP or DDP."""
    model = wrapped(model_of(dtype, uneven), backend, world_size, torch.float32 if dtype != torch.float32 else None)
    config = grass_dist.GrassConfig(**{**BASE, **settings, "offload": offload})
    optimizer = grass_dist.GrassOptimizer(
        model, torch.optim.AdamW, ADAMW, config=config, params=decay_groups(model), gradient_accumulation_steps=2
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    per = GLOBAL_BATCH // world_size // 2

    def step(number: int) -> None:
        for micro in range(2):
            x = global_batch(number)[(micro * world_size + rank) * per :][:per]
            (model(input_ids=x, labels=x).loss / 2).backward()
        if clips:
            optimizer.clip_grad_norm_(CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    moving = optimizer._states if offload["mode"] != "none" else None
    told = _run(steps, step, optimizer.grass, lambda: (optimizer.state_bytes, optimizer.host_state_bytes), moving)
    state = optimizer.state_dict()["state"]
    told["states"] = {f"{i}/{k}": local(v).clone() for i, own in state.items() for k, v in own.items() if tensor(v)}
    told["weights"] = {name: full(param).clone() for name, param in model.named_parameters()}
    told["roles"] = sum(own.nbytes for own in optimizer._role_optimizers)
    told["layers"] = [own.nbytes for own in optimizer._layer_optimizers]
    return told


def train_zero(
    rank: int,
    world_size: int,
    backend: str,
    offload: dict,
    *,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float32,
    uneven: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """A training under ZeRO-1, 2 or 3."""
    from integration_tests.support.zero import ds_config, make_engine, train_step
    from integration_tests.support.zero import full as gathered

    config = ds_config(int(backend.removeprefix("zero")), {**BASE, **settings, "offload": offload}, 1, dtype)
    engine = make_engine(config, dtype, model_of(dtype, uneven))
    states = engine.optimizer.states
    told = _run(
        steps,
        lambda number: train_step(engine, number, rank, world_size, 1),
        engine.grass,
        lambda: (states.device_bytes, states.host_bytes),
        states.mode if offload["mode"] != "none" else None,
    )
    states.settle()
    told["states"] = {
        f"{key}/{name}": value.detach().clone()
        for key, own in states.of.items()
        for name, value in {**own.state, "master": own.master}.items()
        if tensor(value)
    }
    told["weights"] = {name: gathered(param) for name, param in engine.module.named_parameters()}
    units = states._units
    layers = len(engine.grass.layers)
    told["roles"] = sum(unit.nbytes for unit in units[layers:])
    told["layers"] = [unit.nbytes for unit in units[:layers]]
    engine.destroy()
    return told


def _run(
    steps: int, step: Callable[[int], Any], grass: Any, count: Callable[[], tuple[int, int]], moving: Any
) -> dict[str, Any]:
    told: dict[str, Any] = {"active": [], "bytes": [], "slots": set()}
    for number in range(steps):
        told["active"].append(grass.active_layers if grass.phase == "train" else ())
        step(number)
        told["bytes"].append(count())
        places = moving._places if moving is not None else ()
        told["slots"] |= {place.slot.flat.data_ptr() for place in places if place.slot is not None}
    return told


def tensor(value: Any) -> bool:
    return torch.is_tensor(value)


def train(rank: int, world_size: int, backend: str, offload: dict, **case: Any) -> dict[str, Any]:
    run = train_zero if backend.startswith("zero") else train_torch
    return run(rank, world_size, backend, offload, **case)


def every_mode(rank: int, world_size: int, backend: str, cases: list[str]) -> dict[str, Any]:
    """Each case in each mode: what differs from the mode "none", and what was counted."""
    told = {}
    for case in cases:
        steps = STEPS if case == "three layers" else 22
        told[case] = _compared(rank, world_size, backend, MODES, steps=steps, **CASES[case])
    if not backend.startswith("zero"):
        told["early"] = _compared(rank, world_size, backend, EARLY, clips=False, steps=22)
    return told


def _compared(rank: int, world_size: int, backend: str, modes: dict[str, dict], **case: Any) -> dict[str, Any]:
    runs = {name: train(rank, world_size, backend, offload, **case) for name, offload in modes.items()}
    first = runs["none"]
    for run in runs.values():
        for kind in ("weights", "states"):
            mine, theirs = run[kind], first[kind]
            same = mine.keys() == theirs.keys()
            run[f"differing {kind}"] = [n for n in mine if not (same and torch.equal(mine[n], theirs[n]))]
    for run in runs.values():
        del run["weights"], run["states"]
    return runs


QUICK = [(2, "fsdp2")]
MORE = [(2, "ddp"), (2, "zero2"), (2, "zero3")]
LONG = [(2, "zero1"), (4, "ddp"), (4, "zero2"), (4, "hsdp"), (4, "zero3")]
BACKENDS = [
    *QUICK,
    *(pytest.param(p, marks=pytest.mark.integration) for p in MORE),
    *(pytest.param(p, marks=pytest.mark.long) for p in LONG),
]


def named(backend: tuple[int, str]) -> str:
    return f"{backend[1]} on {backend[0]}"


FEWER = ["three layers", "layers of unequal sizes"]


@pytest.fixture(scope="module", params=BACKENDS, ids=named)
def told(request):
    world_size, backend = request.param
    cases = (
        ["three layers"]
        if world_size == 4
        else list(CASES)
        if backend == "fsdp2"
        else [*FEWER, *(["bf16"] if backend == "zero2" else [])]
    )
    return backend, run_ranks(world_size, every_mode, backend, cases, timeout=380)


def runs_of(told):
    _, ranks = told
    for rank in ranks:
        for case, modes in rank.items():
            for mode, run in modes.items():
                yield f"{case}, {mode}", case, mode, run


def test_the_same_to_the_bit(told):
    for name, _, _, run in runs_of(told):
        assert run["differing weights"] == [] and run["differing states"] == [], name


def test_the_runs_test_something(told):
    _, ranks = told
    for case, modes in ranks[0].items():
        active = [layers for layers in modes["none"]["active"] if layers]
        assert all(run["active"] == modes["none"]["active"] for run in modes.values())
        switches = sum(a != b for a, b in pairwise(active))
        if case != "all layers":
            assert switches >= (8 if case == "three layers" else 4), case
            gone, back = set(), set()
            for before, layers in pairwise(active):
                back |= gone & set(layers)
                gone |= set(before) - set(layers)
            assert back, case
            assert any(set(a) & set(b) and a != b for a, b in pairwise(active)) or case == "one layer"


def test_no_more_memory_than_is_said(told):
    for name, case, mode, run in runs_of(told):
        if mode == "none":
            continue
        longest, roles = longest_slot(run), run["roles"]
        gamma = CASES.get(case, {}).get("active_layers", BASE["active_layers"])
        slots = min(2, gamma) if mode == "stream" else gamma
        for step, (device, host) in enumerate(run["bytes"]):
            landing = mode == "interval" and slots < 8
            assert device <= (slots + landing) * longest + roles, (name, step)
            assert host <= sum(run["layers"]) * 1.1, (name, step)
        assert run["bytes"][-1][0] >= slots * min(run["layers"])


def longest_slot(run) -> float:
    """A slot: the longest state, and what ZeRO's padding may take."""
    return max(run["layers"]) * 1.15


def test_each_rank_keeps_its_part(told):
    backend, ranks = told
    shards = {"hsdp": 2}.get(backend, len(ranks))
    totals = [sum(rank["three layers"]["stream"]["layers"]) for rank in ranks]
    one = 8 * 8 * 36_992  # bytes of exp_avg and exp_avg_sq of eight layers in fp32
    whole = one * (1.5 if backend in ("zero1", "zero2") else 1)
    born = sum(n > 0 for n in ranks[0]["three layers"]["stream"]["layers"]) / 8
    for total in totals:
        assert total == pytest.approx(whole * born / shards, rel=0.1)


def test_slots_are_made_once(told):
    for name, case, mode, run in runs_of(told):
        if mode == "none":
            continue
        gamma = CASES.get(case, {}).get("active_layers", BASE["active_layers"])
        slots = min(2, gamma) if mode == "stream" else min(gamma + 1, 8)
        assert 0 < len(run["slots"]) <= slots, name
