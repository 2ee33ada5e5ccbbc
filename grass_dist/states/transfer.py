"""Queued copies between host buffers and device slots, with an event for each, and the count of what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from grass_dist.errors import GrassError
from grass_dist.events import Traffic
from grass_dist.states.chaos import ChaosQueue, poison
from grass_dist.states.streams import CudaQueue, InlineQueue, Queue, StreamEvent, ThreadQueue

ByteRun = tuple[torch.Tensor, torch.Tensor]
"""(device, host): two tensors of as many entries that hold the same values, before or after a copy."""


class TransferEngine:
    """Has one queue for each direction, host to device and back, beside the compute.

    A job waits for the events that it is given and for nothing else; on CUDA and on CPU threads each direction runs in
    its order besides, which nothing may rely on. Nothing here takes part in a collective, or makes the host wait
    for the device.

    Args:
        device: of the slots.
        mapped: the host memory is a file, which CUDA cannot copy from by itself.
        chaos: seed of `ChaosQueue`s instead of all three; None for a run that counts.
        inline: the caller computes on the states itself, between jobs, so that chaos leaves the compute alone.
    """

    def __init__(
        self, device: torch.device, *, mapped: bool = False, chaos: int | None = None, inline: bool = False
    ) -> None:
        self.traffic = Traffic()
        self._chaos = chaos is not None
        self._copied: list[StreamEvent] = []
        self._computed: list[StreamEvent] = []
        self._to_device: Queue
        self._to_host: Queue
        self._compute: Queue
        if chaos is not None:
            self._to_device, self._to_host = ChaosQueue(3 * chaos), ChaosQueue(3 * chaos + 1)
            self._compute = InlineQueue() if inline else ChaosQueue(3 * chaos + 2)
        elif device.type == "cuda" and not mapped:
            self._to_device, self._to_host = (CudaQueue(device, torch.cuda.Stream(device)) for _ in range(2))
            self._compute = CudaQueue(device)
        else:
            self._to_device, self._to_host = ThreadQueue(device), ThreadQueue(device)
            self._compute = CudaQueue(device) if device.type == "cuda" else InlineQueue()

    def allocated(self, memory: torch.Tensor) -> StreamEvent:
        """The moment from which a copy may write to ``memory``, which the device's allocator has just handed out.

        The allocator hands memory out as soon as the host has freed it, though kernels that the compute has queued may
        still use it. That is safe for what the compute does next, and for nothing else. Chaos has such a kernel run
        late, and fill the memory.
        """
        if self._chaos:
            return self._to_host.submit(partial(poison, memory), [])
        return self._compute.submit(_nothing, [])

    def to_device(
        self, name: str, runs: Sequence[ByteRun], after: Sequence[StreamEvent], *, keeps: bool = False
    ) -> StreamEvent:
        """Queues a copy of the host's side of ``runs`` over the device's, which is undefined until the event.

        Args:
            keeps: the host's side is valid afterwards, too.
        """
        self.traffic.bytes_to_device += sum(host.nbytes for _, host in runs)
        pairs = [(host, device) for device, host in runs]
        return self._copy(self._to_device, f"GRASS::h2d ({name})", pairs, after, keeps=keeps)

    def to_host(
        self, name: str, runs: Sequence[ByteRun], after: Sequence[StreamEvent], then: Callable[[], None] | None = None
    ) -> StreamEvent:
        """Queues a copy of the device's side over the host's; ``then`` runs on the host once that is queued or done."""
        self.traffic.bytes_to_host += sum(host.nbytes for _, host in runs)
        return self._copy(self._to_host, f"GRASS::d2h ({name})", runs, after, then)

    def compute(self, name: str, job: Callable[[], None], after: Sequence[StreamEvent]) -> StreamEvent:
        """Runs ``job`` on the compute once the events have come; what it stands still for is counted as waiting."""

        def named() -> None:
            with torch.profiler.record_function(name):
                job()

        event = self._compute.submit(named, after)
        self._computed.append(event)
        return event

    def wait(self, event: StreamEvent) -> None:
        """Makes what the caller computes next wait for ``event``; counted too."""
        if not event.done():
            self.compute("GRASS::wait", _nothing, [event]).wait()
        else:
            event.synchronize()  # it may have failed

    def harvest(self) -> Traffic:
        """`traffic` with the times of all that has ended by now."""
        self.traffic.seconds += sum(event.seconds for event in _take_ended(self._copied))
        self.traffic.waited += sum(event.waited for event in _take_ended(self._computed))
        return self.traffic

    def _copy(
        self,
        queue: Queue,
        name: str,
        pairs: Sequence[ByteRun],
        after: Sequence[StreamEvent],
        then: Callable[[], None] | None = None,
        *,
        keeps: bool = False,
    ) -> StreamEvent:
        chaos = self._chaos and not keeps  # a job that held the engine would keep its threads from ending

        def job() -> None:
            with torch.profiler.record_function(name):
                try:
                    for source, target in pairs:
                        target.copy_(source, non_blocking=True)
                except Exception as error:
                    raise GrassError(f"{name} failed: {error}") from error
            if chaos:
                for source, _ in pairs:
                    poison(source)
            if then is not None:
                then()

        self.traffic.copies += 1
        event = queue.submit(job, after)
        self._copied.append(event)
        return event


def _take_ended(events: list[StreamEvent]) -> list[StreamEvent]:
    ended, running = [], []
    for event in events:
        (ended if event.done() else running).append(event)
    events[:] = running
    return ended


def _nothing() -> None:
    pass
