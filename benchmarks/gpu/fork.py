"""A process is forked while states lie in registered memory: the parent still writes and copies what is right."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from benchmarks.gpu.told import Told
from grass_dist.states.store import LayerStateStore

GIB = 2**30


def show(told: Told) -> None:
    with fake_or_real(told) as device:
        size = 2**22 if told.tiny else min(8 * GIB, available() // 4)
        store = LayerStateStore([size], device)
        memory = store[0]
        memory.fill_(1)
        tested = torch.zeros(memory.numel(), dtype=torch.uint8, device="cpu" if told.tiny else device)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:  # it holds its view of all memory until the parent has ended its work
            os.close(write)
            os.read(read, 1)
            os._exit(0)
        os.close(read)
        try:
            memory.fill_(2)  # pages of which the child has a view are copied now: which one does the device read?
            tested.copy_(memory, non_blocking=True)
            told.check("to the device", bool(tested.eq(2).all()), bytes=size)
            tested.fill_(3)
            memory.copy_(tested, non_blocking=True)
            if not told.tiny:
                torch.cuda.synchronize()
            told.check("to the host", bool(memory.eq(3).all()), bytes=size)
        finally:
            os.close(write)
            os.waitpid(child, 0)
        del store


def available() -> int:
    """Bytes of host memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


@contextlib.contextmanager
def fake_or_real(told: Told) -> Iterator[torch.device]:
    if not told.tiny:
        yield torch.device("cuda", 0)
        return
    import pytest

    from tests.fake_cuda import install

    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        yield torch.device("cuda:1")
