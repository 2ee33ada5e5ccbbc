"""Where the optimizer state of a layer rests while the layer is frozen."""

from __future__ import annotations

from typing import Protocol

from grass_dist.optimizer import UnitOptimizer


class LayerStates(Protocol):
    """The states of all layers on this rank. Layers are named by index.

    The engine calls `evict` for a layer that is frozen again, before the new layers are made trainable, and `prefetch`
    for one that has been drawn, after that. The order of the calls is the same on all ranks.
    """

    def prefetch(self, layer: int) -> None:
        """Begins to bring the state of ``layer`` to the device; returns at once."""
        ...

    def evict(self, layer: int) -> None:
        """Lets the state of ``layer`` leave the device after the work that is queued on it."""
        ...

    @property
    def device_bytes(self) -> int:
        """Bytes of state that rest on the device of this rank."""
        ...


class ResidentStates:
    """Every state rests where it was born, on the device: nothing moves."""

    def __init__(self, optimizers: list[UnitOptimizer]) -> None:
        self._optimizers = optimizers

    def prefetch(self, layer: int) -> None:
        pass

    def ready(self, layer: int) -> UnitOptimizer:
        """The optimizer of ``layer``, with its state on the device."""
        return self._optimizers[layer]

    def evict(self, layer: int) -> None:
        pass

    @property
    def device_bytes(self) -> int:
        return sum(optimizer.nbytes for optimizer in self._optimizers)
