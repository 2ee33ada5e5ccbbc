"""Versions, how long it takes to register host memory, and how fast copies from and to it are."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu.told import Told
from benchmarks.gpu.training import device, synchronize
from grass_dist.states.store import LayerStateStore

GIB = 2**30


@contextlib.contextmanager
def registered(told: Told, nbytes: int) -> Iterator[tuple[torch.Tensor, float]]:
    """Host memory of so many bytes as a layer's state has it, and the seconds that this took."""
    began = time.perf_counter()
    store = LayerStateStore([nbytes], device(told))
    took = time.perf_counter() - began
    try:
        yield store[0], took
    finally:
        synchronize(told)


def show(told: Told) -> None:
    large = 2**24 if told.tiny else 4 * GIB
    with registered(told, large) as (memory, took):
        told.figure("seconds to register a GB", round(took / large * 1e9, 4))
        part = min(large, 2**24 if told.tiny else GIB)
        host, other = memory[:part], memory[-part:]
        here, there = (torch.zeros(part, dtype=torch.uint8, device=device(told)) for _ in range(2))
        told.figure("GB/s to the device", speed(told, part, lambda: here.copy_(host, non_blocking=True)))
        told.figure("GB/s to the host", speed(told, part, lambda: other.copy_(there, non_blocking=True)))
        if told.tiny:
            told.left_out("both directions at once", "it needs two streams of a GPU")
            return
        lanes = [torch.cuda.Stream(), torch.cuda.Stream()]

        def both() -> None:
            with torch.cuda.stream(lanes[0]):
                here.copy_(host, non_blocking=True)
            with torch.cuda.stream(lanes[1]):
                other.copy_(there, non_blocking=True)

        told.figure("GB/s, both directions at once", speed(told, 2 * part, both))


def speed(told: Told, nbytes: int, copy: Callable[[], object], times: int = 4) -> float:
    """GB/s of a copy that is made some times in a row."""
    copy()
    synchronize(told)
    began = time.perf_counter()
    for _ in range(times):
        copy()
    synchronize(told)
    return round(times * nbytes / (time.perf_counter() - began) / 1e9, 2)
