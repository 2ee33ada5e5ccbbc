"""What spawned ranks do in the ZeRO tests; the checks without a result assert on the ranks."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from grass_dist.backends.zero.private import PARAMETER
from integration_tests.support.model import FROZEN, LAYERS, small_llama
from integration_tests.support.training import train_grass
from integration_tests.support.wire import Wire
from integration_tests.support.zero import ds_config, full, make_engine, train_step, train_zero
from integration_tests.support.zero_chain import grass_and_chain

STEPS = 12
SETTINGS = {
    "active_layers": 2,
    "sampling_interval": 3,
    "update_interval": 3,
    "probe_steps": 2,
    "ema_alpha": 0.5,
    "temperature": 0.5,
    "seed": 3,
}
SMALL = {"reduce_bucket_size": 2000, "allgather_bucket_size": 2000}
OPTIONS: dict[int, list[dict]] = {
    1: [{"overlap_comm": True, "round_robin_gradients": True}, {"contiguous_gradients": False}, SMALL],
    2: [
        {"overlap_comm": True, "allgather_partitions": False},
        {"contiguous_gradients": False, "offload_optimizer": {"device": "cpu"}},
        {"round_robin_gradients": True, "reduce_scatter": False},
        SMALL,
    ],
    3: [
        {"overlap_comm": True, "stage3_param_persistence_threshold": 100_000},
        {"contiguous_gradients": False, "reduce_scatter": False, "sub_group_size": 1000},
        {
            "stage3_param_persistence_threshold": 100,
            "stage3_prefetch_bucket_size": 1000,
            "stage3_max_live_parameters": 10_000,
            "stage3_max_reuse_distance": 1000,
            "reduce_bucket_size": 5000,
        },
    ],
}
"""ZeRO options under which the trajectory must stay the same."""


def everything(rank: int, world_size: int, stage: int, folder: str) -> dict:
    """All of one stage, in one spawn."""
    gc.freeze()  # DeepSpeed collects whenever it constructs a ZeRO-3 optimizer, a second each time
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    told: dict = {"runs": {"as it is": train_zero(rank, world_size, stage, SETTINGS, STEPS)}}
    if stage == 0:
        return told
    for options in OPTIONS[stage]:
        told["runs"][str(options)] = train_zero(rank, world_size, stage, SETTINGS, STEPS, zero=options)
    told["one micro-batch"] = train_zero(rank, world_size, stage, SETTINGS, STEPS, accumulation=1)
    told["frozen layers"] = train_zero(rank, world_size, stage, SETTINGS, STEPS, frozen=FROZEN)
    told["bf16"] = grass_and_chain(rank, world_size, stage, bf16)
    told["fp16"] = grass_and_chain(rank, world_size, stage, fp16, accumulation=1)
    told["wire"] = wire_bytes(rank, world_size, stage)
    overflow(rank, world_size, stage)
    for dtype in (bf16, fp32):
        state_bytes(rank, world_size, stage, dtype)
    checkpoint(rank, world_size, stage, f"{folder}/checkpoint", bf16)
    full_and_back(rank, world_size, stage, f"{folder}/back", bf16)
    weights_only(rank, world_size, stage, f"{folder}/weights")
    told["files"] = sorted(path.name for path in Path(f"{folder}/checkpoint/at4").iterdir())
    if stage == 3:
        told["zero.Init"] = zero_init(rank, world_size)
    return told


def on_four_ranks(rank: int, world_size: int) -> dict:
    return {stage: train_zero(rank, world_size, stage, SETTINGS, STEPS, accumulation=1) for stage in (1, 2, 3)}


def fsdp2(rank: int, world_size: int) -> dict:
    return train_grass(rank, world_size, "fsdp2", SETTINGS, STEPS)


def weights_of(engine) -> dict[str, torch.Tensor]:
    return {n: full(p) for n, p in engine.module.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def moments_of(zero) -> list[dict]:
    return [state for state in zero.optimizer.state.values() if state]


def overflow(rank: int, world_size: int, stage: int) -> None:
    """fp16: a step that overflows changes nothing, in the probe and in training, on all ranks."""
    fp16 = {"enabled": True, "initial_scale_power": 22, "hysteresis": 1, "loss_scale_window": 1000}
    engine = make_engine(ds_config(stage, SETTINGS, 1, fp16=fp16), torch.float16)
    zero, grass = engine.optimizer, engine.grass
    skipped = {"probe": 0, "train": 0}
    step = forced = 0
    while grass.step < 9:
        phase, before = grass.phase, copy.deepcopy((grass.state_dict(), weights_of(engine)))
        if phase == "train" and grass.step in (3, 6) and forced < 2 and grass.step != forced:
            zero.loss_scaler.cur_scale, forced = 2.0**24, grass.step
        scale, moments = zero.loss_scale, copy.deepcopy(moments_of(zero))
        train_step(engine, step, rank, world_size, 1)
        step += 1
        if zero.overflow:
            skipped[phase] += 1
            assert zero.loss_scale == scale / 2 and engine.skipped_steps == sum(skipped.values())
            assert grass.skipped == sum(skipped.values())
            was = {**before[0], "skipped": grass.skipped}
            assert repr(grass.state_dict()) == repr(was) and same(weights_of(engine), before[1])
            assert repr(moments_of(zero)) == repr(moments)
        else:
            assert grass.step == before[0]["step"] + 1
        assert step < 60
    assert skipped["probe"] >= 2 and skipped["train"] >= 2
    assert grass.dropped == 0 and all(m < 1 for m in grass.importances)


def wire_bytes(rank: int, world_size: int, stage: int) -> dict[str, int]:
    """Bytes at the process group in one training step, by (γ of L); nothing but layers trains."""
    told = {}
    for active in (2, LAYERS):
        settings = {**SETTINGS, "active_layers": active, "probe_steps": 0, "sampler": "uniform", "always_active": []}
        engine = make_engine(ds_config(stage, settings, 1))
        train_step(engine, 0, rank, world_size, 1)
        with Wire() as wire:
            train_step(engine, 1, rank, world_size, 1)
        told[active] = dict(wire.bytes)
        engine.destroy()
    return told


def state_bytes(rank: int, world_size: int, stage: int, dtype: torch.dtype) -> None:
    """On the device slots for the active layers and the roles' states, on the host the layers that are away."""
    engine = make_engine(ds_config(stage, SETTINGS, 1, dtype), dtype)
    states, grass = engine.optimizer.states, engine.grass
    share = {unit.name: unit.numel / world_size for unit in (*grass.layers, *grass.roles)}
    layers, slots = [unit.name for unit in grass.layers], grass.config.active_layers + 1  # one to land in
    pad = 12 * 100 * len(engine.optimizer.every)
    each = 8 if stage == 3 and dtype == torch.float32 else 12  # there the weights are their own masters
    size = each * share[layers[0]]
    assert abs(states.device_bytes - slots * size) <= pad and states.host_bytes == 0  # the probe has no state
    seen: set[str] = set()
    for step in range(12):
        active = {layers[i] for i in grass.active_layers} if grass.phase == "train" else set()
        train_step(engine, step, rank, world_size, 1)
        seen |= active
        roles = sum(each * share[unit.name] for unit in grass.roles)
        on = states.device_bytes - slots * size
        least = roles if seen else 0  # with the first draw they have masters, and with the first update all
        assert least - pad <= on <= roles + pad, (step, on, roles)
        landing = size if grass.schedule.steps_to_switch(grass.step) == 1 else 0
        now = {layers[i] for i in grass.active_layers}
        off = each * sum(share[name] for name in seen - now)
        assert -landing - pad <= states.host_bytes - off <= pad, (step, states.host_bytes, off)
    assert len(seen) > 3


