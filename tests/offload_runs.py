"""Trainings of the tiny model with states that move, to be compared to the bit with one whose states stay."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn

from grass_dist import GrassConfig, GrassOptimizer
from grass_dist.config import OffloadConfig
from tests.tiny import Tiny, loss_of

SETTINGS = {"active_layers": 3, "sampling_interval": 4, "update_interval": 6, "probe_steps": 2, "seed": 5}


def uneven(dtype: torch.dtype = torch.float32) -> Tiny:
    """Eight layers of three widths of their own inside."""
    torch.manual_seed(0)
    model = Tiny()
    for i, layer in enumerate(model.layers):
        inner = 8 * (1 + i % 3)
        layer.up, layer.down = nn.Linear(8, inner), nn.Linear(inner, 8)
    return model.to(dtype)


def make(
    offload: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
    kwargs: dict[str, Any] | None = None,
    model: nn.Module | None = None,
    **settings: Any,
) -> tuple[nn.Module, GrassOptimizer]:
    model = uneven(dtype) if model is None else model
    config = GrassConfig(offload=OffloadConfig(**offload), **{**SETTINGS, **settings})
    return model, GrassOptimizer(model, cls, kwargs or {"lr": 1e-2}, config=config)


def train(model: nn.Module, optimizer: GrassOptimizer, steps: range, *, shuffled: bool = False) -> list[tuple]:
    """Active layers of each step. ``shuffled`` updates the layers in another order than is foreseen."""
    drawn = []
    rng = random.Random(0)
    for step in steps:
        drawn.append(optimizer.grass.active_layers)
        if shuffled:
            optimizer.grass.active_layers = tuple(rng.sample(drawn[-1], len(drawn[-1])))
        loss_of(model, step).backward()
        optimizer.step()
        if (
            shuffled
            and optimizer.grass.active_layers not in (drawn[-1],)
            and set(drawn[-1]) == set(optimizer.grass.active_layers)
        ):
            optimizer.grass.active_layers = drawn[-1]
        optimizer.zero_grad()
    return drawn


def outcome(optimizer: GrassOptimizer, model: nn.Module) -> list[torch.Tensor]:
    """All that training has left: weights, and every tensor of every state."""
    state = optimizer.state_dict()["state"]
    tensors = [v for entry in state.values() for _, v in sorted(entry.items()) if torch.is_tensor(v)]
    return [t.detach().clone() for t in (*model.parameters(), *tensors)]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def run(offload: dict[str, Any], steps: int = 50, *, shuffled: bool = False, **options: Any) -> list[torch.Tensor]:
    model, optimizer = make(offload, **options)
    train(model, optimizer, range(steps), shuffled=shuffled)
    return outcome(optimizer, model)
