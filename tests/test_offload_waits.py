"""The tests of moving states can fail: whatever orders a copy or an update is taken out in turn, and is missed.

Each mutant (`mutants`) is driven under chaos, and on a GPU whose streams are late (`late_cuda`), until a number is
wrong, the host waits where it must not, or memory is used in a way that CUDA forbids. What may be taken out without
that is in `EXEMPT`, with the reason.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from grass_dist.errors import GrassError
from grass_dist.states.layout import Layout
from tests import mutants
from tests.fake_cuda import install
from tests.late_cuda import DEVICE, late_cuda
from tests.offload_model import CPU, Toy, drive
from tests.weights_model import drive_weights
from tests.zero_states_model import drive_sums, drive_zero

MODES = ("interval", "stream")
SEEDS = 4
MOST = 60
"""Seeds that a mutant is given to show under."""
Run = Callable[[Any, int], None]
"""Drives the modules that it is given, with a seed."""


def on_late_cuda(job: Callable[..., None], parts: Any, seed: int) -> None:
    """Runs ``job`` and lets go of all that it has made, with the device as it is then."""
    with late_cuda(seed) as cuda:
        failed = None
        try:
            job(parts, seed=seed, cuda=cuda)
        except Exception as error:
            failed = error
            because: BaseException | None = error
            while because is not None:  # their frames hold what must go while the device is there
                traceback.clear_frames(because.__traceback__)
                because = because.__context__
        if failed is not None or cuda.pinned:
            gc.collect()
        if failed is not None:
            raise failed
        assert not cuda.pinned, "memory stays registered"
        assert not cuda.complaints, cuda.complaints


def chaotic(job: Callable[..., None], parts: Any, seed: int) -> None:
    job(parts, seed=seed)


WAYS: dict[Any, list[dict[str, Any]]] = {
    chaotic: [{}, {"shuffled": True}, {"inline": True}],
    on_late_cuda: [{"steps": 3}, {"steps": 3, "inline": True}, {}],
}
MOVING: list[Run] = [
    partial(run, partial(drive, mode=mode, **options))
    for run, ways in WAYS.items()
    for options in ways
    for mode in MODES
]
ZERO: list[Run] = [partial(run, partial(drive_zero, mode=mode)) for run in (chaotic, on_late_cuda) for mode in MODES]
WEIGHTS: list[Run] = [partial(run, drive_weights) for run in (chaotic, on_late_cuda)]
SUMS: list[Run] = [partial(on_late_cuda, drive_sums)]


def ordered_threads(parts: Any, seed: int) -> None:
    """A worker runs its jobs in their order, each after the events that it is given, and ends with its queue."""
    before, ran = set(threading.enumerate()), []
    first, second = (parts.streams.ThreadQueue(CPU) for _ in range(2))
    opens = threading.Event()

    def late() -> None:
        opens.wait(0.02)
        ran.append("late")

    came = first.submit(late, [])
    after = second.submit(lambda: ran.append("graph" if torch.is_grad_enabled() else "after"), [came])
    parts.streams.InlineQueue().submit(lambda: ran.append("inline"), [after])
    assert ran == ["late", "after", "inline"] and came.done() and came.seconds > 0 and after.waited > 0
    first.submit(late, []).synchronize()
    first.submit(late, []).wait()
    assert len(ran) == 5
    workers = set(threading.enumerate()) - before
    del first, second
    assert len(workers) == 2 and not any(worker.is_alive() for worker in workers)


def failing_copies(parts: Any, seed: int) -> None:
    """A copy that fails is told to whoever waits for it, before it has ended or after."""
    with contextlib.suppress(ZeroDivisionError):
        parts.streams.InlineQueue().submit(lambda: 1 / 0, [])
        raise AssertionError("the compute of a CPU fails where it is called")
    for chaos in (seed, None):
        transfers = parts.transfer.TransferEngine(CPU, chaos=chaos, inline=True)
        for ended in (False, True):
            failed = transfers.to_device("odd", [(torch.zeros(3), torch.zeros(2))], [])
            while ended and not failed.done():
                pass
            told = ""
            try:
                transfers.wait(failed)
            except GrassError as error:
                told = str(error)
            assert told.startswith("GRASS::h2d (odd) failed: ")
        assert transfers.harvest().copies == 2


def on_streams(parts: Any, seed: int, cuda: Any) -> None:
    """A job is queued on its queue's own stream, of its own device, and builds no graph."""
    seen: list[Any] = []
    compute, own = torch.cuda.current_stream(DEVICE), torch.cuda.Stream(DEVICE)

    def job() -> None:
        seen.append((torch.cuda.current_stream(DEVICE), torch.is_grad_enabled()))

    for stream in (None, own):
        parts.streams.CudaQueue(DEVICE, stream).submit(job, []).synchronize()
    assert seen == [(compute, False), (own, False)]
    parts.streams.ThreadQueue(DEVICE).submit(job, []).synchronize()
    assert seen[2][0] not in (compute, own)


