"""One CUDA device whose streams run as late, and in as odd an order, as their events allow; it computes on the CPU.

Where `fake_cuda` says which device a call is about, this one says when something runs. What is queued on a stream runs
later: when the host waits for it, or at random before. The memory of the device is handed out again as soon as
the host has freed it, and filled with NaN by the stream that is current then. So a wait or record that is missing in
`grass_dist.states` shows as a wrong number, though nothing here is a GPU.

Tensors on the device are told from others by their memory. They take part in what dispatches, and say that they are on
the device; what reads memory past the dispatcher (`tolist`, printing) sees whatever is there.
"""

from __future__ import annotations

import ctypes
import random
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda:1")
"""It is not the current device."""
ARENA, BLOCK = 1 << 21, 64
"""Bytes of the device, and what sizes are rounded up to."""
SLOTH = (0.02, 0.3, 1.0)
"""How readily a stream runs; drawn anew now and then."""


class Event:
    def __init__(self, cuda: LateCuda) -> None:
        self._cuda, self.asked, self.came = cuda, 0, 0

    def record(self, stream: Stream) -> None:
        self.asked += 1
        number = self.asked

        def comes() -> None:
            self.came = number

        self._cuda.push(stream, comes)

    def query(self) -> bool:
        self._cuda.linger()
        return self.came == self.asked

    def synchronize(self) -> None:
        if self.came != self.asked:
            self._cuda.host_waits(lambda: self.came == self.asked)

    def elapsed_time(self, other: Event) -> float:
        for event in (self, other):
            assert event.asked and event.came == event.asked, "the time of an event that has not come"
        return 1.0


class Stream:
    def __init__(self, cuda: LateCuda, device: torch.device) -> None:
        self._cuda, self.device = cuda, device
        self.queued: deque[tuple[Callable[[], bool], Callable[[], object]]] = deque()
        self.readiness = cuda.rng.choice(SLOTH)

    def wait_event(self, event: Event) -> None:
        if number := event.asked:  # else there is nothing to wait for
            self._cuda.push(self, lambda: None, lambda: event.came >= number)

    def synchronize(self) -> None:
        self._cuda.host_waits(lambda: not self.queued)


