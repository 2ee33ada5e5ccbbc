"""Stock ZeRO built on only the layers of an interval, and a chain of such runs with their states carried over."""

from __future__ import annotations

import copy

import deepspeed
import torch

from grass_dist.backends.zero.private import STAGE_1_AND_2, STAGE_3
from integration_tests.support.model import ADAMW, schedule, small_llama
from integration_tests.support.zero import ds_config, full, make_engine, train_step


def groups_of(model, layers: tuple[int, ...]) -> tuple[list[str], list[dict]]:
    """One group for each (layer, decay or not), then those of what is outside of the layers."""
    named = list(model.named_parameters())
    units = [[(n, p) for n, p in named if f".layers.{i}." in n] for i in layers]
    outside = [(n, p) for n, p in named if ".layers." not in n]
    units += [[(n, p) for n, p in outside if role in n] for role in ("embed_tokens", "model.norm", "lm_head")]
    names, groups = [], []
    for unit in units:
        for decay in (0.1, 0.0):
            params = [(n, p) for n, p in unit if ("norm" not in n) == (decay > 0)]
            if params:
                names.append(params[0][0] + str(decay))
                groups.append({"params": [p for _, p in params], "weight_decay": decay})
    return names, groups


def stock_interval(model, layers, states, first, steps, rank, world_size, stage, accumulation, dtype, more):
    """Trains stock ZeRO on ``layers`` from optimizer step ``first``; updates ``states`` and gives the weights."""
    for name, p in model.named_parameters():
        p.requires_grad_(".layers." not in name or any(f".layers.{i}." in name for i in layers))
    names, groups = groups_of(model, layers)
    optimizer = torch.optim.AdamW(groups, **ADAMW)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: schedule(first + t))
    config = ds_config(stage, None, accumulation, dtype, zero_allow_untested_optimizer=True, **more)
    engine, zero, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    masters = getattr(zero, (STAGE_3 if stage == 3 else STAGE_1_AND_2).masters)
    for name, master in zip(names, masters, strict=True):
        if name in states:
            kept, own = states[name]
            master.data.copy_(kept)
            zero.optimizer.state[master] = copy.deepcopy(own)
    for step in range(first, first + steps):
        train_step(engine, step, rank, world_size, accumulation)
    for name, master in zip(names, masters, strict=True):
        states[name] = (master.detach().clone(), dict(zero.optimizer.state[master]))
    weights = {n: full(p) for n, p in engine.module.named_parameters()}
    engine.destroy()
    return weights


def grass_and_chain(rank, world_size, stage, dtype, steps=15, accumulation=2, more=None) -> dict:
    """Largest difference, after each interval, between GRASS and the chain."""
    more = more or {}
    settings = {"active_layers": 2, "sampling_interval": 3, "sampler": "uniform", "seed": 4}
    engine = make_engine(ds_config(stage, settings, accumulation, dtype, **more), dtype)
    drawn, ours = [], []
    for step in range(steps):
        if step % 3 == 0:
            drawn.append(engine.grass.active_layers)
        train_step(engine, step, rank, world_size, accumulation)
        if step % 3 == 2:
            ours.append({n: full(p) for n, p in engine.module.named_parameters()})
    engine.destroy()
    weights = {n: p.detach().float() for n, p in small_llama(dtype).named_parameters()}
    states: dict = {}
    differences = []
    for number, layers in enumerate(drawn):
        model = small_llama(dtype)
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(weights[n])
        args = (layers, states, 3 * number, 3, rank, world_size, stage, accumulation, dtype, more)
        weights = stock_interval(model, *args)
        differences.append(max((weights[n] - ours[number][n]).abs().max().item() for n in weights))
    return {
        "drawn": drawn,
        "differences": differences,
        "moved": (ours[-1]["lm_head.weight"] - ours[0]["lm_head.weight"]).abs().max().item(),
    }
