"""Where the states of a `GrassOptimizer`'s layers are: decided, and made, on all ranks alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from grass_dist.config import GrassConfig
from grass_dist.errors import GrassError
from grass_dist.model.sharding import Sharding
from grass_dist.ranks import together
from grass_dist.states.build import build
from grass_dist.states.layout import Field, Layout
from grass_dist.states.moving import MovingStates
from grass_dist.states.plan import make_plan
from grass_dist.states.resident import ResidentStates
from grass_dist.states.unit_optimizer import UnitOptimizer


def place_states(
    layers: Sequence[UnitOptimizer],
    roles: Sequence[UnitOptimizer],
    groups: Sequence[Mapping[str, Any]],
    sharding: Sharding,
    config: GrassConfig,
) -> ResidentStates | MovingStates:
    """Chooses the mode and takes the memory for it, before anything trains.

    Raises:
        ConfigError, GrassError: the states cannot be where the configuration wants them.
    """
    fields: list[list[Field]] = []
    fallback: str | None = None
    try:
        fields = [optimizer.fields(groups) for optimizer in layers]
        resident = sum(field.nbytes for optimizer in roles for field in optimizer.fields(groups))
    except GrassError as error:
        fallback, resident = str(error), 0
    dtype = torch.bfloat16 if config.offload.host_dtype else None
    layouts = [Layout(own, dtype) for own in fields]
    sizes = [(layout.device_bytes, layout.host_bytes) for layout in layouts]
    device = sharding.shard_of(layers[0].unit.params[0][1]).device
    plan = make_plan(sharding.ranks, config, sizes, resident, device, fallback=fallback)
    if plan.mode == "none":
        return ResidentStates(layers)
    for optimizer, layout in zip(layers, layouts, strict=True):
        optimizer.layout = layout
    return together(sharding.ranks, lambda: build(plan, config, layers, device))
