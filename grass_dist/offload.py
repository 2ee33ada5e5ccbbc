"""Where the optimizer state of a layer rests while the layer is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from grass_dist.optimizer import UnitOptimizer


class LayerStates(Protocol):
    """The states of all layers on this rank. Layers are named by index; calls come in the same order on all ranks."""

    def expect(self, layers: Sequence[int], steps: int) -> None:
        """``layers`` will train after ``steps`` more optimizer steps; told after each step once they are drawn."""
        ...

    def leave(self, active: Sequence[int]) -> None:
        """Layers other than ``active`` train no more; called before the model is told."""
        ...

    def enter(self, active: Sequence[int]) -> None:
        """``active`` train from the next step on; called after the model was told."""
        ...


class ResidentStates:
    """Every state rests where it was born, on the device: nothing moves."""

    def __init__(self, optimizers: list[UnitOptimizer]) -> None:
        self._optimizers = optimizers

    def expect(self, layers: Sequence[int], steps: int) -> None:
        pass

    def leave(self, active: Sequence[int]) -> None:
        pass

    def enter(self, active: Sequence[int]) -> None:
        pass

    def ready(self, layer: int) -> UnitOptimizer:
        """The optimizer of ``layer``, with its state on the device."""
        return self._optimizers[layer]

    @property
    def device_bytes(self) -> int:
        """Bytes of state on the device of this rank."""
        return sum(optimizer.nbytes for optimizer in self._optimizers)
