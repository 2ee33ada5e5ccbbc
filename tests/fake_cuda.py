"""Two CUDA devices, as far as their bookkeeping goes: which device each call of `torch.cuda` is about.

Nothing computes on them. Streams run a job when it is submitted, tensors stay on the CPU. It holds the code to the
device that it was given, whichever is the current one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch


class FakeCuda:
    """Attributes:
    current: index of the current device.
    calls: (what, index of the device that it was about) in their order.
    register_status, unregister_status: what the next call with host memory answers; 0 is success.
    pending: an error that CUDA keeps until somebody asks for it.
    """

    def __init__(self) -> None:
        self.current = 0
        self.calls: list[tuple[str, int]] = []
        self.register_status = self.unregister_status = 0
        self.pending = False
        self._streams: dict[int, Any] = {}
        self.cudart = SimpleNamespace(
            cudaHostRegister=self._register, cudaHostUnregister=self._unregister, cudaGetLastError=self._last_error
        )

    def index(self, device: Any) -> int:
        if device is None:
            return self.current
        if isinstance(device, int):
            return device
        index = torch.device(device).index
        return self.current if index is None else index

    def devices(self, what: str) -> set[int]:
        """Devices that calls of a kind were about."""
        return {index for name, index in self.calls if name == what}

    def note(self, what: str, index: int) -> None:
        self.calls.append((what, index))

    # --- what torch.cuda has

    def stream_of(self, device: Any = None) -> Any:
        index = self.index(device)
        self.note("Stream", index)
        return self._made(index)

    def wait(self, index: int, event: Any) -> None:
        self.note("wait", index)
        assert event.recorded == index, "a stream waits for an event of another device"

    def current_stream(self, device: Any = None) -> Any:
        index = self.index(device)
        self.note("current_stream", index)
        if index not in self._streams:
            self._streams[index] = self._made(index)
        return self._streams[index]

    def _made(self, index: int) -> Any:
        wait = partial(self.wait, index)
        return SimpleNamespace(device=index, wait_event=wait, synchronize=lambda: self.note("wait", index))

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before, self.current = self.current, self.index(device)
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        if stream is None:
            yield
            return
        before, stood = self.current, self._streams.get(stream.device)
        self.current, self._streams[stream.device] = stream.device, stream
        try:
            yield
        finally:
            self.current = before
            self._streams.pop(stream.device)
            if stood is not None:
                self._streams[stream.device] = stood

    def event(self, **_: Any) -> Any:
        made = SimpleNamespace(recorded=None, query=lambda: True, synchronize=lambda: None)
        made.record = lambda stream: setattr(made, "recorded", stream.device)
        made.elapsed_time = lambda other: 1.0
        return made

    def synchronize(self, device: Any = None) -> None:
        self.note("synchronize", self.index(device))

    # --- the runtime

    def _register(self, address: int, nbytes: int, flags: int) -> int:
        self.note("register", self.current)
        status, self.register_status = self.register_status, 0
        self.pending = self.pending or status != 0
        return status

    def _unregister(self, address: int) -> int:
        self.note("unregister", self.current)
        self.pending = self.pending or self.unregister_status != 0
        return self.unregister_status

    def _last_error(self) -> int:
        self.note("last error", self.current)
        self.pending = False
        return 0

    def launch(self, *_: Any, **__: Any) -> torch.Tensor:
        """Any kernel: raises what is pending."""
        self.note("launch", self.current)
        if self.pending:
            self.pending = False
            raise RuntimeError("CUDA error: invalid argument")
        return torch.empty(0)


def install(patch: pytest.MonkeyPatch) -> FakeCuda:
    """Puts one in the place of `torch.cuda`; device 0 is current."""
    cuda = FakeCuda()
    replaced = {
        "Stream": cuda.stream_of,
        "Event": cuda.event,
        "current_stream": cuda.current_stream,
        "current_device": lambda: cuda.current,
        "stream": cuda.stream,
        "device": cuda.device,
        "synchronize": cuda.synchronize,
        "cudart": lambda: cuda.cudart,
        "is_available": lambda: True,
    }
    for name, value in replaced.items():
        patch.setattr(torch.cuda, name, value)
    return cuda


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return install(monkeypatch)
