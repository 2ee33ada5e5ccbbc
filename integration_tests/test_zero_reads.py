"""What DeepSpeed's public functions give and take under GRASS, beside stock ZeRO; and the end of an engine."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from grass_dist.backends.zero.groups import partition_numel
from grass_dist.deepspeed import initialize
from integration_tests.support.model import ADAMW, LAYERS, small_llama
from integration_tests.support.ranks import refused
from integration_tests.support.scenarios import FOLDER, Spawn, scenarios
from integration_tests.support.zero import ds_config, full, local, make_engine, micro_batch, train_step

pytestmark = [pytest.mark.timeout(420), pytest.mark.integration]

ALL = {"active_layers": LAYERS, "probe_steps": 0, "sampler": "uniform", "draw_ahead": 0}
ONE = {"active_layers": 1, "probe_steps": 0, "sampler": "cyclic", "sampling_interval": 2, "draw_ahead": 0}
FREE = {"gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}
# DeepSpeed collects whenever it constructs a ZeRO-3 optimizer, a second each time if what is there is not frozen.
RANKS = {stage: Spawn(2, before=gc.freeze, timeout=400) for stage in (1, 2, 3)}


def at_each(function: Callable[..., Any], *args: Any, stages: tuple[int, ...] = (1, 2, 3)) -> list[Any]:
    """Scenarios of two ranks, whose function is given the stage after rank and world size."""
    later = {1: pytest.mark.long}  # which is as stage 2
    given = {stage: RANKS[stage](function, stage, *args) for stage in stages}
    return [pytest.param(run, id=f"stage{stage}", marks=later.get(stage, ())) for stage, run in given.items()]


def named(engine) -> dict[str, torch.nn.Parameter]:
    return dict(engine.module.named_parameters())


def weights_of(engine) -> dict[str, torch.Tensor]:
    return {name: full(param) for name, param in named(engine).items()}


def beside_stock(rank, world_size, stage, settings, dtype) -> list:
    """All that can be read and set, with every layer training: what stock ZeRO gives at the same moments."""
    model = small_llama(dtype)
    begin = deepspeed.initialize if settings is None else initialize
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)  # stock ZeRO-2 shows moments of its first group alone
    engine, *_ = begin(model=model, optimizer=optimizer, config=ds_config(stage, settings, 1, dtype, **FREE))
    told = []
    for step in range(3):
        if step == 2:
            for number, (name, param) in enumerate(named(engine).items()):
                if "up_proj" not in name and "norm" not in name:
                    continue
                value = torch.full_like(full(param), 0.25 + number / 100)
                safe_set_full_fp32_param(param, value)
                safe_set_full_optimizer_state(param, value, "exp_avg_sq")
                if stage == 3:
                    mine = torch.full_like(safe_get_local_fp32_param(param), number / 50)
                    safe_set_local_fp32_param(param, mine)
                    safe_set_local_optimizer_state(param, mine, "exp_avg")
        x = micro_batch(step, 0, rank, world_size, 1)
        engine.backward(engine(input_ids=x, labels=x).loss)
        for name, param in named(engine).items():
            if "down_proj" in name:
                told.append(safe_get_full_grad(param))
                safe_set_full_grad(param, torch.full_like(told[-1], 0.125))
                told.append(safe_get_full_grad(param))
        engine.step()
        for param in named(engine).values():
            told.append(safe_get_full_fp32_param(param))
            told += [safe_get_full_optimizer_state(param, key) for key in ("exp_avg", "exp_avg_sq")]
            if stage == 3:
                shards = (safe_get_local_fp32_param(param), safe_get_local_optimizer_state(param, "exp_avg"))
                told += [shard.clone() for shard in shards]  # stock gives views
        told += weights_of(engine).values()
    engine.destroy()
    return told


def compare_stock(rank: int, world_size: int, stage: int) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        stock = beside_stock(rank, world_size, stage, None, dtype)
        for mode in ("interval", "stream"):
            ours = beside_stock(rank, world_size, stage, {**ALL, "offload": {"mode": mode, "slots": 2}}, dtype)
            assert len(ours) == len(stock) > 200 and all(value is not None for value in ours)
            odd = [i for i, (a, b) in enumerate(zip(ours, stock, strict=True)) if not torch.equal(a, b)]
            assert not odd, (stage, dtype, mode, odd)


@scenarios(*at_each(compare_stock))
def test_all_layers_give_and_take_what_stock_zero_does(runs):
    assert runs == [None, None]


def set_at_rest(rank: int, world_size: int, stage: int, folder: str) -> dict[str, str]:
    """A value that is set while a layer rests is what it trains from; in each mode, with and without a master."""
    told: dict[str, str] = {}
    cases = [("interval", torch.bfloat16), ("stream", torch.bfloat16), ("none", torch.bfloat16)]
    for mode, dtype in [*cases, ("interval", torch.float32)]:
        offload = {"mode": mode, "slots": 2, **({} if mode == "none" else {"chaos": 3})}
        settings = {**ONE, "active_layers": 1 if mode != "stream" else 3, "offload": offload}
        config = ds_config(stage, settings, 1, dtype, **FREE)
        engine = make_engine(config, dtype)
        told |= at_rest(engine, rank, world_size, dtype, f"{folder}/{mode}_{dtype}")
        engine.destroy()
    return told


def at_rest(engine, rank, world_size, dtype, folder) -> dict[str, str]:
    params, grass, zero = named(engine), engine.grass, engine.optimizer
    first, last = (next(n for n in params if f".{i}.mlp.up_proj" in n) for i in (0, LAYERS - 1))
    old, new = params[first], params[last]  # of a layer that trains first, and of one that trains last
    step = 0
    while 0 in grass.active_layers:
        train_step(engine, step, rank, world_size, 1)
        step += 1
    for own in zero.states.of.values():
        if own.numel:
            assert own.numel == partition_numel(zero.saved_order(own.group), world_size)
    # A layer that never trained: its weights are its master, and there is no moment.
    assert torch.equal(safe_get_full_fp32_param(new), full(new))
    assert safe_get_full_optimizer_state(new, "exp_avg") is None and safe_get_full_grad(new) is None
    assert torch.equal(safe_get_full_fp32_param(old).to(dtype).float(), full(old))
    assert safe_get_full_optimizer_state(old, "exp_avg").abs().sum() > 0

    value = torch.linspace(-1, 1, full(old).numel()).view(full(old).shape)  # which bf16 cannot hold
    for param in (old, new):
        safe_set_full_fp32_param(param, value)
        assert torch.equal(safe_get_full_fp32_param(param), value)
        assert torch.equal(full(param), value.to(dtype).float())
    safe_set_full_optimizer_state(old, value, "exp_avg")
    assert torch.equal(safe_get_full_optimizer_state(old, "exp_avg"), value)
    if hasattr(old, "ds_id"):
        mine = safe_get_local_fp32_param(old)
        start = rank * mine.numel()
        assert torch.equal(mine, value.flatten()[start : start + mine.numel()])
        safe_set_local_fp32_param(old, mine + 1)
        safe_set_local_optimizer_state(old, mine + 2, "exp_avg")
        assert torch.equal(safe_get_full_fp32_param(old), value + 1)
        assert torch.equal(safe_get_full_optimizer_state(old, "exp_avg"), value + 2)
        safe_set_local_fp32_param(old, mine)
    safe_set_full_optimizer_state(old, torch.zeros_like(value), "exp_avg")  # or the next update would be a leap
    told = {
        "a moment before its first step": refused(lambda: safe_set_full_optimizer_state(new, value, "exp_avg")),
        "a moment that is not kept": refused(lambda: safe_get_full_optimizer_state(old, "exp_agv")),
        "another size": refused(lambda: safe_set_full_fp32_param(old, value[1:])),
        "a gradient at rest": refused(lambda: safe_set_full_grad(old, value)),
    }
    dist.barrier()
    engine.save_checkpoint(folder, tag="set")
    saved = get_fp32_state_dict_from_zero_checkpoint(folder, "set")
    assert torch.equal(saved[first], value) and torch.equal(saved[last], value)
    waiting = {0: old, LAYERS - 1: new}
    while waiting:
        now = {layer: waiting.pop(layer) for layer in list(waiting) if layer in grass.active_layers}
        for layer, param in now.items():
            assert torch.equal(safe_get_full_fp32_param(param), value), layer
        train_step(engine, step, rank, world_size, 1)
        step += 1
        for layer, param in now.items():
            assert 0 < (safe_get_full_fp32_param(param) - value).abs().max() < 0.1, layer
    return told


@scenarios(*at_each(set_at_rest, FOLDER))
def test_what_cannot_be_set_is_refused_on_all_ranks(runs):
    for told in runs:
        last = "model.layers.7.mlp.up_proj.weight"
        assert told == {
            "a moment before its first step": f"GrassError: 'exp_avg' of {last} cannot be set: the optimizer makes it "
            "when the layer is first updated. Set it after that step.",
            "a moment that is not kept": "GrassError: The optimizer keeps no 'exp_agv' for each entry of a parameter; "
            "it keeps exp_avg, exp_avg_sq.",
            "another size": "GrassError: A value of 8128 elements was given for model.layers.0.mlp.up_proj.weight, "
            "which takes 8192.",
            "a gradient at rest": "GrassError: The gradient of model.layers.0.mlp.up_proj.weight cannot be set: the "
            "layer does not train in this step. Leave out the parameters whose safe_get_full_grad is None.",
        }


def exports(rank: int, world_size: int, stage: int, folder: str) -> dict[str, list[str]]:
    """Names that are left out, of a model whose head the user has frozen: in the probe, and in training."""
    model = small_llama(torch.bfloat16)
    model.lm_head.requires_grad_(False)
    config = ds_config(stage, {**ONE, "probe_steps": 1, "sampler": "uniform"}, 1, torch.bfloat16, **FREE)
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    engine = make_engine(config, torch.bfloat16, model)
    told, everything = {}, set(named(engine))
    for moment in ("probe", "training"):
        assert engine.grass.phase == ("probe" if moment == "probe" else "train")
        assert engine.save_16bit_model(folder, f"{moment}.bin", exclude_frozen_parameters=True)
        told[moment] = sorted(everything - set(torch.load(f"{folder}/{moment}.bin"))) if rank == 0 else []
        if stage < 3:
            told[f"{moment}, module_state_dict"] = sorted(
                everything - set(engine.module_state_dict(exclude_frozen_parameters=True))
            )
        flags = [p.requires_grad for p in named(engine).values()]
        engine.save_checkpoint(folder, tag=moment, exclude_frozen_parameters=True)
        assert flags == [p.requires_grad for p in named(engine).values()]
        train_step(engine, 0, rank, world_size, 1)
    engine.load_checkpoint(folder, tag="training", load_module_strict=False)
    engine.destroy()
    return told


@scenarios(*at_each(exports, FOLDER))
def test_frozen_is_what_never_trains(runs):
    for moment, names in runs[0].items():
        assert names == ["lm_head.weight"], moment


def offloaded(rank: int, world_size: int, stage: int) -> str:
    """engine.offload_states() between two steps; the run goes on as if nobody had asked."""
    ends = []
    for asks in (False, True):
        engine = make_engine(ds_config(stage, ONE, 1))
        sentence = ""
        for step in range(4):
            if asks:
                sentence = refused(engine.offload_states)
                engine.reload_states()
            train_step(engine, step, rank, world_size, 1)
        ends.append(weights_of(engine))
        engine.destroy()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    return sentence


@scenarios(*at_each(offloaded))
def test_offloading_states_is_refused_before_anything_moves(runs):
    for told in runs:
        assert told.startswith("GrassError: engine.offload_states() does not work with GRASS")


def destroyed(rank: int, world_size: int, stage: int) -> None:
    """A second engine on the model of one that was destroyed trains like the first one of a new model."""
    settings = {**ONE, "probe_steps": 2, "sampler": "grass", "active_layers": 2}
    config = ds_config(stage, settings, 1, torch.bfloat16)

    def begin():
        model = small_llama(torch.bfloat16)
        model.lm_head.requires_grad_(False)
        return model

    def train(model):
        engine = make_engine(config, torch.bfloat16, model)
        for step in range(6):
            train_step(engine, step, rank, world_size, 1)
        return engine

    def hooks(model):
        return sum(len(getattr(m, at)) for m in model.modules() for at in vars(m) if at.endswith("_hooks")) + sum(
            len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()
        )

    model = begin()
    had, flags = hooks(model), [p.requires_grad for p in model.parameters()]
    engine = train(model)
    ends, importances = weights_of(engine), engine.grass.importances
    for _ in range(2):  # a second time is as good as once
        engine.destroy()
    assert hooks(model) == had and [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        for param, start in zip(model.parameters(), begin().parameters(), strict=True):
            shard = getattr(param, "ds_tensor", None)
            if shard is None:
                param.copy_(start)
            else:
                shard.copy_(start.flatten()[rank * shard.numel() :][: shard.numel()])
    del engine
    again = train(model)
    assert again.grass.importances == importances
    there = weights_of(again)
    assert all(torch.equal(there[name], ends[name]) for name in ends)
    again.destroy()


@scenarios(*at_each(destroyed))
def test_a_second_engine_on_a_model_trains_like_the_first(runs):
    assert runs == [None, None]


def universal(rank: int, world_size: int, stage: int, folder: str) -> None:
    """DeepSpeed's converter finds every parameter of the user's in a checkpoint in which most have not trained.

    Some never train, as always_active has it; such a checkpoint is as good as any other to go on from.
    """
    config = ds_config(stage, {**ONE, "always_active": ["final_norm"]}, 1, torch.bfloat16)
    engine = make_engine(config, torch.bfloat16)
    for step in range(3):
        train_step(engine, step, rank, world_size, 1)
    kept = set(engine.optimizer.states.of)
    engine.save_checkpoint(folder, tag="early")
    assert set(engine.optimizer.states.of) == kept
    saved = weights_of(engine)
    if rank == 0:
        folders = ("--input_folder", f"{folder}/early", "--output_folder", f"{folder}/universal")
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *folders, "--inject_missing_state"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        found = {path.name for path in Path(folder, "universal", "zero").iterdir() if (path / "exp_avg.pt").exists()}
        assert found >= saved.keys()
        merged = get_fp32_state_dict_from_zero_checkpoint(folder, "early")
        assert all(torch.equal(merged[name].bfloat16().float(), value) for name, value in saved.items())
    dist.barrier()
    train_step(engine, 3, rank, world_size, 1)
    ends = weights_of(engine)
    engine.destroy()
    again = make_engine(config, torch.bfloat16)
    with torch.no_grad():
        for param in again.module.parameters():
            local(param).zero_()
    again.load_checkpoint(folder, tag="early")
    assert all(torch.equal(value, saved[name]) for name, value in weights_of(again).items())
    train_step(again, 3, rank, world_size, 1)
    assert all(torch.equal(value, ends[name]) for name, value in weights_of(again).items())
    again.destroy()


@scenarios(*at_each(universal, FOLDER, stages=(3,)))
def test_a_universal_checkpoint_has_every_parameter(runs):
    assert runs == [None, None]