def checkpoint(rank: int, world_size: int, stage: int, folder: str, dtype: torch.dtype) -> None:
    """Saved in the probe, between a draw and its switch, and at a switch: continues as if nothing had happened."""
    config = ds_config(stage, SETTINGS, 1, dtype)
    engine = make_engine(config, dtype)
    saved = {}
    for step in range(10):
        if step in (1, 4, 8):
            before = weights_of(engine)
            engine.save_checkpoint(folder, tag=f"at{step}", client_state={"mine": step})
            assert same(before, weights_of(engine))
            masters = get_fp32_state_dict_from_zero_checkpoint(folder, f"at{step}")
            for name, weight in before.items():
                assert torch.equal(masters[name].to(dtype).float(), weight), name
            saved[step] = (engine.grass.state_dict(), before)
        train_step(engine, step, rank, world_size, 1)
    end, told = weights_of(engine), engine.grass.state_dict()
    engine.destroy()
    for at in saved:
        again = make_engine(config, dtype)
        train_step(again, 50, rank, world_size, 1)  # it need not be a fresh one
        _, client = again.load_checkpoint(folder, tag=f"at{at}")
        assert client["mine"] == at and repr(again.grass.state_dict()) == repr(saved[at][0])
        assert same(weights_of(again), saved[at][1])
        for step in range(at, 10):
            train_step(again, step, rank, world_size, 1)
        assert same(weights_of(again), end), at
        assert repr(again.grass.state_dict()) == repr(told)
        again.destroy()


