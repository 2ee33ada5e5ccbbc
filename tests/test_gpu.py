"""The CUDA paths: the same code as on the CPU, with pinned memory and NCCL."""

import gc

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from grass_dist import GrassConfig, GrassOptimizer
from grass_dist.backends.host_sums import HostSums
from grass_dist.method.measurement import norms
from grass_dist.states.layout import Field, Layout
from grass_dist.states.slots import SlotPool
from grass_dist.states.store import PAGE, LayerStateStore
from grass_dist.states.transfer import TransferEngine
from tests.offload_runs import make, outcome, same, uneven
from tests.tiny import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIG = {"active_layers": 2, "probe_steps": 2, "sampling_interval": 3, "update_interval": 3}


def loss_on(model: torch.nn.Module, step: int, device: str) -> torch.Tensor:
    ids = torch.randint(0, 16, (4, 6), generator=torch.Generator().manual_seed(step)).to(device)
    logits = model(ids)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def trajectory(device: str, *, sharded: bool = False, accumulation: int = 2):
    model = tiny().to(device)
    if sharded:
        mesh = init_device_mesh(device, (1,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = GrassOptimizer(
        model,
        torch.optim.AdamW,
        {"lr": 1e-3, "eps": 1e-6},
        config=GrassConfig(**CONFIG),
        gradient_accumulation_steps=accumulation,
    )
    layers = []
    for step in range(12):
        layers.append(optimizer.grass.active_layers)
        for micro in range(accumulation):
            (loss_on(model, accumulation * step + micro, device) / accumulation).backward()
        optimizer.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()
    params = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return layers, optimizer.grass.importances, [p.detach().cpu() for p in params]


def check_same(ours, theirs):
    assert ours[0] == theirs[0]
    assert ours[1] == pytest.approx(theirs[1], rel=1e-4)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours[2], theirs[2], strict=True))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_one_gpu_takes_the_way_of_the_cpu(accumulation):
    check_same(trajectory("cuda", accumulation=accumulation), trajectory("cpu", accumulation=accumulation))


def test_fsdp2_over_nccl_takes_the_way_of_the_cpu():
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        check_same(trajectory("cuda", sharded=True), trajectory("cpu"))
    finally:
        dist.destroy_process_group()


def test_host_sums_are_pinned_and_return_the_sum_on_the_device():
    shard = torch.zeros(1000, device="cuda")
    sums = HostSums({"p": shard.shape}, shard.device)
    parts = [torch.randn(1000, device="cuda") for _ in range(3)]
    assert sums.add("p", parts[0], last=False) is None
    assert sums.add("p", parts[1], last=False) is None
    total = sums.add("p", parts[2], last=True)
    assert total is not None and total.is_cuda and torch.allclose(total, sum(parts), atol=1e-5)
    sums.add("p", parts[0], last=False)
    assert sums.pending() == ["p"] and torch.equal(sums.take("p"), parts[0])


CUDA = torch.device("cuda")
OFFLOADS = [
    {"mode": "interval", "prefetch_steps": 0},
    {"mode": "interval", "prefetch_steps": 2, "update_in_backward": True},
    {"mode": "stream", "slots": 2},
    {"mode": "stream", "slots": 2, "folder": "scratch"},
]


def moved(offload, steps, model, look=lambda optimizer: None, **options):
    """A training on the GPU, what it leaves, and what ``look`` saw of it after each step."""
    model, optimizer = make(offload, model=model.to(CUDA), **options)
    seen = []
    for step in range(steps):
        loss_on(model, step, "cuda").backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(look(optimizer))
    return optimizer, [t.cpu() for t in outcome(optimizer, model)], seen


@pytest.fixture
def to_the_bit(monkeypatch, tmp_path):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.chdir(tmp_path)  # where the folder "scratch" goes
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offload", OFFLOADS, ids=str)
def test_states_that_move_leave_what_states_that_stay_leave(offload, dtype, to_the_bit):
    optimizer, ours, _ = moved(offload, 50, uneven(dtype))
    _, theirs, _ = moved({"mode": "none"}, 50, uneven(dtype))
    assert same(ours, theirs)
    traffic = optimizer.grass.traffic
    assert traffic.seconds > 0 and traffic.copies > 20 and traffic.bytes_to_device > 0 < traffic.bytes_to_host


