"""A user's training loop over `grass_dist.initialize`, run by spawned ranks."""

from __future__ import annotations

import os

import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed

import grass_dist
from grass_dist.deepspeed import initialize
from integration_tests.support.model import ADAMW, CLIP, GLOBAL_BATCH, decay_groups, global_batch, schedule, small_llama

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


# torch computes fp16 on a CPU; DeepSpeed's CPU accelerator does not let it, where the processor has no fp16 of its own.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # stock runs would compile it
deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True


def ds_config(stage, settings, accumulation=1, dtype=torch.float32, zero=None, **more) -> dict:
    low = {DTYPES[dtype]: {"enabled": True}} if dtype in DTYPES else {}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **(zero or {})},
        "steps_per_print": 10**9,
        **low,
        **({"grass": settings} if settings is not None else {}),
        **more,
    }


def local(param: torch.Tensor) -> torch.Tensor:
    return getattr(param, "ds_tensor", param).detach()


def full(param: torch.nn.Parameter) -> torch.Tensor:
    with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_id")):
        return param.detach().float().clone()


def make_engine(config: dict, dtype: torch.dtype = torch.float32, model=None):
    model = small_llama(dtype) if model is None else model
    groups = decay_groups(model)
    if "grass" in config:
        method = grass_dist.GrassConfig(**config["grass"])
        grass_dist.add_adapters(model, method)
        groups = grass_dist.adapter_groups(model, method, decay_groups(model))
    optimizer = torch.optim.AdamW(groups, **ADAMW)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    engine, *_ = initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    return engine


def micro_batch(step: int, micro: int, rank: int, world_size: int, accumulation: int) -> torch.Tensor:
    per = GLOBAL_BATCH // world_size // accumulation
    return global_batch(step)[(micro * world_size + rank) * per :][:per]


def train_step(engine, step: int, rank: int, world_size: int, accumulation: int) -> float:
    total = 0.0
    for micro in range(accumulation):
        x = micro_batch(step, micro, rank, world_size, accumulation)
        loss = engine(input_ids=x, labels=x).loss
        engine.backward(loss)
        engine.step()
        total += loss.item() / accumulation
    return total


def train_zero(
    rank,
    world_size,
    stage,
    settings,
    steps,
    accumulation=2,
    dtype=torch.float32,
    zero=None,
    frozen=(),
    make=small_llama,
) -> dict:
    config = ds_config(stage, settings, accumulation, dtype, zero)
    engine = make_engine(config, dtype, make(dtype, frozen))
    log = {"active": [], "importances": [], "losses": [], "norms": [], "frozen_moved": 0, "frozen_grads": 0}
    grass = engine.grass
    units = [[p for _, p in unit.params] for unit in grass.layers]
    for step in range(steps):
        active, probing = grass.active_layers, grass.phase == "probe"
        log["active"].append(active)
        log["importances"].append(grass.importances)
        still = [p for i, params in enumerate(units) if i not in active or probing for p in params]
        before = [local(p).clone() for p in still]
        log["losses"].append(train_step(engine, step, rank, world_size, accumulation))
        if not probing:
            log["norms"].append(float(engine.get_global_grad_norm()))
        log["frozen_moved"] += sum(not torch.equal(local(p), b) for p, b in zip(still, before, strict=True))
        log["frozen_grads"] += sum(p.grad is not None for p in still)
    log["params"] = {n: full(p) for n, p in engine.module.named_parameters()}
    log["bytes_reduced"] = grass.bytes_reduced
    return log
