"""Doors: all by which a caller reads masters, moments, gradients and weights of an engine, asked at every moment."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
)

from grass_dist.backends.zero.states import ZeroStates
from grass_dist.states import chaos
from grass_dist.states.moving import MovingStates
from integration_tests.support.ranks import run_ranks
from integration_tests.support.zero import ds_config, full, make_engine, micro_batch

pytestmark = pytest.mark.timeout(420)

MOMENTS = ("exp_avg", "exp_avg_sq")
SETTINGS = {
    "active_layers": 3,
    "sampling_interval": 2,
    "update_interval": 2,
    "probe_steps": 0,
    "draw_ahead": 0,
    "sampler": "uniform",
    "always_active": ["final_norm"],
    "seed": 5,
}
Told = dict[str, Any]
Door = Callable[[Any, str], Told]


def asked(engine) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Two parameters of each layer, and what is outside of them."""
    for name, param in engine.module.named_parameters():
        if "layers" not in name or "up_proj" in name or "input_layernorm" in name:
            yield name, param


def tensors_in(value: Any, path: str = "") -> Told:
    if torch.is_tensor(value):
        return {path: value.detach().clone()}
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in tensors_in(inner, f"{path}.{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, inner in enumerate(value) for k, v in tensors_in(inner, f"{path}.{i}").items()}
    return {}


def masters(engine, _: str) -> Told:
    return {name: safe_get_full_fp32_param(param) for name, param in asked(engine)}


def moments(engine, _: str) -> Told:
    return {f"{n}.{key}": safe_get_full_optimizer_state(p, key) for n, p in asked(engine) for key in MOMENTS}


def local(engine, _: str) -> Told:
    if engine.zero_optimization_stage() < 3:
        return {}
    told = {name: safe_get_local_fp32_param(param) for name, param in asked(engine)}
    return told | {f"{n}.{key}": safe_get_local_optimizer_state(p, key) for n, p in asked(engine) for key in MOMENTS}


def state_dict(engine, _: str) -> Told:
    return tensors_in(engine.optimizer.state_dict())


def base_state(engine, _: str) -> Told:
    return tensors_in(list(engine.optimizer.state.values()))


def checkpoint(engine, folder: str) -> Told:
    engine.save_checkpoint(folder, tag="door")
    [file] = Path(folder, "door").glob(f"*zero_pp_rank_{engine.global_rank}_*optim_states.pt")
    return tensors_in(torch.load(file, weights_only=False)["optimizer_state_dict"])


def weights(engine, _: str) -> Told:
    gathered = {name: full(param) for name, param in asked(engine)}
    return gathered | {f"{n}.grad": p.grad for n, p in asked(engine)} | tensors_in(engine.module.state_dict(), "dict")


DOORS: dict[str, Door] = {
    "masters": masters,
    "moments": moments,
    "local": local,
    "state_dict": state_dict,
    "base_state": base_state,
    "checkpoint": checkpoint,
    "weights": weights,
}


def gradients(engine) -> Told:
    """Between a backward and its step."""
    told = {name: safe_get_full_grad(param) for name, param in asked(engine)}
    if engine.zero_optimization_stage() == 3:
        told |= {f"{name}.local": safe_get_local_grad(param) for name, param in asked(engine)}
    return told


def look(engine, first: str, folder: str) -> dict[str, Told]:
    """What each door shows, with ``first`` opened before the others: those find states that have arrived."""
    return {door: DOORS[door](engine, folder) for door in [first, *(door for door in DOORS if door != first)]}


def train(engine, step: int, rank: int, world_size: int) -> Told:
    x = micro_batch(step, 0, rank, world_size, 1)
    engine.backward(engine(input_ids=x, labels=x).loss)
    told = gradients(engine)
    engine.step()
    return told


def through_all_doors(rank, world_size, stage: int, offload: dict, folder: str, settles: bool = True) -> Told:
    """Everything that is seen: after each step, half of which end an interval, and right after loads."""
    chaos.LONGEST_DELAY, dtype = 0.05, torch.bfloat16
    engine = make_engine(ds_config(stage, {**SETTINGS, "offload": offload}, 1, dtype), dtype)
    told: Told = {}
    for step in range(2 * len(DOORS)):
        told[f"step {step}: gradients"] = train(engine, step, rank, world_size)
        first = list(DOORS)[step // 2]
        moment = "switch" if engine.grass.schedule.switch_due(engine.grass.step) else "rest"
        told[f"step {step} ({moment}): {first}"] = look(engine, first, folder)
        if step == 4:
            engine.save_checkpoint(folder, tag="early")
    for number, first in enumerate(DOORS):
        train(engine, 50 + number, rank, world_size)
        engine.load_checkpoint(folder, tag="early")
        if settles and isinstance(mode := engine.optimizer.states.mode, MovingStates):
            assert all(place.arrived.done() and place.left.done() for place in mode._places)
        told[f"load {number}: {first}"] = look(engine, first, folder)
    engine.destroy()
    return told


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two of what `through_all_doors` gives are not equal to the bit."""
    if isinstance(a, dict):
        odd = [f"{path}: {key}" for key in a.keys() ^ b.keys()]
        return odd + [found for key in a.keys() & b.keys() for found in differences(a[key], b[key], f"{path}/{key}")]
    same = torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else a is b
    return [] if same else [path]


MODES = ({"mode": "interval", "chaos": 7}, {"mode": "stream", "slots": 2, "chaos": 8})


def compare_doors(rank: int, world_size: int, stage: int, folder: str) -> dict[str, Any]:
    """By mode, where chaos shows anything else than states that never move; and what was seen there."""
    gc.freeze()  # DeepSpeed collects whenever it constructs a ZeRO-3 optimizer, a second each time
    at_rest = through_all_doors(rank, world_size, stage, {"mode": "none"}, f"{folder}/none")
    odd = {}
    for offload in MODES:
        mode = offload["mode"]
        odd[mode] = differences(at_rest, through_all_doors(rank, world_size, stage, offload, f"{folder}/{mode}"))
    return {"odd": odd, "seen": _seen(at_rest)}


def _seen(told: Told) -> dict[str, int]:
    """How many values each door has shown."""
    counted = dict.fromkeys((*DOORS, "gradients"), 0)
    for moment, shown in told.items():
        for door, values in ({"gradients": shown} if "gradients" in moment else shown).items():
            counted[door] += sum(value is not None for value in values.values())
    return counted


@pytest.mark.integration
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(3, marks=pytest.mark.long)])
def test_every_door_waits_for_its_own_copies(stage, tmp_path):
    """After steps, switches and loads, with copies that come late: as if no state ever moved, to the bit."""
    for told in run_ranks(2, compare_doors, stage, str(tmp_path), timeout=400):
        assert told["odd"] == {"interval": [], "stream": []}
        assert {door for door, values in told["seen"].items() if values < 50} <= ({"local"} if stage < 3 else set())
        assert told["seen"].keys() == {*DOORS, "gradients"}


def without_waits(rank: int, world_size: int, stage: int, folder: str) -> dict[str, set[str]]:
    """The doors that show something else once a wait is missing, by that wait."""
    at_rest = through_all_doors(rank, world_size, stage, {"mode": "none"}, f"{folder}/none")
    told = {}
    for name, missing in (("at_hand", lambda self, own: nullcontext()), ("settle", lambda self: None)):
        with mock.patch.object(ZeroStates, name, missing):
            odd = differences(at_rest, through_all_doors(rank, world_size, stage, MODES[0], f"{folder}/{name}", False))
        told[name] = {path.split("/")[2] for path in odd if "gradients" not in path}
    return told


@pytest.mark.integration
def test_the_doors_show_a_missing_wait(tmp_path):
    for told in run_ranks(2, without_waits, 2, str(tmp_path), timeout=300):
        assert told["at_hand"] >= {"masters", "moments"} and told["settle"] & {"state_dict", "base_state", "checkpoint"}
