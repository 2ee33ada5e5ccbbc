"""Knows where the state of one layer is, and the events that tell that it is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from grass_dist.states.layer_state import LayerState
from grass_dist.states.slots import Slot
from grass_dist.states.streams import StreamEvent, ThreadEvent

DONE = ThreadEvent(done=True)


@dataclass(slots=True)
class Place:
    """A layer's state between host memory and a slot."""

    state: LayerState[Any]
    host: torch.Tensor
    slot: Slot | None = None
    holds: bool = False  # whether there is a state yet
    rests: bool = False  # it has been updated in this slot, so the compute has waited for it
    arrived: StreamEvent = DONE  # it is in its slot
    updated: StreamEvent = DONE  # nothing computes on it in its slot
    left: StreamEvent = DONE  # the host's buffer has it