def full_and_back(rank: int, world_size: int, stage: int, folder: str, dtype: torch.dtype) -> None:
    """A checkpoint of full fine-tuning is the start of GRASS, and the other way round."""
    config = ds_config(stage, None, 1, dtype, zero_allow_untested_optimizer=True)
    stock = make_engine(config, dtype)
    for step in range(2):
        train_step(stock, step, rank, world_size, 1)
    stock.save_checkpoint(f"{folder}/full", tag="t")
    weights = weights_of(stock)
    masters = get_fp32_state_dict_from_zero_checkpoint(f"{folder}/full", "t")
    stock.destroy()
    for roles in ([], ["embeddings", "final_norm", "lm_head"]):
        engine = make_engine(ds_config(stage, {**SETTINGS, "always_active": roles}, 1, dtype), dtype)
        engine.load_checkpoint(f"{folder}/full", tag="t")
        assert same(weights_of(engine), weights)
    engine.save_checkpoint(f"{folder}/grass", tag="t")
    again = get_fp32_state_dict_from_zero_checkpoint(f"{folder}/grass", "t")
    assert all(torch.equal(again[n], masters[n]) for n in again)
    for step in range(2, 8):
        train_step(engine, step, rank, world_size, 1)
    engine.save_checkpoint(f"{folder}/grass", tag="u")
    weights = weights_of(engine)
    engine.destroy()
    back = make_engine(config, dtype)
    # ZeRO-3 loads no weights unless it is told that the optimizer states do not come
    back.load_checkpoint(f"{folder}/grass", tag="u", load_module_only=True, load_optimizer_states=False)
    assert same(weights_of(back), weights)
    train_step(back, 8, rank, world_size, 1)
    back.destroy()


def weights_only(rank: int, world_size: int, stage: int, folder: str) -> None:
    """load_module_only: the weights come, masters and moments begin anew."""
    engine = make_engine(ds_config(stage, SETTINGS, 1))
    for step in range(7):
        train_step(engine, step, rank, world_size, 1)
    engine.save_checkpoint(folder, tag="t")
    weights = weights_of(engine)
    for step in range(7, 9):
        train_step(engine, step, rank, world_size, 1)
    engine.save_checkpoint(folder, tag="newer")
    engine.load_checkpoint(folder, tag="t", load_module_only=True)
    assert same(weights_of(engine), weights)
    active = engine.grass.active_layers
    train_step(engine, 9, rank, world_size, 1)
    moved = {
        n.split(".")[2] for n, w in weights_of(engine).items() if "layers." in n and not torch.equal(w, weights[n])
    }
    assert moved == {str(i) for i in active}


def zero_init(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """A model that is partitioned as it is made."""
    config = ds_config(3, SETTINGS, 1)
    stock = {k: v for k, v in config.items() if k != "grass"}
    with deepspeed.zero.Init(config_dict_or_path=stock):
        model = small_llama()
    assert all(p.numel() == 0 and hasattr(p, name) for p in model.parameters() for name in PARAMETER)
    for p, whole in zip(model.parameters(), small_llama().parameters(), strict=True):  # other draws than in one piece
        with torch.no_grad(), deepspeed.zero.GatheredParameters([p], modifier_rank=0):
            p.copy_(whole)
    engine = make_engine(config, model=model)
    active = []
    for step in range(STEPS):
        active.append(engine.grass.active_layers)
        train_step(engine, step, rank, world_size, 1)
    return {"active": active, "params": weights_of(engine)}
