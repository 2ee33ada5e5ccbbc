"""The mode in which the states of the layers stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from grass_dist.events import Traffic
from grass_dist.states.unit_optimizer import UnitOptimizer


class ResidentStates:
    """The mode "none": every state rests where it was born, on the device.

    Args:
        optimizers: of all layers.
    """

    host_bytes = 0

    def __init__(self, optimizers: Sequence[UnitOptimizer]) -> None:
        self._optimizers = optimizers
        self.traffic = Traffic()

    def expect(self, layers: Sequence[int], steps: int) -> None:
        pass

    def leave(self, active: Sequence[int]) -> None:
        pass

    def enter(self, active: Sequence[int]) -> None:
        pass

    def update(self, layer: int, job: Callable[[], None]) -> None:
        with torch.profiler.record_function(f"GRASS::update ({self._optimizers[layer].name})"):
            job()

    def finish(self) -> None:
        pass

    def settle(self) -> None:
        pass

    def lends(self, layer: int) -> bool:
        return False

    def put(self, layer: int, fill: Callable[[], None] | None) -> None:
        if fill is not None:
            fill()

    def harvest(self) -> Traffic:
        return self.traffic

    @property
    def device_bytes(self) -> int:
        """Bytes of state on the device of this rank."""
        return sum(optimizer.nbytes for optimizer in self._optimizers)
