"""Device memory for the states of a few layers at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grass_dist.errors import GrassError
from grass_dist.offload.streams import Event, ThreadEvent


@dataclass(eq=False, slots=True)
class Slot:
    """Room for the state of one layer."""

    flat: torch.Tensor
    """uint8, as long as the longest state."""
    free: Event
    """When the last state that was here has been copied away."""


class SlotPool:
    """Slots that are made once and handed on from layer to layer.

    Args:
        count: slots to make now.
        nbytes: of each.
        device: where they are.

    Raises:
        GrassError: the device has no room for them.
    """

    def __init__(self, count: int, nbytes: int, device: torch.device) -> None:
        self._nbytes, self._device = nbytes, device
        self.count = self.allocations = 0
        self._count = count
        try:
            self._free = [self._make() for _ in range(count)]
        except (torch.OutOfMemoryError, RuntimeError):  # the latter on a CPU
            raise GrassError(
                f"The device has no room for the optimizer states of {count} layers ({count * nbytes:,} bytes); use "
                "grass.offload.mode='stream', fewer grass.active_layers, or more ranks."
            ) from None

    def __len__(self) -> int:
        """Slots that can be taken."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots on the device."""
        return self.count * self._nbytes

    def take(self) -> Slot:
        """A slot in which no layer's state is, or only one that is on its way out: see `Slot.free`."""
        return self._free.pop(0)

    def give(self, slot: Slot) -> None:
        self._free.append(slot)

    def add(self) -> bool:
        """Makes one slot more than there were at first, if the device has room for it."""
        if self.count > self._count:
            return False
        try:
            self._free.insert(0, self._make())
        except (torch.OutOfMemoryError, RuntimeError):  # the latter on a CPU
            return False
        return True

    def forgive(self, failed: Event) -> None:
        """What `failed` was to copy out of a slot is needed no more."""
        for slot in self._free:
            if slot.free is failed:
                slot.free = ThreadEvent(done=True)

    def trim(self) -> None:
        """Gives back the memory of slots that were added, as soon as they are empty."""
        for slot in list(self._free):
            if self.count > self._count and slot.free.done():
                self._free.remove(slot)
                self.count -= 1

    def _make(self) -> Slot:
        flat = torch.empty(self._nbytes, dtype=torch.uint8, device=self._device)
        self.count += 1
        self.allocations += 1
        return Slot(flat, ThreadEvent(done=True))
