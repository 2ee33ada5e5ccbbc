"""Trainings with states that move, run by spawned ranks: weights, masters and moments as with states that stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import grass_dist
from integration_tests.model import (
    ADAMW,
    CLIP,
    GLOBAL_BATCH,
    decay_groups,
    global_batch,
    schedule,
    small_llama,
    wrapped,
)
from integration_tests.training import full, local

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


def model_of(dtype: torch.dtype, uneven: bool) -> nn.Module:
    model = small_llama(torch.float32)
    if uneven:
        for i, layer in enumerate(model.model.layers):
            wide = 32 * (2 + i % 3)
            layer.mlp.gate_proj, layer.mlp.up_proj = nn.Linear(64, wide, bias=False), nn.Linear(64, wide, bias=False)
            layer.mlp.down_proj = nn.Linear(wide, 64, bias=False)
    return model.to(dtype)


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
    from integration_tests.zero import ds_config, make_engine, train_step
    from integration_tests.zero import full as gathered

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
    told["roles"] = sum(t.nbytes for unit in units[layers:] for own in unit.groups for t in own.tensors())
    told["layers"] = [sum(t.nbytes for own in unit.groups for t in own.tensors()) for unit in units[:layers]]
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
