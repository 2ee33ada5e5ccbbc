"""The parts of moving states, each by itself: layout, birth, host buffers, slots, queues and the plan."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from grass_dist import ConfigError, GrassConfig, GrassError, GrassOptimizer
from grass_dist.model.discovery import Unit
from grass_dist.model.sharding import Sharding
from grass_dist.ranks import Ranks
from grass_dist.states import plan
from grass_dist.states.layout import Field, Layout
from grass_dist.states.moving import IntervalStates
from grass_dist.states.plan import Plan, free_host_memory, make_plan
from grass_dist.states.slots import SlotPool
from grass_dist.states.store import PAGE, LayerStateStore
from grass_dist.states.streams import ThreadEvent, ThreadQueue
from grass_dist.states.transfer import TransferEngine
from grass_dist.states.unit_optimizer import UnitOptimizer
from grass_dist.states.update_rule import ELEMENTWISE
from tests.offload_model import Toy
from tests.tiny import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# --- layout


def test_where_the_fields_lie():
    shape = torch.Size([3, 5])  # 60 bytes, which take 64
    fields = [
        Field("w/master", shape, torch.float32),
        Field("w/exp_avg", shape, torch.float32, narrow=True),
        Field("w/exp_avg_sq", shape, torch.float32, narrow=True),
        Field("w/odd", torch.Size([2]), torch.float64),
    ]
    flat = torch.empty(256, dtype=torch.uint8)
    exact, rounded = Layout(fields), Layout(fields, torch.bfloat16)
    assert (exact.device_bytes, exact.host_bytes) == (256, 256)
    assert (rounded.device_bytes, rounded.host_bytes) == (256, 192)

    def starts(views: list[torch.Tensor]) -> list[int]:
        return [view.data_ptr() - flat.data_ptr() for view in views]

    assert starts(exact.device_views(flat)) == starts(exact.host_views(flat)) == [0, 64, 128, 192]
    assert starts(rounded.device_views(flat)) == [0, 128, 192, 64]  # first what is exact
    assert starts(rounded.host_views(flat)) == [0, 128, 160, 64]
    assert [view.dtype for view in rounded.host_views(flat)] == [
        *[torch.float32, torch.bfloat16, torch.bfloat16, torch.float64]
    ]
    assert [(device.nbytes, host.nbytes) for device, host in rounded.runs(flat, flat)] == [(128, 128), (128, 64)]
    assert [(device.nbytes, host.nbytes) for device, host in exact.runs(flat, flat)] == [(256, 256)]


shapes = st.lists(st.integers(0, 7), max_size=3).map(torch.Size)
fields_of = st.lists(
    st.one_of(
        st.builds(Field, st.just(""), shapes, st.sampled_from([torch.float32, torch.bfloat16, torch.float64])),
        st.builds(Field, st.just(""), shapes, st.just(torch.float32), st.just(True)),
    ),
    max_size=6,
)
host_dtypes = st.sampled_from([None, torch.bfloat16])


@given(fields_of, host_dtypes)
def test_fields_are_disjoint_aligned_and_leave_no_more_room(fields, dtype):
    layout = Layout(fields, dtype)
    narrow = [field.narrow and dtype is not None for field in fields]
    padded = [-(-field.nbytes // 64) * 64 for field in fields]
    assert layout.device_bytes == sum(padded)
    assert layout.host_bytes == sum(size // (1 + halved) for size, halved in zip(padded, narrow, strict=True))
    for views_of, nbytes, aligned in (
        (layout.device_views, layout.device_bytes, 64),
        (layout.host_views, layout.host_bytes, 32 if any(narrow) else 64),
    ):
        flat = torch.zeros(nbytes, dtype=torch.uint8)
        views = views_of(flat)
        assert [view.shape for view in views] == [field.shape for field in fields]
        assert all((view.data_ptr() - flat.data_ptr()) % aligned == 0 for view in views if view.numel())
        for view in views:
            view.view(-1).view(torch.uint8).add_(1)
        assert set(flat.tolist()) <= {0, 1} and flat.sum() == sum(view.nbytes for view in views)
    assert [view.dtype for view in layout.device_views(torch.empty(layout.device_bytes, dtype=torch.uint8))] == [
        field.dtype for field in fields
    ]


@given(fields_of, host_dtypes, st.integers(0, 99))
def test_a_round_trip_keeps_masters_and_rounds_moments_once(fields, dtype, seed):
    layout = Layout(fields, dtype)
    slot, host = (torch.zeros(n, dtype=torch.uint8) for n in (layout.device_bytes, layout.host_bytes))
    numbers = [torch.randn(f.shape, generator=torch.Generator().manual_seed(seed)).to(f.dtype) for f in fields]
    for view, number in zip(layout.device_views(slot), numbers, strict=True):
        view.copy_(number)
    narrow = [field.narrow and dtype is not None for field in fields]
    rounded = [n.bfloat16().float() if is_narrow else n for n, is_narrow in zip(numbers, narrow, strict=True)]
    for _ in range(2):
        for device, pinned in layout.runs(slot, host):
            pinned.copy_(device)
        for view, number in zip(layout.host_views(host), rounded, strict=True):
            assert torch.equal(view.to(number.dtype), number)
        slot.fill_(0xFF)
        for device, pinned in layout.runs(slot, host):
            device.copy_(pinned)
        for view, number in zip(layout.device_views(slot), rounded, strict=True):
            assert torch.equal(view, number)


# --- birth


class Odd(torch.optim.Optimizer):
    """Makes its states in another order than it keeps them in, one by other means, and something for the moment."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                passing = torch.zeros_like(p)
                if not state:
                    second, first = torch.zeros_like(p), torch.zeros_like(p)
                    state.update(first=first, rows=p.grad.reshape(len(p), -1).sum(1), second=second)
                passing.add_(p.grad)
                state["first"].add_(passing)
                state["second"].add_(passing, alpha=2)
                p.sub_(state["first"] + state["second"], alpha=group["lr"])


