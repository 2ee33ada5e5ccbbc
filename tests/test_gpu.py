"""The CUDA paths: the same code as on the CPU, with pinned memory and NCCL."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from grass_dist import GrassConfig, GrassOptimizer
from grass_dist.backends.host_sums import HostSums
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


def test_host_sums_are_pinned_and_give_the_sum_back_on_the_device():
    shard = torch.zeros(1000, device="cuda")
    sums = HostSums({"p": shard.shape}, shard.device)
    parts = [torch.randn(1000, device="cuda") for _ in range(3)]
    assert sums.add("p", parts[0], last=False) is None
    assert sums.add("p", parts[1], last=False) is None
    total = sums.add("p", parts[2], last=True)
    assert total is not None and total.is_cuda and torch.allclose(total, sum(parts), atol=1e-5)
    sums.add("p", parts[0], last=False)
    assert sums.pending() == ["p"] and torch.equal(sums.take("p"), parts[0])


def test_the_states_of_frozen_layers_lie_in_pinned_memory():
    from grass_dist.backends.zero.store import HostStore

    store = HostStore(pin=True)
    master = torch.arange(1000.0, device="cuda")
    store.put(("layer", 0), {"fp32": master, "state": {"exp_avg": master * 2, "step": torch.tensor(1.0)}})
    torch.cuda.synchronize()
    held = store[("layer", 0)]
    assert held["fp32"].is_pinned() and torch.equal(held["fp32"], master.cpu())
    assert held["state"]["exp_avg"].is_pinned() and torch.equal(held["state"]["exp_avg"], master.cpu() * 2)
