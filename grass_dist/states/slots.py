"""Device memory for the states, or the weights, of a few layers at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from grass_dist.errors import GrassError
from grass_dist.states.streams import StreamEvent, ThreadEvent


@dataclass(eq=False, slots=True)
class Slot:
    """Room for the state of one layer."""

    flat: torch.Tensor
    """uint8, as long as the longest state."""
    free: StreamEvent
    """When nothing uses the memory any more: the last state that was here has been copied away, and before the first
    one came, the kernels that had the memory before this slot have ended."""


class SlotPool:
    """Slots that are made once, for the whole run, and handed on from layer to layer.

    Args:
        count: slots to make.
        nbytes: of each.
        device: where they are.
        allocated: `TransferEngine.allocated`, which says when memory that was just allocated may be written to by a
            copy.
        of: what comes into the slots, and ``else_``, what to do without it: parts of a sentence.

    Raises:
        GrassError: the device has no room for them.
    """

    def __init__(
        self,
        count: int,
        nbytes: int,
        device: torch.device,
        allocated: Callable[[torch.Tensor], StreamEvent],
        *,
        of: str = "optimizer states",
        else_: str = "use grass.offload.mode='stream'",
    ) -> None:
        self.count = count
        try:
            flats = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(count)]
        except (torch.OutOfMemoryError, RuntimeError):  # the latter on a CPU
            raise GrassError(
                f"The device has no room for the {of} of {count} layers ({count * nbytes:,} bytes); {else_}, fewer "
                "grass.active_layers, or more ranks."
            ) from None
        self.nbytes = count * nbytes
        """Bytes of all slots on the device."""
        self._free = [Slot(flat, allocated(flat)) for flat in flats]

    def __len__(self) -> int:
        """Slots that can be taken."""
        return len(self._free)

    def take(self) -> Slot:
        """A slot in which no layer's state is, or only one that is on its way out: see `Slot.free`."""
        return self._free.pop(0)

    def give(self, slot: Slot) -> None:
        self._free.append(slot)

    def disregard(self, failed: StreamEvent) -> None:
        """The slot whose state was to leave with ``failed`` is free: nobody needs that state any more."""
        for slot in self._free:
            if slot.free is failed:
                slot.free = ThreadEvent(done=True)