RULES = [
    *[(cls, {}) for cls in sorted(ELEMENTWISE, key=lambda cls: cls.__name__)],
    *[(cls, {"amsgrad": True}) for cls in (torch.optim.Adam, torch.optim.AdamW)],
    *[(cls, {"foreach": False}) for cls in (torch.optim.AdamW, torch.optim.NAdam)],
    (torch.optim.AdamW, {"fused": True}),
    *[(torch.optim.SGD, {"momentum": 0.9, "nesterov": nesterov}) for nesterov in (False, True)],
    (torch.optim.RMSprop, {"momentum": 0.9}),
    (torch.optim.RMSprop, {"centered": True}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.3}),
    (torch.optim.Adafactor, {}),
    (Odd, {}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("cls", "kwargs"), RULES, ids=lambda part: getattr(part, "__name__", None) or str(part))
def test_a_state_is_made_as_predicted_and_as_the_class_makes_it(cls, kwargs, dtype):
    generator = torch.Generator().manual_seed(1)
    sizes = {"weight": (4, 3), "bias": (4,), **({"gain": (1,)} if cls in ELEMENTWISE else {})}
    params = {name: nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for name, size in sizes.items()}
    targets = {name: nn.Parameter(p.detach().clone().float()) for name, p in params.items()}
    alone = cls(targets.values(), **kwargs)  # on what would be masters
    group = {k: v for k, v in alone.param_groups[0].items() if k != "params"}
    groups = [{**group, "params": list(params.values())}]
    unit = Unit("unit", 0, tuple(params.items()))
    optimizer = UnitOptimizer(unit, [0] * len(params), cls, kwargs, Sharding(Ranks()))

    fields = optimizer.fields(groups)
    layout = Layout(fields)
    flat = torch.full((layout.device_bytes,), 0xFF, dtype=torch.uint8)
    homes = dict(zip((field.name for field in fields), layout.device_views(flat), strict=True))
    optimizer.state.bind(list(homes.values()), resident=True)
    for _ in range(3):
        for name, p in params.items():
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            targets[name].grad = p.grad.float()
        optimizer.step(groups)
        alone.step()
        kept = {
            f"{name}/{key}": (value, alone.state[targets[name]][key] if key != "master" else targets[name])
            for at, name in enumerate(params)
            for key, value in optimizer.state_of(at).items()
            if torch.is_tensor(value) and value.ndim
        }
        assert {name: (value.shape, value.dtype) for name, (value, _) in kept.items()} == {
            field.name: (field.shape, field.dtype) for field in fields
        }
        assert all(value.data_ptr() == homes[name].data_ptr() for name, (value, _) in kept.items())
        assert [name for name, (ours, theirs) in kept.items() if not torch.equal(ours, theirs)] == []
        assert all(torch.equal(p, targets[name].to(dtype)) for name, p in params.items())
    assert [field.name for field in fields if field.narrow] == [
        field.name for field in fields if not field.name.endswith("/master")
    ]


