"""Measures how fast a rank copies between its device and pinned host memory; without a GPU, within host memory."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from grass_dist.doctor.facts import Copies
from grass_dist.errors import GrassError
from grass_dist.states.plan import free_host_memory

ON_GPU, ON_CPU = 256 << 20, 64 << 20
"""Bytes of one copy."""
REPEATS = 5


def measure_copies(
    rank: int, device: torch.device, *, turn: int, turns: int, ranks_here: int, barrier: Callable[[], object]
) -> Copies:
    """Copies alone on the host, then at the same time as the host's other ranks. Collective over all ranks.

    Args:
        turn: number of this rank on its host.
        turns: number of ranks on the host that has most.
        barrier: waits for all ranks.

    Raises:
        GrassError: the memory cannot be pinned.
    """
    nbytes = ON_GPU if device.type == "cuda" else ON_CPU
    free = free_host_memory()
    if free is not None:
        nbytes = max(1 << 20, min(nbytes, free // (8 * ranks_here)))
    try:
        host = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    except RuntimeError as error:
        raise GrassError(
            f"{nbytes:,} bytes of host memory cannot be pinned ({str(error).splitlines()[0]}); allow this process to "
            "lock more (ulimit -l unlimited, or the container's memlock limit)."
        ) from None
    there = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    alone = (0.0, 0.0)
    for now in range(turns):
        barrier()
        if now == turn:
            alone = _speeds(host, there)
    barrier()
    together = _speeds(host, there) if turns > 1 else alone
    barrier()
    return Copies(rank, nbytes, *alone, *together)


def _speeds(host: torch.Tensor, there: torch.Tensor) -> tuple[float, float]:
    """Measures bytes/s to the device and back."""
    return _speed(there, host), _speed(host, there)


def _speed(to: torch.Tensor, source: torch.Tensor) -> float:
    to.copy_(source)
    _synchronize(to, source)
    began = time.perf_counter()
    for _ in range(REPEATS):
        to.copy_(source, non_blocking=True)
    _synchronize(to, source)
    return REPEATS * to.nbytes / (time.perf_counter() - began)


def _synchronize(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
