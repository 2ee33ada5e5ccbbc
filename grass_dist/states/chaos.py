"""A queue that takes every liberty which `Queue` leaves it, so that a missing wait shows in a test on the CPU."""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections.abc import Sequence

import torch

from grass_dist.states.streams import Job, StreamEvent, ThreadEvent, end_thread

LONGEST_DELAY = 0.003
"""Seconds."""


class ChaosQueue:
    """A worker thread that begins late, and takes any of the jobs whose events have come, whatever their order.

    Args:
        seed: of the delays and of the order.
    """

    def __init__(self, seed: int) -> None:
        self._waiting: list[tuple[ThreadEvent, Job, tuple[StreamEvent, ...]]] = []
        self._ends = threading.Event()
        args = (self._waiting, self._ends, random.Random(seed))
        thread = threading.Thread(target=_work, args=args, name="grass_dist chaos", daemon=True)
        thread.start()
        weakref.finalize(self, end_thread, thread, self._ends.set)

    def submit(self, job: Job, after: Sequence[StreamEvent]) -> StreamEvent:
        event = ThreadEvent()
        self._waiting.append((event, job, tuple(after)))
        return event


def _work(
    waiting: list[tuple[ThreadEvent, Job, tuple[StreamEvent, ...]]], ends: threading.Event, rng: random.Random
) -> None:
    while not (ends.is_set() and not waiting):
        ready = [item for item in list(waiting) if all(event.done() for event in item[2])]
        if not ready:
            time.sleep(0.0005)
            continue
        event, job, after = item = rng.choice(ready)
        waiting.remove(item)
        if rng.random() < 0.5:
            time.sleep(rng.random() * LONGEST_DELAY)
        with torch.no_grad():
            event.run(job, after)
        del event, job, after, item, ready


def poison(tensor: torch.Tensor) -> None:
    """Fills raw bytes with a pattern that is NaN in every floating dtype."""
    tensor.view(torch.uint8).fill_(0xFF)