class Unwilling(torch.optim.SGD):
    def step(self, closure=None):
        if not all(p.grad.any() for group in self.param_groups for p in group["params"]):
            raise RuntimeError("a gradient of zeros")
        return super().step(closure)


def test_a_class_that_needs_real_parameters_stays_on_the_device(caplog):
    def made(**offload):
        config = GrassConfig(active_layers=2, offload=offload)
        return GrassOptimizer(tiny(), Unwilling, {"lr": 0.1}, config=config)

    made()
    why = "Unwilling does not say what it keeps: a gradient of zeros"
    assert caplog.messages == [f"States stay on the device (grass.offload.mode='none'): {why}."]
    with pytest.raises(ConfigError) as refusal:
        made(mode="stream")
    assert str(refusal.value) == f"offload.mode='stream': states cannot move: {why}; use 'none'."
    made(mode="none")


# --- host buffers


def test_host_buffers_share_neither_pages_nor_storages():
    sizes = [100, 5000, 0, PAGE] + [7] * 20
    store = LayerStateStore(sizes, CPU)
    buffers = [store[i] for i in range(24)]
    assert [buffer.numel() for buffer in buffers] == sizes and store.nbytes == 100 + 5000 + PAGE + 140
    assert all(buffer.data_ptr() % PAGE == 0 for buffer in buffers if buffer.numel())
    pages = [set(range(b.data_ptr() // PAGE, -(-(b.data_ptr() + b.numel()) // PAGE))) for b in buffers]
    assert len(set().union(*pages)) == sum(map(len, pages)) == 1 + 2 + 0 + 1 + 20
    assert len({buffer.untyped_storage().data_ptr() for buffer in buffers}) == 24


def mapped() -> list[str]:
    """Files of states that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines() if Path("/proc/self/maps").exists() else []
    return [line.split(maxsplit=5)[5] for line in lines if "grass_states" in line]


def test_a_folder_holds_the_states_in_files_without_a_name(tmp_path):
    folder = tmp_path / "new" / "scratch"
    store = LayerStateStore([5000, 0, 100], CPU, str(folder))
    assert list(folder.iterdir()) == []
    assert len(mapped()) in (0, 3) and all(name.endswith("(deleted)") for name in mapped())
    assert [store[i].numel() for i in range(3)] == [5000, 0, 100]
    numbers = torch.arange(1250.0)
    transfers, slot = TransferEngine(CPU, mapped=True), torch.zeros(5000, dtype=torch.uint8)
    slot.view(torch.float32).copy_(numbers)
    left = transfers.to_host("layer", [(slot, store[0])], [])
    store[2].fill_(9)
    left.synchronize()
    slot.zero_()
    transfers.to_device("layer", [(slot, store[0])], [left]).synchronize()
    assert torch.equal(slot.view(torch.float32), numbers) and store[2].eq(9).all()
    del store, transfers, left
    gc.collect()
    assert mapped() == []


@pytest.fixture
def memory_disk() -> Iterator[Path]:
    """A folder on a file system that says at once when a file is too long for it."""
    kinds = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()] if os.name == "posix" else []
    if ["/dev/shm", "tmpfs"] not in kinds or not shutil.disk_usage("/dev/shm").total:
        pytest.skip("needs /dev/shm")
    folder = tempfile.mkdtemp(dir="/dev/shm")
    yield Path(folder)
    shutil.rmtree(folder)


def test_a_full_disk_is_refused_in_one_sentence(memory_disk):
    with pytest.raises(ConfigError) as refusal:
        LayerStateStore([100, shutil.disk_usage(memory_disk).total + PAGE], CPU, str(memory_disk))
    assert str(refusal.value) == (
        f"offload.folder='{memory_disk}': No space left on device; free space for the states of all layers."
    )
    del refusal  # which keeps the file that there was room for
    gc.collect()
    assert list(memory_disk.iterdir()) == [] and mapped() == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, problem in (
        (str(tmp_path / "file"), "File exists"),
        (str(tmp_path / "file" / "inside"), "Not a directory"),
        ("/proc/states", "No such file or directory"),
    ):
        with pytest.raises(ConfigError) as refusal:
            LayerStateStore([100], CPU, folder)
        assert str(refusal.value) == f"offload.folder='{folder}': {problem}; choose another folder."
    config = GrassConfig(active_layers=2, offload={"folder": str(tmp_path / "file")})
    with pytest.raises(ConfigError, match=r"^offload\.folder=.*File exists; choose another folder\.$"):
        GrassOptimizer(tiny(), torch.optim.AdamW, config=config)


def test_memory_that_cannot_be_had_is_refused_in_one_sentence():
    with pytest.raises(GrassError, match=r"^1,152,921,504,606,846,976 bytes of host memory .* cannot be had: "):
        LayerStateStore([2**60], CPU)


# --- slots


def done(memory: torch.Tensor) -> ThreadEvent:
    return ThreadEvent(done=True)


def test_slots_are_reused_in_the_order_of_their_return():
    pool = SlotPool(3, 100, CPU, done)
    first, second = pool.take(), pool.take()
    assert (len(pool), pool.count, pool.nbytes) == (1, 3, 300)
    second.free = failed = ThreadEvent()
    pool.give(second)
    pool.give(first)
    third = pool.take()
    pool.disregard(failed)
    assert third is not second and second.free.done()
    assert [pool.take(), pool.take()] == [second, first] and len(pool) == 0


def test_a_slot_is_free_when_its_last_user_has_ended():
    events = {}

    def allocated(memory: torch.Tensor) -> ThreadEvent:
        return events.setdefault(memory.data_ptr(), ThreadEvent())

    pool = SlotPool(2, 100, CPU, allocated)
    slots = [pool.take(), pool.take()]
    assert [slot.free for slot in slots] == [events[slot.flat.data_ptr()] for slot in slots]


def test_chaos_fills_memory_late_that_was_just_allocated():
    memory = torch.zeros(64, dtype=torch.uint8)
    TransferEngine(CPU, chaos=1).allocated(memory).synchronize()
    assert memory.view(torch.float32).isnan().all()
    memory.zero_()
    assert TransferEngine(CPU).allocated(memory).done() and not memory.any()


def test_no_room_for_slots_is_one_sentence(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(GrassError) as refusal:
        SlotPool(3, 2_000_000, CPU, done)
    assert str(refusal.value) == (
        "The device has no room for the optimizer states of 3 layers (6,000,000 bytes); use "
        "grass.offload.mode='stream', fewer grass.active_layers, or more ranks."
    )


# --- reads that are queued


@pytest.mark.parametrize("way", ["leave", "put"])
def test_what_a_caller_queued_on_a_state_is_done_before_it_moves(way):
    """The compute takes its jobs in their order, and late, as a CUDA stream does."""
    transfers = TransferEngine(CPU)
    transfers._compute = ThreadQueue(CPU)
    toys = [Toy(0), Toy(3)]  # of one size
    store = LayerStateStore([toy.layout.host_bytes for toy in toys], CPU)
    pool = SlotPool(1, toys[0].layout.device_bytes, CPU, transfers.allocated)
    states = IntervalStates(toys, pool, store, transfers, prefetch_steps=0)
    weight, seen = torch.zeros((), dtype=torch.float64), []
    for layer, number in ((1, 5.0), (0, 3.0)):
        states.leave((layer,))
        states.enter((layer,))
        states.update(layer, lambda layer=layer, number=number: toys[layer].update(number, weight))
        states.finish()
    states.settle()
    state = toys[0].views[0]

    def read_late() -> None:
        time.sleep(0.05)
        seen.append(state.clone())

    transfers._compute.submit(read_late, [])
    if way == "put":
        states.put(0, None)
    states.leave((1,))
    states.enter((1,))
    states.settle()  # the other layer's state is in that slot
    transfers._compute.submit(lambda: None, []).synchronize()
    assert seen[0].eq(3).all() and toys[1].views[0].eq(5).all()
    assert toys[1].views[0].data_ptr() == state.data_ptr()


# --- queues


def test_what_the_compute_waits_for_is_counted():
    transfers, gate = TransferEngine(CPU), ThreadEvent()
    slot, host = torch.zeros(64, dtype=torch.uint8), torch.ones(48, dtype=torch.uint8)
    came = transfers.to_device("layer", [(slot[:48], host)], [gate])
    assert not came.done()
    timer = threading.Timer(0.2, gate.run, (lambda: None, []))
    timer.start()
    transfers.compute("update", lambda: slot.add_(1), [came])
    assert slot[:48].eq(2).all() and slot[48:].eq(1).all()
    transfers.wait(came)
    transfers.to_host("layer", [(slot[:48], host)], [came]).synchronize()
    traffic = transfers.harvest()
    assert (traffic.copies, traffic.bytes_to_device, traffic.bytes_to_host) == (2, 48, 48)
    assert 0.1 < traffic.waited < 5 and traffic.seconds > 0 and traffic.hidden == 0


def test_what_the_compute_does_not_wait_for_is_hidden():
    transfers = TransferEngine(CPU)
    assert transfers.traffic.hidden == 1
    slot, host = torch.zeros(64, dtype=torch.uint8), torch.ones(64, dtype=torch.uint8)
    came = transfers.to_device("layer", [(slot, host)], [])
    came.synchronize()
    transfers.compute("update", lambda: None, [came])
    seconds = transfers.harvest().seconds
    assert seconds > 0 and (transfers.traffic.waited, transfers.traffic.hidden) == (0, 1)
    assert transfers.harvest().seconds == seconds  # nothing is counted twice


def test_a_failure_reaches_all_that_wait_for_it_and_no_other():
    transfers = TransferEngine(CPU)
    slot, host = torch.zeros(64, dtype=torch.uint8), torch.ones(64, dtype=torch.uint8)
    ran = []
    failed = transfers.to_host("layers.3", [(slot, host[:63])], [])
    later = transfers.to_device("layers.4", [(slot, host)], [failed])
    other = transfers.to_device("layers.5", [(slot[:8], host[:8])], [])
    for event in (failed, later):
        with pytest.raises(GrassError, match=r"^GRASS::d2h \(layers.3\) failed: "):
            event.synchronize()
    with pytest.raises(GrassError, match="layers.3"):
        transfers.compute("update", lambda: ran.append(1), [later])
    other.synchronize()
    assert ran == [] and slot.sum() == 8


def test_threads_end_with_their_queue_after_what_is_queued():
    def threads() -> int:
        return sum(thread.name.startswith("grass_dist") for thread in threading.enumerate())

    gc.collect()
    before, done = threads(), []
    queue = ThreadQueue(CPU)
    for number in range(3):
        queue.submit(lambda number=number: time.sleep(0.02) or done.append(number), [])
    assert threads() == before + 1
    del queue
    gc.collect()
    assert threads() == before and done == [0, 1, 2]


# --- the plan


class Reports(Ranks):
    """Ranks of which each reports what the first does, but for what is given."""

    def __init__(self, *reports: dict) -> None:
        super().__init__()
        self.reports = reports or ({},)

    def gather_objects(self, item):
        assert set().union(*self.reports) <= set(item)
        return [{**item, **own} for own in self.reports]


MB = 1_000_000
SIZES = [(100 * MB, 100 * MB)] * 29 + [(200 * MB, 150 * MB)]
"""30 layers: 3100 MB on a device, 3050 MB in host memory."""
A, B = ("boot a", "a"), ("boot b", "b")
PLENTY = {"host": A, "free": 10**15, "device": 10**15}


def planned(ranks, *, device=CPU, sizes=SIZES, fallback=None, offload=None, **settings):
    config = GrassConfig(**{"active_layers": 4, "offload": offload or {}, **settings})
    return make_plan(ranks, config, sizes, 50 * MB, device, fallback=fallback)


@pytest.fixture(autouse=True)
def no_device(monkeypatch):
    monkeypatch.setattr(plan, "_free_device", lambda device: 0)  # a plan for CUDA is made without a GPU


def test_what_each_mode_costs():
    def costs(ranks=None, **options):
        made = planned(ranks or Reports(PLENTY), **options)
        return made.mode, made.device_bytes // MB, made.host_bytes // MB

    assert costs() == ("interval", 50 + 5 * 200, 3050)  # four layers, and the one that comes before a switch
    assert costs(offload={"prefetch_steps": 0}) == costs(draw_ahead=0) == ("interval", 50 + 4 * 200, 3050)
    assert costs(offload={"mode": "stream"}) == ("stream", 50 + 3 * 200, 3050)
    assert costs(offload={"mode": "stream", "slots": 9}) == ("stream", 50 + 4 * 200, 3050)
    assert costs(offload={"mode": "none"}) == ("none", 50 + 3100, 0)
    assert costs(active_layers=30) == ("interval", 50 + 30 * 200, 3050)
    assert planned(Reports(PLENTY), sizes=[(0, 0)] * 30) == Plan("none", 50 * MB, 0)


# free device memory, four times what a mode costs: none 3150 MB, interval 1050 MB, stream 450 MB
@pytest.mark.parametrize(
    ("free", "mode"),
    [(12600 * MB, "none"), (12600 * MB - 1, "interval"), (4200 * MB, "interval"), (4200 * MB - 1, "stream")],
)
def test_auto_takes_the_first_that_fits_a_quarter_of_memory(free, mode):
    auto = {"mode": "auto", "slots": 2}
    least = Reports(PLENTY, {**PLENTY, "device": free}, PLENTY)
    assert planned(least, device=CUDA, offload=auto).mode == mode
    folder = {**auto, "folder": "/scratch"}  # or host memory would hold what is not in the quarter
    ranks = Reports({**PLENTY, "free": 2 * free}, {**PLENTY, "free": 2 * free})
    assert planned(ranks, offload=folder).mode == mode
    assert planned(Reports({**PLENTY, "free": None}), offload=folder).mode == "none"


def test_what_is_told(caplog):
    def told(*reports, **options):
        caplog.clear()
        planned(Reports(*reports), **options)
        return caplog.messages

    five = "5 slots of 0.2 GB, the size of the largest layer"
    assert told(PLENTY) == [f"states (interval): 1.05 GB on the device ({five}), 3.05 GB in host memory on this host"]
    four = [PLENTY, PLENTY, {**PLENTY, "host": B}, {**PLENTY, "host": B}]
    assert told(*four, device=CUDA, offload={"mode": "stream", "slots": 2}) == [
        "states (stream): 0.45 GB on the device of each rank (2 slots of 0.2 GB, the size of the largest layer), "
        "6.1 GB pinned on this host of 2 ranks"
    ]
    uneven = [{**PLENTY, "bytes": 3 * MB}, {**PLENTY, "bytes": 4 * MB}]
    assert told(*uneven, offload={"folder": "/scratch"}) == [
        f"states (interval): 1.05 GB on the device of each rank ({five}), 7 MB in /scratch on this host of 2 ranks"
    ]
    assert told(PLENTY, offload={"mode": "none"}) == ["states (none): 3.15 GB on the device"]
    assert told(PLENTY, PLENTY, offload={"mode": "auto"}) == ["states (none): 3.15 GB on the device of each rank"]


def test_the_ranks_of_a_host_are_counted_together():
    # Two ranks take 6100 MB pinned; on a CPU, where the slots are host memory too, 2 x (3050 + 1050) = 8200 MB.
    def ranks(free):
        on_b = {**PLENTY, "host": B, "free": free}
        return Reports(PLENTY, PLENTY, {**on_b, "free": None}, on_b)

    assert planned(ranks(6100 * MB), device=CUDA).mode == "interval"
    with pytest.raises(ConfigError) as refusal:
        planned(ranks(6100 * MB - 1), device=CUDA)
    assert str(refusal.value) == (
        "offload.mode='interval': the states of all layers take 6.1 GB of host memory on b for its 2 ranks, and 6.1 GB "
        "are free; set offload.folder to a folder on a fast local disk, or use more hosts, or offload.mode='none'."
    )
    assert planned(ranks(8200 * MB)).mode == "interval"
    with pytest.raises(ConfigError) as refusal:
        planned(ranks(8000 * MB))
    assert str(refusal.value) == (
        "offload.mode='interval': the states of all layers take 8.2 GB of host memory on b for its 2 ranks, and 8 GB "
        "are free; set offload.folder to a folder on a fast local disk, or use more hosts."
    )
    assert planned(ranks(8000 * MB), offload={"folder": "/scratch"}).mode == "interval"
    assert planned(ranks(8000 * MB), offload={"mode": "none"}).mode == "none"


def test_states_that_cannot_move_stay_unless_that_was_asked_for(caplog):
    why = "this class says nothing"
    for offload in ({}, {"mode": "auto"}, {"prefetch_steps": 2}):
        assert planned(Reports(PLENTY), offload=offload, fallback=why) == Plan("none", 50 * MB, 0)
    assert caplog.messages == [f"States stay on the device (grass.offload.mode='none'): {why}."] * 3
    for mode in ("interval", "stream"):
        with pytest.raises(ConfigError) as refusal:
            planned(Reports(PLENTY), offload={"mode": mode}, fallback=why)
        assert str(refusal.value) == f"offload.mode='{mode}': states cannot move: {why}; use 'none'."
    assert planned(Reports(PLENTY), offload={"mode": "none"}, fallback=why, sizes=[]).mode == "none"


MEMINFO = {"/proc/meminfo": "MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable:    4000 kB\nHugePages_Total: 0\n"}
V1 = {
    "/sys/fs/cgroup/memory/job/memory.limit_in_bytes": "2000000",
    "/sys/fs/cgroup/memory/job/memory.usage_in_bytes": "1500000",
    "/sys/fs/cgroup/memory/job/memory.stat": "total_inactive_file 100000\n",
    "/proc/self/cgroup": "5:cpu,cpuacct:/\n3:memory:/job/step\n",
}


def v2(limit, at="", own="/"):
    folder, stat = f"/sys/fs/cgroup{at}", "anon 7\ninactive_file 300000\nslab 1\n"
    files = {f"{folder}/memory.max": limit, f"{folder}/memory.current": "1500000", f"{folder}/memory.stat": stat}
    return {**files, "/proc/self/cgroup": f"0::{own}\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        (MEMINFO, 4_096_000),
        ({**MEMINFO, **v2("max\n")}, 4_096_000),
        ({**MEMINFO, **v2("3000000\n")}, 1_800_000),  # what is used counts, but for a cache that is given back
        ({**MEMINFO, **v2("9000000\n")}, 4_096_000),
        ({**MEMINFO, **v2("3000000\n", "/job", "/job/step/task")}, 1_800_000),  # of a group around this one's
        ({**MEMINFO, **v2("3000000\n", "/other", "/job")}, 4_096_000),
        ({**MEMINFO, **V1}, 600_000),
        ({}, None),
        ({"/proc/meminfo": "MemTotal: 9000 kB\n"}, None),
    ],
)
def test_free_host_memory_is_of_machine_and_control_group(files, free, monkeypatch):
    def read(path, *args, **kwargs):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    assert free_host_memory() == free


def test_this_machine_has_some_memory_left_and_not_more_than_all():
    free = free_host_memory()
    assert free is None or 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
