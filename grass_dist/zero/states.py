"""`LayerStates` of a ZeRO optimizer."""

from __future__ import annotations

from collections.abc import Sequence

from grass_dist.backends.zero.narrow import NarrowZero
from grass_dist.discovery import Unit


class ZeroStates:
    """Masters and moments of the active layers are in the ZeRO optimizer, those of the others in its host store."""

    def __init__(self, zero: NarrowZero, layers: Sequence[Unit]) -> None:
        self._zero, self._layers = zero, layers

    def prefetch(self, layer: int) -> None:
        """The states come when the optimizer is narrowed to the drawn layers."""

    def evict(self, layer: int) -> None:
        self._zero.evict(self._layers[layer].name)

    @property
    def device_bytes(self) -> int:
        return self._zero.device_state_bytes