def failing_registration(parts: Any, seed: int) -> None:
    """CUDA keeps no error of memory that it does not register or release, whatever torch there is."""
    for binding in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            cuda = install(patch)
            if not binding:
                del cuda.cudart.cudaGetLastError
                patch.setattr(torch, "zeros", cuda.launch)
            store = parts.store.LayerStateStore([4096], DEVICE)
            cuda.unregister_status = 1
            del store
            assert not cuda.pending
            cuda.register_status = 2
            with contextlib.suppress(GrassError):
                parts.store.LayerStateStore([4096], DEVICE)
                raise AssertionError("it was registered")
            assert not cuda.pending


def mapped_files(folder: str, parts: Any, seed: int) -> None:
    """Files are made in a folder that need not be there, and have no name any more."""
    at = Path(folder) / "new" / str(seed)
    store = parts.store.LayerStateStore([100, 0, 5000], CPU, str(at))
    assert [store[layer].numel() for layer in range(3)] == [100, 0, 5000] and not list(at.iterdir())
    at.rmdir()
    at.parent.rmdir()


def dropped_states(parts: Any, seed: int) -> None:
    """A state that never came back to the host is no longer waited for once another one takes its place."""
    toys = [Toy(i) for i in range(2)]
    store = parts.store.LayerStateStore([toy.layout.host_bytes for toy in toys], CPU)
    transfers = parts.transfer.TransferEngine(CPU)
    pool = parts.slots.SlotPool(1, max(toy.layout.device_bytes for toy in toys), CPU, transfers.allocated)
    states = parts.moving.IntervalStates(toys, pool, store, transfers, prefetch_steps=0)
    weight = torch.zeros(())
    states.enter([0])
    states.update(0, lambda: toys[0].update(1.0, weight))
    states.finish()
    with mock.patch.object(Layout, "runs", return_value=[(torch.zeros(3), torch.zeros(2))]):
        states.leave([])
    states.put(0, lambda: [view.fill_(0.0) for view in toys[0].views] and None)
    states.put(1, lambda: [view.fill_(0.0) for view in toys[1].views] and None)
    states.enter([1])
    states.update(1, lambda: toys[1].update(1.0, weight))
    states.finish()


def registered_memory(parts: Any, seed: int, cuda: Any) -> None:
    """It is registered, and released, while nothing runs on the device, whichever device is current."""
    busy = torch.cuda.Stream(DEVICE)
    numbers = torch.zeros(8, device=DEVICE)
    for _ in range(2):
        with torch.cuda.stream(busy):
            for _ in range(20):
                numbers.add_(1)
        store = parts.store.LayerStateStore([100, 0, 5000], DEVICE)
        assert len(cuda.pinned) == 2
        with torch.cuda.stream(busy):
            for _ in range(20):
                store[2][:32].view(torch.float32).copy_(numbers, non_blocking=True)
        del store
        assert not cuda.pinned


def runs(folder: str) -> dict[str, list[Run]]:
    """What the mutants of each module are driven by."""
    mapped: list[Run] = [partial(on_late_cuda, partial(drive, mode=mode, folder=folder)) for mode in MODES]
    registered = partial(on_late_cuda, registered_memory)
    return {
        "streams": [ordered_threads, partial(on_late_cuda, on_streams), failing_copies, *MOVING, *mapped],
        "transfer": [failing_copies, *MOVING, *mapped],
        "store": [registered, failing_registration, partial(mapped_files, folder), *SUMS, *mapped],
        "slots": [*MOVING, dropped_states],
        "moving": [*MOVING, dropped_states, *ZERO],
        "weights": WEIGHTS,
        "host_sums": SUMS,
        "layer_state": ZERO,
        "states": ZERO,
    }


def all_runs(folder: str) -> list[Run]:
    return list(dict.fromkeys(run for own in runs(folder).values() for run in own))


