"""Holds the optimizer that every plan counts with: AdamW, run by the code that trains."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from grass_dist.model.discovery import Unit
from grass_dist.model.sharding import Sharding
from grass_dist.ranks import Ranks
from grass_dist.states.unit_optimizer import UnitOptimizer

_SETTINGS: dict[str, Any] = {"lr": 1e-5, "foreach": True}
GROUP: dict[str, Any] = {"params": [], **torch.optim.AdamW([nn.Parameter(torch.zeros(1))], **_SETTINGS).defaults}
"""A parameter group of it, with all defaults filled in."""


def optimizer_of(unit: Unit, sharding: Sharding) -> UnitOptimizer:
    """Makes the optimizer that a run has for ``unit``."""
    return UnitOptimizer(unit, [0] * len(unit.params), torch.optim.AdamW, _SETTINGS, sharding)


@cache
def state_bytes(dtype: str) -> int:
    """Bytes that `UnitOptimizer` keeps for each element of weights of this dtype."""
    model = nn.Linear(2, 3, bias=False, dtype=getattr(torch, dtype))
    unit = Unit("linear", None, tuple(model.named_parameters()))
    fields = optimizer_of(unit, Sharding(Ranks())).fields([GROUP])
    return sum(field.nbytes for field in fields) // model.weight.numel()
