"""ZeRO with states that move, run by spawned ranks: the same weights, masters and moments in every mode."""

from __future__ import annotations

from typing import Any

import torch

from integration_tests.zero import ds_config, full, make_engine, train_step

SETTINGS = {
    **{"active_layers": 3, "probe_steps": 2, "sampling_interval": 4, "update_interval": 6, "seed": 7},
    "temperature": 2.0,
}
MODES: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "interval": {"mode": "interval"},
    "interval, chaos": {"mode": "interval", "prefetch_steps": 2, "chaos": 1},
    "stream": {"mode": "stream", "slots": 2},
    "stream, chaos": {"mode": "stream", "slots": 2, "chaos": 2},
}


def trained(rank: int, world_size: int, stage: int, offload: dict, dtype: torch.dtype, steps: int, **more: Any) -> dict:
    """What a run leaves: weights, and this rank's states of all groups; bytes at each step."""
    engine = make_engine(ds_config(stage, {**SETTINGS, **more, "offload": offload}, 1, dtype), dtype)
    states, grass = engine.optimizer.states, engine.grass
    device, host, active = [], [], []
    for step in range(steps):
        active.append(grass.active_layers)
        train_step(engine, step, rank, world_size, 1)
        device.append(states.device_bytes)
        host.append(states.host_bytes)
    states.settle()
    kept = {
        f"{key}/{name}": value.detach().clone()
        for key, own in states.of.items()
        for name, value in {**own.state, "master": own.master}.items()
        if torch.is_tensor(value)
    }
    weights = {name: full(param) for name, param in engine.module.named_parameters()}
    traffic = grass.traffic
    engine.destroy()
    return {"weights": weights, "states": kept, "device": device, "host": host, "active": active, "traffic": traffic}


def every_mode(rank: int, world_size: int, stage: int, steps: int) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        runs = {name: trained(rank, world_size, stage, own, dtype, steps) for name, own in MODES.items()}
        first = runs["none"]
        told[str(dtype)] = {
            name: {
                "weights": [n for n, w in run["weights"].items() if not torch.equal(w, first["weights"][n])],
                "states": [n for n, t in run["states"].items() if not torch.equal(t, first["states"].get(n, t + 1))],
                "missing": sorted(set(first["states"]) ^ set(run["states"])),
                "device": run["device"],
                "host": run["host"],
                "active": run["active"],
                "traffic": run["traffic"],
            }
            for name, run in runs.items()
        }
    return told
