"""Trainings of the tiny model with states that move, to be compared to the bit with one whose states stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grass_dist import GrassConfig, GrassOptimizer
from grass_dist.config import OffloadConfig
from tests.tiny import Tiny, take_steps

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


def train(model: nn.Module, optimizer: GrassOptimizer, steps: range) -> list[tuple[int, ...]]:
    """Active layers of each step."""
    drawn = []
    for step in steps:
        drawn.append(optimizer.grass.active_layers)
        take_steps(model, optimizer, range(step, step + 1))
    return drawn


def returned(drawn: list[tuple[int, ...]]) -> set[int]:
    """Layers that trained, rested, and trained again; ``drawn`` without the probe."""
    rested = {layer: [i for i, active in enumerate(drawn) if layer in active] for layer in set().union(*drawn)}
    return {layer for layer, at in rested.items() if at[-1] - at[0] >= len(at)}


def outcome(optimizer: GrassOptimizer, model: nn.Module) -> list[torch.Tensor]:
    """All that training has left: weights, and every tensor of every state."""
    state = optimizer.state_dict()["state"]
    tensors = [v for entry in state.values() for _, v in sorted(entry.items()) if torch.is_tensor(v)]
    return [t.detach().clone() for t in (*model.parameters(), *tensors)]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def run(offload: dict[str, Any], steps: int, **options: Any) -> tuple[list[tuple[int, ...]], list[torch.Tensor]]:
    """Active layers of each step after the probe, and what is left."""
    model, optimizer = make(offload, **options)
    drawn = train(model, optimizer, range(steps))
    return drawn[SETTINGS["probe_steps"] :], outcome(optimizer, model)
