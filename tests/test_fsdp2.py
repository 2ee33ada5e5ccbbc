"""FSDP2 on one rank: what a forward without a backward leaves behind, and weights in host memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from grass_dist import GrassConfig, GrassError, GrassOptimizer, UnsupportedModel
from tests.tiny import loss_of, tiny

CONFIG = GrassConfig(active_layers=2, probe_steps=2, sampling_interval=3, update_interval=3)


@pytest.fixture(autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(policy: OffloadPolicy | None = None, reshard: bool | None = None) -> nn.Module:
    model, mesh = tiny(), init_device_mesh("cpu", (1,))
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard, offload_policy=policy or OffloadPolicy())
    return model


def through_the_model(model: nn.Module) -> None:
    loss_of(model, 99)


def through_its_layers(model: nn.Module) -> None:
    """Past the hooks on the model."""
    x = torch.zeros(1, 2, 8)
    for layer in model.layers:
        x = layer(x)


def with_gradients(model: nn.Module) -> None:
    """A forward that is to have a backward."""
    with torch.enable_grad():
        through_the_model(model)


def trained(
    between: Callable[[nn.Module], None] | None,
    clip: str = "",
    policy: OffloadPolicy | None = None,
    reshard: bool | None = None,
) -> tuple[list[float], list[torch.Tensor]]:
    """Norms and weights of ten steps, with a forward without a gradient between each backward and its step."""
    model = sharded(policy, reshard)
    optimizer = GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=CONFIG)
    norms = []
    for step in range(10):
        loss_of(model, step).backward()
        if between is not None:
            with torch.no_grad():
                between(model)
        if clip == "ours":
            norms.append(optimizer.clip_grad_norm_(0.1).item())
        elif clip == "torch's":
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            norms.append(norm.full_tensor().item() if isinstance(norm, DTensor) else norm.item())
        optimizer.step()
        optimizer.zero_grad()
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return norms, [p.full_tensor().detach() for p in model.parameters()]


@pytest.mark.parametrize(
    ("between", "clip", "reshard"),
    [
        (through_the_model, "ours", None),
        (through_the_model, "torch's", None),
        (through_the_model, "ours", False),
        (through_its_layers, "ours", False),
        (through_its_layers, "torch's", False),
        (with_gradients, "ours", None),
        (with_gradients, "ours", False),
    ],
)
def test_an_evaluation_between_backward_and_step_changes_nothing(between, clip, reshard):
    expected, seen = trained(None, clip), trained(between, clip, reshard=reshard)
    assert seen[0] == expected[0] and max(expected[0]) > 0.1
    assert all(map(torch.equal, seen[1], expected[1]))


@pytest.mark.parametrize("reshard", [None, False])
@pytest.mark.parametrize("clip", ["torch's", ""])
def test_a_forward_that_clipping_may_have_missed_is_refused(clip, reshard):
    with pytest.raises(GrassError, match=r"^FSDP2 has parameters gathered .* clip by optimizer\.clip_grad_norm_"):
        trained(with_gradients, clip, reshard=reshard)


def test_an_evaluation_releases_modules_sharded_together_once(monkeypatch):
    """As a group, norm and head are gathered before the first of them runs, and are let go of after the last."""
    model, mesh = tiny(), init_device_mesh("cpu", (1,))
    for module in (*model.layers, [model.norm, model.head], model):
        fully_shard(module, mesh=mesh)
    optimizer = GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=CONFIG)
    loss_of(model, 0).backward()
    gathered = []
    model.head.register_forward_pre_hook(lambda head, _: gathered.append(not isinstance(head.weight, DTensor)))
    resharded = []
    monkeypatch.setattr(type(model.norm), "reshard", lambda self: resharded.append(self))
    with torch.no_grad():
        loss_of(model, 1)
    assert gathered == [True] and model.norm not in resharded[:-1] and len(resharded) < 3
    optimizer.step()


def test_an_evaluation_in_a_probe_changes_nothing():
    def importances(between: Callable[[nn.Module], None] | None) -> tuple[float, ...]:
        model = sharded()
        optimizer = GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=CONFIG)
        for step in range(2):
            loss_of(model, step).backward()
            if between is not None:
                with torch.no_grad():
                    between(model)
            optimizer.step()
        return optimizer.grass.importances

    assert importances(through_the_model) == importances(None)


def test_weights_in_host_memory_train_as_on_the_device():
    assert all(map(torch.equal, trained(None, policy=CPUOffloadPolicy(pin_memory=False))[1], trained(None)[1]))


@pytest.mark.parametrize("roles", [["embeddings", "final_norm", "lm_head"], []])
def test_a_training_that_keeps_layers_gathered_is_as_any(roles, monkeypatch):
    monkeypatch.setitem(globals(), "CONFIG", CONFIG.model_copy(update={"always_active": tuple(roles)}))
    assert all(map(torch.equal, trained(None, "torch's", reshard=False)[1], trained(None, "torch's")[1]))


def test_trained_weights_of_two_dtypes_in_one_module_are_refused():
    model, mesh = tiny(), init_device_mesh("cpu", (1,))
    model.head.to(torch.bfloat16)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh)
    with pytest.raises(UnsupportedModel, match=r"embed\.weight \(torch.float32\) and head\.weight \(torch.bfloat16\)"):
        GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=CONFIG)
