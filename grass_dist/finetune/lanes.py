"""Measures how long the parts of a step take on the device that computes, without waiting for it."""

from __future__ import annotations

import time
from typing import Any

import torch


class Lanes:
    """The seconds of each part of the last step.

    On a GPU a part ends at an event of the stream that computes, so its time is that of the device. On a CPU it is that
    of this thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []

    def begin(self) -> None:
        """Begins a step."""
        self._marks = [("", self._now())]

    def end(self, lane: str) -> None:
        """Ends the part ``lane``, which began where the one before ended."""
        self._marks.append((lane, self._now()))

    def seconds(self) -> dict[str, float | None]:
        """Returns the seconds by part; None if the device has not got so far yet."""
        if self._device.type != "cuda":
            return {lane: at - before for (_, before), (lane, at) in self._pairs()}
        return {
            lane: before.elapsed_time(at) / 1e3 if at.query() else None  # milliseconds
            for (_, before), (lane, at) in self._pairs()
        }

    def _pairs(self) -> Any:
        return zip(self._marks, self._marks[1:], strict=False)

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
