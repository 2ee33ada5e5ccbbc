"""Measures how long the parts of a step take on the device that computes, without waiting for it."""

from __future__ import annotations

import time
from typing import Any

import torch


class Lanes:
    """The seconds of each part of a step.

    On a GPU a part ends at an event of the stream that computes, so its time is that of the device. On a CPU it is that
    of this thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: Any = None
        self._open: list[tuple[str, Any, Any]] = []  # name, begin and end of the parts whose time is not known
        self._known: dict[str, float] = {}

    def begin(self) -> None:
        """Begins a step."""
        self._last = self._now()

    def end(self, lane: str) -> None:
        """Ends the part ``lane``, which began where the one before ended."""
        before, self._last = self._last, self._now()
        self._open.append((lane, before, self._last))

    def seconds(self) -> dict[str, float]:
        """Returns the seconds by part, of the last step in which the device has ended that part.

        On a GPU this may be the step before, since nothing waits for the device here; before the first end of a part
        there is nothing of it.
        """
        while self._open:
            lane, before, at = self._open[0]
            if self._device.type != "cuda":
                self._known[lane] = at - before
            elif at.query():
                self._known[lane] = before.elapsed_time(at) / 1e3  # milliseconds
            else:
                break
            del self._open[0]
        return dict(self._known)

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
