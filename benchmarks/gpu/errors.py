"""CUDA keeps the error of a failed registration, and raises it at the next kernel: unless somebody takes it away."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.gpu.told import Told
from grass_dist.errors import GrassError
from grass_dist.states import store


def show(told: Told) -> None:
    for name, binding in (("cleared by cudaGetLastError", True), ("cleared by a kernel", False)):
        told.attempt(name, lambda name=name, binding=binding: refused(told, name, binding=binding))


def refused(told: Told, name: str, *, binding: bool) -> None:
    """Registers memory twice, and then launches a kernel."""
    with runtime(told, binding=binding) as (device, fail, launch):
        if launch is None:
            told.left_out(name, "this torch has no cudaGetLastError")
            return
        memory = torch.empty(2**22, dtype=torch.uint8)
        store.pin(memory, device)
        fail()
        try:
            store.pin(memory, device)
        except GrassError as error:
            said = str(error)
        else:
            said = ""
        try:
            launch()
            clean = True
        except RuntimeError:
            clean = False
        store.unpin(memory, device)
        told.check(name, bool(said) and clean, refused=bool(said), next_kernel_ran=clean)


Runtime = tuple[torch.device, Callable[[], None], Callable[[], object] | None]
"""The device, what makes the next registration fail, and a kernel; None where this way does not exist."""


@contextlib.contextmanager
def runtime(told: Told, *, binding: bool) -> Iterator[Runtime]:
    """The GPU's own runtime, or the stand-in; with cudaGetLastError or, as older releases of torch, without."""
    if told.tiny:
        import pytest

        from tests.fake_cuda import install

        with pytest.MonkeyPatch.context() as patch:
            cuda = install(patch)
            if not binding:
                del cuda.cudart.cudaGetLastError
                patch.setattr(torch, "zeros", cuda.launch)
            yield torch.device("cuda:1"), lambda: setattr(cuda, "register_status", 712), cuda.launch
        return
    device, real = torch.device("cuda", 0), store._cudart()

    def launch() -> None:
        torch.zeros(1024, device=device).add_(1)
        torch.cuda.synchronize()

    if binding and not hasattr(real, "cudaGetLastError"):
        yield device, lambda: None, None
        return
    names = ("cudaHostRegister", "cudaHostUnregister")
    without: Any = SimpleNamespace(**{name: getattr(real, name) for name in names})
    before = store._cudart
    store._cudart = (lambda: real) if binding else (lambda: without)
    try:
        yield device, lambda: None, launch
    finally:
        store._cudart = before
