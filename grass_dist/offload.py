"""Where the optimizer state of a layer rests while the layer is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from grass_dist.optimizer import UnitOptimizer


class LayerStates(Protocol):
    """The states of all layers on this rank. Layers are named by index.

    At a draw the engine calls `evict` for the layers that are frozen again, makes the new ones trainable, and calls
    `prefetch` for those. The order of the calls is the same on all ranks.
    """

    def prefetch(self, layers: Sequence[int]) -> None:
        """Begins to bring the states of ``layers`` to the device; returns at once."""
        ...

    def evict(self, layers: Sequence[int]) -> None:
        """Lets the states of ``layers`` leave the device after the work that is queued on them."""
        ...


class ResidentStates:
    """Every state rests where it was born, on the device: nothing moves."""

    def __init__(self, optimizers: list[UnitOptimizer]) -> None:
        self._optimizers = optimizers

    def prefetch(self, layers: Sequence[int]) -> None:
        pass

    def ready(self, layer: int) -> UnitOptimizer:
        """The optimizer of ``layer``, with its state on the device."""
        return self._optimizers[layer]

    def evict(self, layers: Sequence[int]) -> None:
        pass

    @property
    def device_bytes(self) -> int:
        """Bytes of state on the device of this rank."""
        return sum(optimizer.nbytes for optimizer in self._optimizers)
