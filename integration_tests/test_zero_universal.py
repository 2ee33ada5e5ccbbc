"""Universal checkpoints of DeepSpeed: from a GRASS engine, by ``ds_to_universal``, into engines on other ranks."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import deepspeed
import pytest
import torch

import grass_dist
from grass_dist.backends.zero.saved_state import GRASS_KEY
from grass_dist.checkpoint.universal_files import to_universal
from integration_tests.support.model import ADAMW, decay_groups, global_batch, schedule, small_llama
from integration_tests.support.ranks import refused, run_ranks
from integration_tests.support.resume import BATCH, Setting, leg
from integration_tests.support.zero import ds_config, full, make_engine, train_step
from integration_tests.test_zero import SETTINGS, weights_of

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

SAVED_AT, STEPS = 7, 13
"""Saved in the middle of an interval, when some layers have never trained and measurements wait for the refresh."""
UNIVERSAL = {"checkpoint": {"load_universal": True}}


def saved(
    rank: int,
    world_size: int,
    stage: int,
    folder: str,
    dtype: torch.dtype,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    engine = make_engine(ds_config(stage, SETTINGS, 1, dtype, **more), dtype)
    for step in range(STEPS):
        if step == SAVED_AT:
            engine.save_checkpoint(folder, tag="there", client_state={"mine": step})
            assert engine.grass.never_trained and engine.grass.state_dict()["measured"]["rows"]
        train_step(engine, step, rank, world_size, 1)
    return {"weights": weights_of(engine), "importances": engine.grass.importances}


def gone_on(
    rank: int,
    world_size: int,
    stage: int,
    folder: str,
    dtype: torch.dtype,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    engine = make_engine(ds_config(stage, SETTINGS, 1, dtype, **UNIVERSAL, **more), dtype)
    train_step(engine, 0, rank, world_size, 1)  # what is loaded replaces what there is
    path, client = engine.load_checkpoint(folder)
    assert path and client["mine"] == SAVED_AT == engine.global_steps == engine.grass.step
    steps = {round(own.state["step"].item()) for own in engine.optimizer.states.of.values() if "step" in own.state}
    for step in range(SAVED_AT, STEPS):
        train_step(engine, step, rank, world_size, 1)
    return {"weights": weights_of(engine), "importances": engine.grass.importances, "steps": steps}


def other_run(rank: int, world_size: int, stage: int, folder: str) -> str:
    engine = make_engine(ds_config(stage, {**SETTINGS, "temperature": 0.9}, 1, **UNIVERSAL))
    before = copy.deepcopy(weights_of(engine))
    told = refused(lambda: engine.load_checkpoint(folder))
    assert all(torch.equal(p, before[n]) for n, p in weights_of(engine).items())
    return told


def incomplete(rank: int, world_size: int, stage: int, folder: str) -> str:
    engine = make_engine(ds_config(stage, SETTINGS, 1, **UNIVERSAL))
    before = copy.deepcopy(weights_of(engine))
    told = refused(lambda: engine.load_checkpoint(folder))
    assert all(torch.equal(p, before[n]) for n, p in weights_of(engine).items())
    return told


def in_stock(rank: int, world_size: int, stage: int, folder: str) -> dict[str, Any]:
    """A stock engine: weights as they were saved, and a step."""
    model = small_llama()
    optimizer = torch.optim.AdamW(decay_groups(model), **ADAMW)
    config = ds_config(stage, None, 1, zero_allow_untested_optimizer=True, **UNIVERSAL)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.load_checkpoint(folder)
    loaded = {n: full(p) for n, p in engine.module.named_parameters()}
    train_step(engine, SAVED_AT, rank, world_size, 1)
    return {"weights": loaded}


def from_stock(rank: int, world_size: int, stage: int, folder: str) -> dict[str, Any]:
    """A checkpoint of full fine-tuning, whose moments a GRASS engine takes over: all layers train as they would."""
    model = small_llama()
    optimizer = torch.optim.AdamW(decay_groups(model), **ADAMW)
    config = ds_config(stage, None, 1, zero_allow_untested_optimizer=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(6):
        if step == 3:
            engine.save_checkpoint(folder, tag="there")
        train_step(engine, step, rank, world_size, 1)
    return {"weights": {n: full(p) for n, p in engine.module.named_parameters()}}


def on_from_stock(rank: int, world_size: int, stage: int, folder: str) -> dict[str, Any]:
    settings = {"active_layers": 8, "probe_steps": 0, "sampling_interval": 2, "update_interval": 2}
    model = small_llama()
    optimizer = torch.optim.AdamW(decay_groups(model), **ADAMW)
    engine, *_ = grass_dist.initialize(
        model=model, optimizer=optimizer, config=ds_config(stage, settings, 1, **UNIVERSAL)
    )
    engine.load_checkpoint(folder)
    for step in range(3, 6):
        train_step(engine, step, rank, world_size, 1)
    return {"weights": weights_of(engine)}


def converted(folder: Path) -> None:
    """Runs DeepSpeed's tool as a user does, without a flag."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(folder / "there"), "--output_folder", str(folder / "universal")]
    ran = subprocess.run(
        command, env={**os.environ, "DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 0, ran.stderr[-2000:]


def worst(runs: list[dict[str, Any]], to: dict[str, Any]) -> float:
    return max((run["weights"][n] - p).abs().max().item() for run in runs for n, p in to["weights"].items())


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_universal_checkpoint_goes_on_anywhere(stage, dtype, tmp_path):
    straight = run_ranks(2, saved, stage, str(tmp_path), dtype, timeout=200)
    converted(tmp_path)
    common = torch.load(tmp_path / "universal/zero/optimizer_state.pt", weights_only=False)
    assert common[GRASS_KEY]["step"] == SAVED_AT
    for ranks in (2, 4, 1):
        runs = run_ranks(ranks, gone_on, stage, str(tmp_path), dtype, timeout=200)
        assert len(runs[0]["steps"]) > 1, "each layer has its own step"
        assert runs[0]["importances"] == pytest.approx(straight[0]["importances"], rel=1e-9 if ranks == 2 else 2e-2)
        far = worst(runs, straight[0])
        print(f"ZeRO-{stage}, {dtype}: 2 to {ranks} ranks, {far:.1e}")
        assert far == 0 if ranks == 2 else far <= (5e-6 if dtype == torch.float32 else 5e-3)
    if dtype == torch.float32:
        told = run_ranks(2, other_run, stage, str(tmp_path), timeout=200)
        assert all("temperature" in text for text in told)
        (tmp_path / "universal/zero/lm_head.weight/exp_avg.pt").rename(tmp_path / "away.pt")
        lacking = run_ranks(2, incomplete, stage, str(tmp_path), timeout=200)
        assert all("lm_head.weight/exp_avg.pt is missing" in text for text in lacking)
        (tmp_path / "away.pt").rename(tmp_path / "universal/zero/lm_head.weight/exp_avg.pt")
    if dtype == torch.float32 and stage == 3:  # stock stages 1 and 2 demand that all layers have taken as many steps
        stock = run_ranks(2, in_stock, stage, str(tmp_path), timeout=200)
        name = "model.layers.0.mlp.up_proj.weight"
        file = torch.load(tmp_path / "universal/zero" / name / "fp32.pt", weights_only=False)
        assert torch.equal(stock[0]["weights"][name].view(-1), file.view(-1))


@pytest.mark.parametrize("stage", [1, 3])
def test_states_in_bf16_go_on_from_a_universal_checkpoint(stage, tmp_path):
    """Files with the name "fp32" then hold masters in bf16; another engine may have wider ones."""
    states = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
    straight = run_ranks(2, saved, stage, str(tmp_path), torch.bfloat16, states, timeout=200)
    converted(tmp_path)
    for ranks, more in ((2, states), (1, states), (2, {})):
        runs = run_ranks(ranks, gone_on, stage, str(tmp_path), torch.bfloat16, more, timeout=200)
        far = worst(runs, straight[0])
        print(f"ZeRO-{stage}, states in bf16: 2 to {ranks} ranks{'' if more else ', states in fp32'}, {far:.1e}")
        assert far == 0 if (ranks, more) == (2, states) else far <= 1e-2  # a few roundings to bf16


@pytest.mark.parametrize("stage", [2, 3])
def test_full_fine_tuning_goes_on_with_its_moments(stage, tmp_path):
    straight = run_ranks(2, from_stock, stage, str(tmp_path), timeout=200)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(tmp_path / "there"), "--output_folder", str(tmp_path / "universal")]
    subprocess.run(command, env={**os.environ, "DS_ACCELERATOR": "cpu"}, check=True, capture_output=True, timeout=200)
    runs = run_ranks(2, on_from_stock, stage, str(tmp_path), timeout=200)
    assert worst(runs, straight[0]) <= 1e-6


def on_from_fsdp2(rank: int, world_size: int, stage: int, folder: str, dtype: torch.dtype) -> dict[str, Any]:
    """Goes on with what `leg` has saved, with the batches and rates of its loop."""
    model = small_llama(dtype)
    optimizer = torch.optim.AdamW(decay_groups(model), **ADAMW)
    engine, *_ = grass_dist.initialize(
        model=model, optimizer=optimizer, config=ds_config(stage, SETTINGS, 1, dtype, **UNIVERSAL)
    )
    path, _ = engine.load_checkpoint(folder)
    assert path and engine.global_steps == engine.grass.step == SAVED_AT
    trained = [own.group.unit.name for own in engine.optimizer.states.of.values() if own.state]
    active, per = [], BATCH // world_size
    for step in range(SAVED_AT, STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * schedule(step)
        active.append(engine.grass.active_layers)
        mine = global_batch(step, BATCH)[rank * per :][:per]
        engine.backward(engine(input_ids=mine, labels=mine).loss)
        engine.step()
    return {"weights": weights_of(engine), "active": active, "trained": trained}


def without_schedule(rank: int, world_size: int, folder: str) -> str:
    engine = make_engine(ds_config(2, SETTINGS, 1, **UNIVERSAL))  # which has a scheduler
    return refused(lambda: engine.load_checkpoint(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_loop_under_zero_goes_on_from_fsdp2(dtype, tmp_path):
    grass = {**SETTINGS, "probe_steps": 2}
    setting = Setting("fsdp2", grass, dtype, background=False)
    straight = run_ranks(2, leg, setting, None, STEPS, SAVED_AT, str(tmp_path / "dcp"), timeout=200)
    made = to_universal(tmp_path / "dcp" / f"step-{SAVED_AT:06d}", tmp_path / "universal")
    assert made == tmp_path / "universal" / f"step-{SAVED_AT:06d}"
    for stage, ranks in ((1, 2), (2, 3), (3, 2), (3, 4)):
        runs = run_ranks(ranks, on_from_fsdp2, stage, str(tmp_path / "universal"), dtype, timeout=200)
        assert runs[0]["active"] == straight[0]["active"][SAVED_AT:]
        assert runs[0]["trained"] and len(set(runs[0]["trained"])) < 9, "layers that never trained have no state"
        far = max((runs[0]["weights"][n] - p).abs().max().item() for n, p in straight[0]["params"].items())
        print(f"FSDP2 to ZeRO-{stage} on {ranks} ranks, {dtype}: {far:.1e}")
        assert far <= (5e-6 if dtype == torch.float32 else 5e-3)
    told = run_ranks(2, without_schedule, str(tmp_path / "universal"), timeout=200)
    assert all("load_lr_scheduler_states=False" in text for text in told)