class LateCuda:
    """Attributes:
    quiet: the host must not wait for the device now.
    pinned: bytes of each registered buffer, by its address.
    complaints: what went wrong where nobody hears of an error.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.quiet = False
        self.pinned: dict[int, int] = {}
        self.complaints: list[str] = []
        self._lock = threading.RLock()
        self._arena = torch.zeros(ARENA, dtype=torch.uint8)
        self._base, self._top = self._arena.data_ptr(), 0
        self._free: dict[tuple[Stream, int], list[int]] = {}
        self._streams: list[Stream] = []
        self._defaults = {index: self.stream_of(torch.device("cuda", index)) for index in (0, 1)}
        self._of_thread = threading.local()

    # --- when things run

    def push(self, stream: Stream, job: Callable[[], object], ready: Callable[[], bool] = lambda: True) -> None:
        with self._lock:
            stream.queued.append((ready, job))
        self.linger()

    def linger(self) -> None:
        """The device gets something done, or nothing."""
        while self.rng.random() < 0.5:
            self._advance(must=False)

    def host_waits(self, until: Callable[[], bool]) -> None:
        assert not self.quiet, "the host waits for the device"
        while not until():
            assert self._advance() or until(), "the device waits for ever"

    def idle(self) -> bool:
        return not any(stream.queued for stream in self._streams)

    def _advance(self, *, must: bool = True) -> bool:
        """Runs one thing that can run; where it need not, a stream may be too slow for it."""
        with self._lock:
            able = [stream for stream in self._streams if stream.queued and stream.queued[0][0]()]
            if not able:
                return False
            stream = self.rng.choices(able, [stream.readiness for stream in able])[0]
            if not must and self.rng.random() > stream.readiness:
                return False
            if self.rng.random() < 0.05:
                stream.readiness = self.rng.choice(SLOTH)
            _, job = stream.queued.popleft()
            with self._computes():
                job()
            return True

    @contextmanager
    def _computes(self) -> Iterator[None]:
        """While it lasts, what this thread calls is what the device does."""
        before, self._of_thread.computes = self.computes, True
        try:
            yield
        finally:
            self._of_thread.computes = before

    @property
    def computes(self) -> bool:
        return getattr(self._of_thread, "computes", False)

    # --- memory

    def holds(self, tensor: torch.Tensor) -> bool:
        return self._base <= tensor.data_ptr() < self._base + ARENA

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Memory as torch's allocator gives it: what the stream has freed last comes first, whatever still uses it."""
        nbytes, stream = max(1, -(-shape.numel() * dtype.itemsize // BLOCK)) * BLOCK, self.current_stream(DEVICE)
        free = self._free.setdefault((stream, nbytes), [])
        if free:
            start = free.pop()
        else:
            start, self._top = self._top, self._top + nbytes
            assert self._top <= ARENA
        kind: Any = type("Block", (ctypes.c_ubyte * nbytes,), {})  # of its own: it can be told when it goes
        block = kind.from_address(self._base + start)
        weakref.finalize(block, free.append, start)
        raw = torch.frombuffer(block, dtype=torch.uint8)
        self.push(stream, lambda: self._arena[start : start + nbytes].fill_(0xFF))
        return raw[: shape.numel() * dtype.itemsize].view(dtype).view(shape)

    def put(self, value: torch.Tensor) -> torch.Tensor:
        """A copy on the device, which the current stream makes."""
        made, value = self.empty(value.shape, value.dtype), value.clone()
        target = self._by_address(made)
        self.push(self.current_stream(DEVICE), lambda: target.copy_(value))
        return made

    def _by_address(self, value: Any) -> Any:
        """What a kernel knows of a tensor on the device: where it is. It does not keep it."""
        if not torch.is_tensor(value):
            return value
        if not self.holds(value):
            return value.detach()
        start = value.data_ptr() - self._base
        flat = self._arena[start : start + (ARENA - start) // 8 * 8].view(value.dtype)
        return flat.as_strided(value.shape, value.stride())

    # --- what dispatches

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.computes:
            return func(*args, **kwargs)
        tensors = [leaf for leaf in (*args, *kwargs.values()) if torch.is_tensor(leaf)]
        host = [tensor for tensor in tensors if not self.holds(tensor)]
        returns = func._schema.returns
        if len(host) == len(tensors):
            return func(*args, **kwargs)
        if returns and all(own.alias_info is not None and not own.alias_info.is_write for own in returns):
            return func(*args, **kwargs)  # a view
        stream = self.current_stream(DEVICE)
        if not all("Tensor" in str(own.type) for own in returns):
            self.host_waits(lambda: not stream.queued)
            return func(*args, **kwargs)
        if host := [tensor for tensor in host if tensor.ndim]:
            assert func is torch.ops.aten.copy_.default, f"{func} of tensors on the host and on the device"
            return self._copy(stream, *args)
        known = [self._by_address(own) for own in args], {name: self._by_address(own) for name, own in kwargs.items()}
        if returns[0].alias_info is not None:
            self.push(stream, lambda: func(*known[0], **known[1]))
            return args[0]
        made = self.empty((like := func(*args, **kwargs)).shape, like.dtype)
        target = self._by_address(made)
        self.push(stream, lambda: target.copy_(func(*known[0], **known[1])))
        return made

    def _copy(self, stream: Stream, target: torch.Tensor, source: torch.Tensor, asynchronous: bool = False) -> Any:
        """Between host and device. CUDA reads memory that is not pinned at once, and waits where it writes to it."""
        to_device = self.holds(target)
        pinned = self._is_pinned(source if to_device else target)
        ours, theirs = self._by_address(target), self._by_address(source)
        if to_device and not pinned:
            theirs = theirs.clone()
        self.push(stream, lambda: ours.copy_(theirs))
        if not (asynchronous and (pinned or to_device)):
            self.host_waits(lambda: not stream.queued)
        return target

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(start <= first and last <= start + nbytes for start, nbytes in self.pinned.items())

    # --- what torch.cuda has

    def stream_of(self, device: Any = None) -> Stream:
        with self._lock:
            self._streams.append(Stream(self, self._named(device)))
        return self._streams[-1]

    def _named(self, device: Any) -> torch.device:
        return torch.device("cuda", self._standing()["device"]) if device is None else torch.device(device)

    def _standing(self) -> dict[Any, Any]:
        return self._of_thread.__dict__.setdefault("standing", {"device": 0, **self._defaults})

    def current_stream(self, device: Any = None) -> Stream:
        return self._standing()[self._named(device).index]

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        with self._stands({"device": torch.device(device).index}):
            yield

    @contextmanager
    def stream(self, stream: Stream | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        with self._stands({"device": stream.device.index, stream.device.index: stream}), Dispatched(self):
            yield

    @contextmanager
    def _stands(self, changed: dict[Any, Any]) -> Iterator[None]:
        standing = self._standing()
        before = {name: standing[name] for name in changed}
        standing.update(changed)
        try:
            yield
        finally:
            standing.update(before)

    def synchronize(self, device: Any = None) -> None:
        device = self._named(device)
        self.host_waits(lambda: not any(stream.queued for stream in self._streams if stream.device == device))

    def register(self, address: int, nbytes: int, flags: int) -> int:
        assert self.idle(), "memory is registered while the device works"
        assert self._standing()["device"] == DEVICE.index, "memory is registered for another device"
        self.pinned[address] = nbytes
        return 0

    def unregister(self, address: int) -> int:
        if not self.idle():
            self.complaints.append("memory is released while the device works")
        if self._standing()["device"] != DEVICE.index:
            self.complaints.append("memory is released for another device")
        del self.pinned[address]
        return 0


class Dispatched(TorchDispatchMode):
    def __init__(self, cuda: LateCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._cuda.call(func, args, kwargs or {})


class Called(TorchFunctionMode):
    """Functions that are told to make something on the device."""

    def __init__(self, cuda: LateCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to and not self._cuda.computes:
            return self._to(*args, **kwargs)
        if kwargs.get("device") is None or torch.device(kwargs["device"]).type != "cuda":
            return func(*args, **kwargs)
        made = func(*args, **{**kwargs, "device": "cpu"})
        return self._cuda.empty(made.shape, made.dtype) if func is torch.empty else self._cuda.put(made)

    def _to(
        self, tensor: Any, *given: Any, device: Any = None, dtype: Any = None, non_blocking=False, copy=False
    ) -> Any:
        for value in given:
            dtype = value if isinstance(value, torch.dtype) else dtype
            device = value if isinstance(value, torch.device | str) else device
        there = self._cuda.holds(tensor)
        wanted = there if device is None else torch.device(device).type == "cuda"
        if there == wanted:
            return tensor.to(dtype=dtype or tensor.dtype, copy=copy)
        shape, dtype = tensor.shape, dtype or tensor.dtype
        made = self._cuda.empty(shape, dtype) if wanted else torch.empty(shape, dtype=dtype)
        return made.copy_(tensor, non_blocking=non_blocking)


@contextmanager
def late_cuda(seed: int) -> Iterator[LateCuda]:
    """While it lasts, it is `torch.cuda`."""
    cuda = LateCuda(seed)
    runtime = SimpleNamespace(cudaHostRegister=cuda.register, cudaHostUnregister=cuda.unregister)
    replaced = {
        "Stream": cuda.stream_of,
        "Event": lambda **_: Event(cuda),
        "current_stream": cuda.current_stream,
        "stream": cuda.stream,
        "device": cuda.device,
        "synchronize": cuda.synchronize,
        "cudart": lambda: runtime,
    }
    device_of: Any = torch._C.TensorBase.device
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in replaced.items():
            patch.setattr(torch.cuda, name, value)
        where = property(lambda tensor: DEVICE if cuda.holds(tensor) else device_of.__get__(tensor))
        patch.setattr(torch.Tensor, "device", where, raising=False)
        patch.setattr(torch.Tensor, "is_cuda", property(cuda.holds), raising=False)
        stack.enter_context(Dispatched(cuda))
        stack.enter_context(Called(cuda))
        yield cuda
