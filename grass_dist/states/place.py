"""Where the state of one layer is, and what tells that it is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from grass_dist.states.layout import Layout
from grass_dist.states.slots import Slot
from grass_dist.states.streams import Event, ThreadEvent


class Movable(Protocol):
    """The state of one layer, wherever it is."""

    name: str
    layout: Layout

    def bind(self, views: Sequence[torch.Tensor], *, resident: bool) -> None:
        """Makes the optimizer use ``views``, one for each field, as its state; before its birth, to be born in.

        ``resident``: they are in a slot, not in host memory.
        """
        ...


DONE = ThreadEvent(done=True)


@dataclass(slots=True)
class Place:
    """A layer's state between host memory and a slot."""

    state: Movable
    host: torch.Tensor
    slot: Slot | None = None
    holds: bool = False  # whether there is a state yet
    arrived: Event = DONE  # it is in its slot
    updated: Event = DONE  # nothing computes on it in its slot
    left: Event = DONE  # the host's buffer has it