EXEMPT: dict[tuple[str, str], str] = {
    **dict.fromkeys(
        [
            ("streams", "ThreadEvent.__init__: without self._set.set()"),
            ("streams", "ThreadEvent.run: without self._set.set()"),
            ("streams", "InlineQueue.submit: without event.run(job, after)"),
            ("streams", "ThreadQueue.__init__: without thread.start()"),
            ("streams", "ThreadQueue.submit: without self._jobs.put((event, job, tuple(after)))"),
            (
                "streams",
                "_work: without event.run(job if stream is None else _then(job, stream.synchronize), after)",
            ),
            ("streams", "end_thread: without tell()"),
        ],
        "nothing would come after it: every test would hang",
    ),
    **dict.fromkeys(
        [
            ("transfer", "TransferEngine.compute.named: not within torch.profiler.record_function(name)"),
            ("transfer", "TransferEngine._copy.job: not within torch.profiler.record_function(name)"),
            (
                "states",
                "ZeroStates.updating: not within torch.profiler.record_function(f'GRASS::update ({name})')",
            ),
        ],
        "a name in a profile",
    ),
    **dict.fromkeys(
        [
            ("transfer", "TransferEngine.allocated: nothing for self._to_host.submit(partial(poison, memory), [])"),
            ("transfer", "TransferEngine._copy.job: without poison(source)"),
        ],
        "chaos itself, which finds what is wrong and is not part of a run that counts",
    ),
    **dict.fromkeys(
        [
            ("weights", "HostWeights.__init__: without self._assign()"),
            ("weights", "HostWeights.__init__: without layer.bind(self._hosts[n])"),
            ("weights", "HostWeights.leave: without self._settle()"),
            ("weights", "HostWeights.leave: without layer.come_home()"),
            ("weights", "HostWeights.pass_begins: without self._settle()"),
            ("weights", "HostWeights.pass_begins: without self.transfers.harvest()"),
            ("weights", "HostWeights.pass_begins: without self._prefetch(first - 1, down=False)"),
            ("weights", "HostWeights.forward_begins: without self._settle()"),
            ("weights", "HostWeights.forward_begins: without self._take_over(n)"),
            ("weights", "HostWeights.forward_begins: without self._running.append(n)"),
            ("weights", "HostWeights.forward_begins: without self._layers[n].bind(self._views(n))"),
            ("weights", "HostWeights.forward_begins: without self._prefetch(n, down=again and self._last != n - 1)"),
            ("weights", "HostWeights.forward_ends: without self._layers[n].bind(self._hosts[n])"),
            ("weights", "HostWeights.forward_ends: without self._bring(self._backward, trusted=True)"),
            ("weights", "HostWeights.backward_begins: without at_end_of_backward(self._backward_ends)"),
            ("weights", "HostWeights.backward_begins: without self._layers[n].bind(self._views(n))"),
            ("weights", "HostWeights.backward_begins: without self._prefetch(n, down=True)"),
            ("weights", "HostWeights._take_over: without self._empty(n)"),
            ("weights", "HostWeights._copy: without self._take_over(n)"),
            ("weights", "HostWeights._prefetch: without taken.add(at)"),
            ("weights", "HostWeights._prefetch: without self._copy(other)"),
            ("weights", "HostWeights._settle: without self._window(n).arrived.synchronize()"),
            ("weights", "HostWeights._settle: without ours.copy_(there)"),
            ("weights", "HostWeights._settle: no wait in ours.copy_(there)"),
            ("weights", "HostWeights._settle: without self._layers[n].bind(self._hosts[n])"),
            ("weights", "HostWeights._settle: without self._running.clear()"),
            ("weights", "HostWeights.close: without self._settle()"),
            ("weights", "HostWeights.close: without layer.bind([view.to(device, copy=True) for view in layer.bound])"),
        ],
        "it says where weights are or what comes early, which tests/test_host_weights.py looks at; it orders nothing",
    ),
    (
        "weights",
        "HostWeights.close: no wait in view.to(device, copy=True)",
    ): "out of registered memory, which is released when the device has come to rest",
    (
        "weights",
        "HostWeights._copy: to_device not after window.slot.free",
    ): "on a GPU the same as what the compute has queued by now, in which the allocation was; chaos has them apart",
    (
        "layer_state",
        "TargetState.exact: no wait in value.to(dtype)",
    ): "another dtype in the same memory's place: nothing goes from one device to another",
    (
        "layer_state",
        "TargetState.placed: no wait in value.to(self.device, copy=True)",
    ): "out of a file's memory, which is not pinned, so that CUDA has read it when the call returns",
    (
        "store",
        "_mapped: without os.posix_fallocate(file.fileno(), 0, max(size, 1))",
    ): "a full disk, which tests/test_offload_parts.py::test_a_full_disk_is_refused_in_one_sentence has",
}
"""What may be taken out without a wrong number, and why."""


def test_what_orders_is_found():
    names = {f"{module} {name}" for module, name in mutants.ALL}
    assert names >= {
        "moving MovingStates._in: to_device not after slot.free",
        "moving MovingStates._in: to_device not after place.left",
        "moving MovingStates._out: _read not after place.updated",
        "slots SlotPool.__init__: nothing for allocated(flat)",
        "streams CudaQueue.submit: without end.record(stream)",
        "streams CudaEvent.wait: without torch.cuda.current_stream(self._device).wait_event(self._end)",
        "store pin: without torch.cuda.synchronize()",
        "host_sums HostSums.add: a wait in host.copy_(total, non_blocking=True)",
        "states ZeroStates._use: without self.mode.ready(layer)",
    }
    assert set(EXEMPT) <= set(mutants.ALL)


@pytest.mark.parametrize("number", range(len(all_runs(""))))
def test_every_state_is_right_with_all_of_them(number, tmp_path):
    for seed in range(SEEDS):
        all_runs(str(tmp_path))[number](mutants.whole(), seed)


CASES = [case for case in mutants.ALL if case not in EXEMPT]


@pytest.mark.integration
@pytest.mark.parametrize(("module", "name"), CASES, ids=[" ".join(case) for case in CASES])
def test_a_number_is_wrong_without(module, name, tmp_path):
    parts = mutants.without(module, name)
    expected: Any = (AssertionError, GrassError) if "nothing for" in name else Exception  # a missing call breaks more
    for seed in range(MOST):
        for run in runs(str(tmp_path))[module]:
            try:
                run(parts, seed)
            except expected:
                return
    pytest.fail(f"nothing misses it in {MOST} seeds")
