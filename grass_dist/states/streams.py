"""Queues that run copies and updates beside the host: CUDA streams, or worker threads where the device is the CPU."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch

Job = Callable[[], None]


class StreamEvent(Protocol):
    """The end of a job."""

    def wait(self) -> None:
        """Holds back what the caller computes next: its current CUDA stream, or on the CPU itself."""
        ...

    def synchronize(self) -> None:
        """Holds back the host.

        Raises:
            Exception: what the job raised, or a job that it waited for.
        """
        ...

    def done(self) -> bool:
        """Whether the job has ended, whichever way."""
        ...

    @property
    def seconds(self) -> float:
        """How long the job ran, once it is `done`."""
        ...

    @property
    def waited(self) -> float:
        """How long its queue stood still for the events that the job was to run after."""
        ...


class Queue(Protocol):
    """Runs jobs. What must not run at the same time, or in another order, is tied by events alone."""

    def submit(self, job: Job, after: Sequence[StreamEvent]) -> StreamEvent:
        """Queues ``job`` to run when the events of ``after`` have come; returns at once."""
        ...


class ThreadEvent:
    """An event that a thread sets."""

    def __init__(self, done: bool = False) -> None:
        self._set = threading.Event()
        self._error: BaseException | None = None
        self.seconds = self.waited = 0.0
        if done:
            self._set.set()

    def run(self, job: Job, after: Sequence[StreamEvent]) -> None:
        """Runs ``job`` after the others and sets the event; a failure is kept for those who wait."""
        called = time.perf_counter()
        waits = not all(event.done() for event in after)
        try:
            for event in after:
                event.synchronize()
            began = time.perf_counter()
            self.waited = began - called if waits else 0.0
            job()
            self.seconds = time.perf_counter() - began
        except BaseException as error:
            self._error = error
        finally:
            self._set.set()

    def wait(self) -> None:
        self.synchronize()

    def synchronize(self) -> None:
        self._set.wait()
        if self._error is not None:
            raise self._error

    def done(self) -> bool:
        return self._set.is_set()


class InlineQueue:
    """The compute of a CPU: the caller waits and runs the job itself."""

    def submit(self, job: Job, after: Sequence[StreamEvent]) -> StreamEvent:
        event = ThreadEvent()
        event.run(job, after)
        event.synchronize()
        return event


class ThreadQueue:
    """A worker thread that runs its queue in order.

    With a CUDA ``device`` the jobs are copies from or to memory that is not pinned: they run on a stream of the
    thread's, and end when that has.
    """

    def __init__(self, device: torch.device) -> None:
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        thread = threading.Thread(target=_work, args=(self._jobs, device), name="grass_dist copies", daemon=True)
        thread.start()
        weakref.finalize(self, end_thread, thread, partial(self._jobs.put, None))

    def submit(self, job: Job, after: Sequence[StreamEvent]) -> StreamEvent:
        event = ThreadEvent()
        self._jobs.put((event, job, tuple(after)))
        return event


def _work(jobs: queue.SimpleQueue[Any], device: torch.device) -> None:
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    while (item := jobs.get()) is not None:
        event, job, after = item
        with torch.no_grad(), torch.cuda.stream(stream):
            event.run(job if stream is None else _then(job, stream.synchronize), after)
        del item, event, job, after  # or a job's memory would live until the next comes


def end_thread(thread: threading.Thread, tell: Callable[[], None]) -> None:
    """Lets a worker finish what is queued: one that is in a copy when the interpreter ends would abort the process."""
    tell()
    if thread is not threading.current_thread():
        thread.join(timeout=60)


def _then(first: Job, second: Job) -> Job:
    def both() -> None:
        first()
        second()

    return both


class CudaEvent:
    """The end of a job on a CUDA stream."""

    def __init__(
        self, device: torch.device, called: torch.cuda.Event, start: torch.cuda.Event, end: torch.cuda.Event
    ) -> None:
        self._device = device
        self._called, self._start, self._end = called, start, end

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._end)

    def synchronize(self) -> None:
        self._end.synchronize()

    def done(self) -> bool:
        return self._end.query()

    @property
    def seconds(self) -> float:
        return self._start.elapsed_time(self._end) / 1000

    @property
    def waited(self) -> float:
        return self._called.elapsed_time(self._start) / 1000


class CudaQueue:
    """A CUDA stream of ``device``, which need not be the current device.

    What a job uses on another stream than the compute must outlive it: slots and host buffers do, which are there for
    the whole run, and host memory is released when the device has come to rest.

    Args:
        stream: None is the stream that is current on the device when a job is submitted, which is the compute.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self._device, self._stream = device, stream

    def submit(self, job: Job, after: Sequence[StreamEvent]) -> StreamEvent:
        stream = self._stream or torch.cuda.current_stream(self._device)
        with torch.no_grad(), torch.cuda.stream(stream):
            called, start, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            called.record(stream)
            for event in after:
                event.wait()
            start.record(stream)
            job()
            end.record(stream)
        return CudaEvent(self._device, called, start, end)
