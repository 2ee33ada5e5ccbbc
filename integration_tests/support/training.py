"""A user's training loop over `GrassOptimizer`, run by spawned ranks and in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import grass_dist
from integration_tests.support.model import (
    ADAMW,
    CLIP,
    GLOBAL_BATCH,
    decay_groups,
    global_batch,
    schedule,
    small_llama,
    wrapped,
)
from integration_tests.support.parallel import data_place


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def train_grass(
    rank: int,
    world_size: int,
    backend: str,
    settings: dict,
    steps: int,
    accumulation: int = 2,
    dtype: torch.dtype = torch.float32,
    sync_every_micro_batch: bool = True,
    frozen: Sequence[int] = (),
    make: Callable[[torch.dtype, Sequence[int]], nn.Module] = small_llama,
    groups: Callable[[nn.Module], list[dict]] = decay_groups,
) -> dict:
    reduce_dtype = torch.float32 if dtype != torch.float32 else None
    config = grass_dist.GrassConfig(**settings)
    model = grass_dist.add_adapters(make(dtype, frozen), config)
    model = wrapped(model, backend, world_size, reduce_dtype)
    optimizer = grass_dist.GrassOptimizer(
        model,
        torch.optim.AdamW,
        ADAMW,
        config=config,
        params=groups(model),
        gradient_accumulation_steps=accumulation,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    log = {"active": [], "importances": [], "losses": [], "norms": [], "frozen_moved": 0, "frozen_grads": 0}
    place, places = data_place(backend, rank, world_size)
    per = GLOBAL_BATCH // places // accumulation
    layer_params = [list(unit.params) for unit in optimizer.grass.layers]
    for step in range(steps):
        grass = optimizer.grass
        active, probing = grass.active_layers, grass.phase == "probe"
        log["active"].append(active)
        log["importances"].append(grass.importances)
        still = [p for i, params in enumerate(layer_params) if i not in active or probing for _, p in params]
        before = [local(p).clone() for p in still]
        x, total = global_batch(step), 0.0
        for micro in range(accumulation):
            last = micro == accumulation - 1
            mine = x[(micro * places + place) * per :][:per]
            with contextlib.ExitStack() as stack:
                if not sync_every_micro_batch and not last and isinstance(model, DistributedDataParallel):
                    stack.enter_context(model.no_sync())
                if not sync_every_micro_batch and isinstance(model, FSDPModule):
                    model.set_requires_gradient_sync(last)
                loss = model(input_ids=mine, labels=mine).loss / accumulation
                loss.backward()
            total += loss.item()
        log["frozen_grads"] += sum(p.grad is not None for p in still)
        norm = optimizer.clip_grad_norm_(CLIP)
        if not probing:
            log["norms"].append(norm.item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        log["losses"].append(total)
        log["frozen_moved"] += sum(not torch.equal(local(p), b) for p, b in zip(still, before, strict=True))
    log["params"] = {n.removeprefix("module."): full(p).float().clone() for n, p in model.named_parameters()}
    log["state_bytes"] = optimizer.state_bytes
    log["bytes_reduced"] = optimizer.grass.bytes_reduced
    return log
