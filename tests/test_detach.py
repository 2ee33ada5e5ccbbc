"""`GrassOptimizer.detach`: the model as it was, for training without GRASS or with another optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from grass_dist import GrassConfig, GrassError, GrassOptimizer, UnsupportedModel
from tests.tiny import loss_of, take_steps, tiny

STEPS = 7


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded() -> nn.Module:
    model, mesh = tiny(), init_device_mesh("cpu", (1,))
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": tiny,
    "ddp": lambda: DistributedDataParallel(tiny()),
    "fsdp2": sharded,
}


def grass(model: nn.Module, **offload: Any) -> GrassOptimizer:
    config = {"active_layers": 2, "probe_steps": 2, "sampling_interval": 3, "update_interval": 3, "offload": offload}
    return GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=GrassConfig(**config))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [whole(param) for param in model.parameters()]


def gradients(model: nn.Module) -> list[torch.Tensor]:
    loss_of(model, 5).backward()
    grads = []
    for param in model.parameters():
        assert param.grad is not None
        grads.append(whole(param.grad))
        param.grad = None
    return grads


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def run(model: nn.Module, **offload: Any) -> tuple[list[torch.Tensor], list[Any]]:
    """What another training makes of the model, from its weights of now, and what that one draws."""
    seen: list[Any] = []
    optimizer = grass(model, **offload)
    optimizer.grass.add_observer(seen.append)
    take_steps(model, optimizer, range(STEPS))
    return weights(model), seen


@pytest.mark.parametrize("offload", [{"mode": "none"}, {"mode": "interval"}, {"mode": "stream", "slots": 2}], ids=str)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_second_optimizer_trains_as_the_first_on_a_fresh_model(kind, offload, steps):
    model = MODELS[kind]()
    model_hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    start = copy.deepcopy(model.state_dict())
    list(model.parameters())[3].requires_grad_(False)  # which stays as the user has set it
    flags = [param.requires_grad for param in model.parameters()]
    first = grass(model, **offload)
    take_steps(model, first, range(steps))
    loss_of(model, 0).backward()  # gradients of a step that is never ended
    first.detach()
    assert [param.requires_grad for param in model.parameters()] == flags
    assert all(param.grad is None for param in model.parameters())
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == model_hooks
    fresh = MODELS[kind]()
    list(model.parameters())[3].requires_grad_(True)
    assert (steps > 2) != same(weights(model), weights(fresh))
    model.load_state_dict(start)
    assert same(gradients(model), gradients(fresh))  # those of a plain training
    (ours, seen), (theirs, expected) = run(model, **offload), run(fresh, **offload)
    assert same(ours, theirs) and seen == expected and not same(ours, weights(MODELS[kind]()))


def test_what_was_detached_keeps_its_state_and_trains_no_more():
    model = tiny()
    optimizer = grass(model)
    take_steps(model, optimizer, range(5))
    with pytest.raises(UnsupportedModel, match=r"has a GrassOptimizer already.*\(optimizer\.detach\(\), or"):
        grass(model)
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.detach()
    for call in (optimizer.step, lambda: optimizer.clip_grad_norm_(1.0), lambda: optimizer.load_state_dict(before)):
        with pytest.raises(GrassError, match="was detached from its model"):
            call()
    after = optimizer.state_dict()
    assert after["state"].keys() == before["state"].keys() != set()
    for index, state in before["state"].items():
        assert torch.equal(after["state"][index]["exp_avg"], state["exp_avg"])
    other = grass(model)
    other.load_state_dict(before)  # and another goes on from there
    assert other.grass.step == 5
    optimizer.detach()  # a second call does nothing to the model that another one trains
    take_steps(model, other, range(5, 7))
    assert other.grass.step == 7