@pytest.mark.parametrize("starts_on", ["cuda", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_on_the_host_leave_what_resident_ones_leave(dtype, starts_on, to_the_bit):
    """Also where the layers have never been on the device, and with a gradient that a probe shows."""

    def trained(offload, device):
        model = uneven(dtype).to(CUDA)
        model.layers.to(device)
        model, optimizer = make(offload, model=model)
        for step in range(30):
            loss_on(model, step, "cuda").backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                loss_on(model, step, "cuda")
        return optimizer, [t.cpu() for t in outcome(optimizer, model)]

    _, theirs = trained({}, "cuda")
    optimizer, ours = trained({"weights": "host"}, starts_on)
    assert same(ours, theirs)
    resting = [unit for n, unit in enumerate(optimizer.grass.layers) if n not in optimizer.grass.active_layers]
    assert all(p.device.type == "cpu" and p.is_pinned() for unit in resting for _, p in unit.params)
    assert all(p.is_cuda for unit in optimizer.grass.trainable_units() for _, p in unit.params)
    traffic = optimizer.grass.traffic
    assert traffic.weight_bytes_to_device > 0 < traffic.weight_bytes_to_host


def test_resting_weights_take_no_memory_of_the_device():
    used = {}
    for weights in ("resident", "host", "resident"):  # the first run has cuBLAS take its workspace
        before = torch.cuda.memory_allocated()
        model = tiny(layers=16, width=256).to(CUDA)
        optimizer = GrassOptimizer(
            model,
            torch.optim.SGD,
            {"lr": 0.1, "momentum": 0.9},
            config=GrassConfig(active_layers=2, sampler="cyclic", probe_steps=0, offload={"weights": weights}),
        )
        for step in range(3):
            loss_on(model, step, "cuda").backward()
            optimizer.step()
            optimizer.zero_grad()
        used[weights] = torch.cuda.memory_allocated() - before
        layer = sum(p.nbytes for p in model.layers[0].parameters())
        del model, optimizer
        gc.collect()
    assert used["resident"] - used["host"] > (16 - 2 - 2) * layer * 0.9


def test_states_that_are_away_take_no_memory_of_the_device():
    sizes = {"sampler": "cyclic", "probe_steps": 0, "active_layers": 2}
    used = {}
    for mode in ("none", "interval", "none"):  # the first run has cuBLAS take its workspace
        before = torch.cuda.memory_allocated()
        optimizer, _, seen = moved(
            {"mode": mode, "prefetch_steps": 0},
            16,  # four intervals, in which each of the eight layers trains
            tiny(width=256),
            lambda optimizer: torch.cuda.synchronize() or torch.cuda.memory_allocated(),
            **sizes,
        )
        assert all(own.has_state for own in optimizer._layer_optimizers)
        used[mode] = seen[-1] - before
        del optimizer
        gc.collect()
    layer = 8 * (2 * 256 + 2 * 256 * 512 + 512 + 256)  # exp_avg and exp_avg_sq of LayerNorm, up and down
    assert used["none"] - used["interval"] == pytest.approx(6 * layer, rel=0.02)


@pytest.mark.parametrize("offload", OFFLOADS[:3], ids=str)
def test_a_step_asks_the_device_for_no_large_memory(offload):
    def large(optimizer):
        return torch.cuda.memory_stats()["allocation.large_pool.allocated"]

    optimizer, _, seen = moved(offload, 50, tiny(width=256), large)
    pool = optimizer._states.pool
    assert pool.nbytes // pool.count > 2**20  # nothing else that a step makes is as large
    assert len(set(seen[10:])) == 1


def test_a_slot_that_queued_kernels_read_is_not_overwritten():
    size = 4 * 2**20
    store, transfers = LayerStateStore([size], CUDA), TransferEngine(CUDA)
    store[0].fill_(0)
    x, y = torch.full((size,), 1, dtype=torch.uint8, device=CUDA), torch.empty(size, dtype=torch.uint8, device=CUDA)
    torch.cuda.synchronize()
    address = x.data_ptr()
    torch.cuda._sleep(1_000_000_000)  # the kernel that reads x begins late
    y.copy_(x)
    del x
    slot = SlotPool(1, size, CUDA, transfers.allocated).take()
    assert slot.flat.data_ptr() == address  # what the allocator has done
    transfers.to_device("layer", [(slot.flat, store[0])], [slot.free])
    torch.cuda.synchronize()
    assert y.eq(1).all()


def test_states_that_are_away_are_pinned():
    optimizer, _, _ = moved({"mode": "interval"}, 12, uneven())
    optimizer._states.settle()
    away = [
        i for i, own in enumerate(optimizer._layer_optimizers) if own.has_state and not optimizer._states.in_slot(i)
    ]
    assert away
    for layer in away:
        moments = [t for t in optimizer._layer_optimizers[layer].state.tensors() if t.numel() > 1]
        assert moments and all(t.is_pinned() for t in moments)


def test_host_buffers_stay_pinned_with_their_store_and_unrounded():
    store = LayerStateStore([5_000_000, 1000, 0], CUDA)
    buffers = [store[i] for i in range(3)]
    assert [buffer.numel() for buffer in buffers] == [5_000_000, 1000, 0] and store.nbytes == 5_001_000
    assert buffers[0].is_pinned() and buffers[1].is_pinned()
    assert all(buffer.untyped_storage().nbytes() <= buffer.numel() + 2 * PAGE for buffer in buffers)
    del store
    gc.collect()
    assert not buffers[0].is_pinned()


BIG = 64_000_000
"""Entries: 256 MB, of which a copy takes 4 ms or more."""


def test_copies_in_both_directions_run_beside_the_compute():
    store, transfers = LayerStateStore([4 * BIG] * 2, CUDA), TransferEngine(CUDA)
    slots = torch.zeros(2, 4 * BIG, dtype=torch.uint8, device=CUDA)
    store[0].view(torch.float32).copy_(torch.arange(BIG))
    torch.cuda.synchronize()
    came = transfers.to_device("a", [(slots[0], store[0])], [])
    went = transfers.to_host("b", [(slots[1], store[1])], [])
    assert torch.cuda.current_stream().query() and not came.done() and not went.done()  # nobody waits for them
    doubled = transfers.compute("double", lambda: slots[0].view(torch.float32).mul_(2), [came])
    left = transfers.to_host("a", [(slots[0], store[1])], [doubled, went])
    left.synchronize()
    assert torch.equal(store[1].view(torch.float32), torch.arange(BIG) * 2.0)
    traffic = transfers.harvest()
    assert (traffic.copies, traffic.bytes_to_device, traffic.bytes_to_host) == (3, 4 * BIG, 8 * BIG)
    assert 0 < traffic.waited <= came.seconds * 1.1 and traffic.seconds >= came.seconds + left.seconds


def test_what_the_compute_does_not_wait_for_is_hidden():
    store, transfers = LayerStateStore([4 * BIG], CUDA), TransferEngine(CUDA)
    slot = torch.zeros(4 * BIG, dtype=torch.uint8, device=CUDA)
    copy = transfers.to_device("a", [(slot, store[0])], [])
    copy.synchronize()
    transfers.compute("nothing", lambda: None, [copy])
    torch.cuda.synchronize()
    assert transfers.harvest().hidden > 0.9
    copy = transfers.to_device("a", [(slot, store[0])], [])
    transfers.wait(copy)
    torch.cuda.synchronize()
    assert transfers.harvest().hidden == pytest.approx(0.5, abs=0.2)  # one of two copies


def test_moments_are_rounded_on_their_way_to_the_host():
    layout = Layout([Field(n, torch.Size([1000]), torch.float32, narrow=n == "b") for n in "ab"], torch.bfloat16)
    store, transfers = LayerStateStore([layout.host_bytes], CUDA), TransferEngine(CUDA)
    slot = torch.zeros(layout.device_bytes, dtype=torch.uint8, device=CUDA)
    views, numbers = layout.device_views(slot), torch.randn(1000)
    for view in views:
        view.copy_(numbers)
    torch.cuda.synchronize()
    left = transfers.to_host("x", layout.runs(slot, store[0]), [])
    left.synchronize()
    a, b = layout.host_views(store[0])
    assert torch.equal(a, numbers) and torch.equal(b, numbers.bfloat16())
    slot.zero_()
    torch.cuda.synchronize()
    transfers.to_device("x", layout.runs(slot, store[0]), [left]).synchronize()
    assert torch.equal(views[0].cpu(), numbers) and torch.equal(views[1].cpu(), numbers.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_copy_no_gradient(dtype):
    tensors = [(torch.randn(size, device="cuda") * 1e-3).to(dtype) for size in (1 << 24, 5)]
    exact = [tensor.double().norm() for tensor in tensors]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = norms(tensors)
    assert torch.cuda.max_memory_allocated() - before < 1 << 20
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)
