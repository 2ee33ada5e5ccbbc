"""The mode in which the states of the layers stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from grass_dist.events import Traffic
from grass_dist.states.layer_state import LayerState


class ResidentStates:
    """The mode "none": every state rests where an optimizer class has made it, on the device.

    What `MovingStates` does besides to move states is nothing here.

    Args:
        states: of all layers.
    """

    host_bytes = 0

    def __init__(self, states: Sequence[LayerState[Any]]) -> None:
        self._states = states
        self.traffic = Traffic()

    def update(self, layer: int, job: Callable[[], None]) -> None:
        with torch.profiler.record_function(f"GRASS::update ({self._states[layer].name})"):
            job()

    def resting(self, layers: Sequence[int]) -> list[int]:
        return list(layers)

    def update_all(self, names: str, layers: Sequence[int], job: Callable[[], None]) -> None:
        with torch.profiler.record_function(f"GRASS::update ({names})"):
            job()

    def put(self, layer: int, fill: Callable[[], None] | None) -> None:
        if fill is not None:
            fill()

    def harvest(self) -> Traffic:
        return self.traffic

    @property
    def device_bytes(self) -> int:
        """Bytes of state on the device of this rank."""
        return sum(state.nbytes for state in self._states)

    def in_slot(self, layer: int) -> bool:
        return False

    def _stays(self, *_: Any, **__: Any) -> None:
        """Nothing moves: there is nothing to begin, and nothing to wait for."""

    expect = leave = enter = ready = used = finish = settle = arrive = show = keep = _stays
