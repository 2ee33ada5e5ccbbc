"""What a step launches beside its forward and backward, and the memory that this takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from grass_dist import GrassConfig, GrassOptimizer
from grass_dist.backends.clipping import clip_grads
from grass_dist.method.measurement import norms
from grass_dist.model.sharding import Sharding
from grass_dist.ranks import Ranks
from grass_dist.states import joint_update
from tests.operators import Operators, peak_bytes
from tests.tiny import loss_of, take_steps, tiny

MB = 1 << 20
MOST = 1.3
"""Operators of GRASS over those of one AdamW and one clipping."""


def made(model, *, offload=None, optimizer=torch.optim.AdamW, kwargs=None, **config):
    settings = {"active_layers": 4, "probe_steps": 0, "sampling_interval": 20, "update_interval": 20, **config}
    kwargs = {"lr": 1e-2, "foreach": True} if kwargs is None else kwargs
    return GrassOptimizer(model, optimizer, kwargs, config=GrassConfig(**settings, offload=offload or {"mode": "none"}))


def launched(model, optimizer) -> Operators:
    """Those of clipping and step, and of what the hooks of the backward do besides."""
    loss = loss_of(model, 9)
    with Operators() as backward:
        loss.backward()
    with Operators() as step:
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    optimizer.zero_grad()
    optimizer.grass.backend._measuring = False
    loss = loss_of(model, 9)
    with Operators() as alone:
        loss.backward()
    step.counts += backward.counts - alone.counts
    return step


@pytest.mark.parametrize("mode", ["none", "interval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_launches_little_more_than_one_optimizer(dtype, mode):
    model = tiny(dtype)
    optimizer = made(model, offload={"mode": mode})
    take_steps(model, optimizer, range(3))
    loss_of(model, 8).backward()
    params = [p for p in model.parameters() if p.grad is not None]
    assert len(params) == 4 * 6 + 4
    other = [nn.Parameter(p.detach().clone()) for p in params]
    for param, like in zip(other, params, strict=True):
        param.grad = like.grad.clone()
    optimizer.zero_grad()
    stock = torch.optim.AdamW(other, lr=1e-2, foreach=True)
    stock.step()
    with Operators() as reference:
        torch.nn.utils.clip_grad_norm_(other, 1.0)
        stock.step()
    ours = launched(model, optimizer)
    assert ours.number <= MOST * reference.number, ours.counts - reference.counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_clipping_copy_no_gradient(dtype):
    torch.manual_seed(0)
    large = (torch.randn(1 << 24) * 1e-3).to(dtype)
    small, empty = torch.randn(3, 5).to(dtype), torch.empty(0, dtype=dtype)
    tensors = [small, large, empty, small.T]
    exact = [tensor.double().norm() for tensor in tensors]
    torch.testing.assert_close(norms(tensors), exact, rtol=1e-12, atol=0)
    assert peak_bytes(lambda: norms(tensors)) < MB < peak_bytes(lambda: large.double().norm()) / 100
    params = [nn.Parameter(tensor) for tensor in (large, small)]
    for param in params:
        param.grad = param.detach().clone()
    sharding = Sharding(Ranks(None, torch.device("cpu")))
    assert peak_bytes(lambda: clip_grads(params, 1.0, 2.0, sharding)) < MB
    found = torch.cat([p.grad.flatten().double() for p in params]).norm().item()
    assert found == pytest.approx(1.0, rel=1e-2)


CLASSES = {
    "AdamW": {"lr": 1e-2},
    "AdamW foreach": {"lr": 1e-2, "foreach": True, "amsgrad": True},
    "AdamW fused": {"lr": 1e-2, "fused": True},
    "Adagrad": {"lr": 1e-2},
    "SGD": {"lr": 1e-2, "momentum": 0.9, "foreach": True},
    "RMSprop": {"lr": 1e-3, "centered": True},
}


@pytest.mark.parametrize("mode", ["none", "interval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CLASSES)
def test_units_updated_at_once_are_as_if_alone(name, dtype, mode, monkeypatch):
    kind = getattr(torch.optim, name.split()[0])
    left = []
    for most in (joint_update.MOST_AT_ONCE, 0):
        monkeypatch.setattr(joint_update, "MOST_AT_ONCE", most)
        model = tiny(dtype)
        if not most:  # all units alone
            monkeypatch.setattr(joint_update, "_can_join", lambda unit: False)
        optimizer = made(model, offload={"mode": mode}, optimizer=kind, kwargs=CLASSES[name], sampling_interval=3)
        take_steps(model, optimizer, range(5))
        optimizer.load_state_dict(optimizer.state_dict())
        take_steps(model, optimizer, range(5, 9))
        left.append((list(model.parameters()), optimizer.grass.importances, optimizer.state_dict()["state"]))
        monkeypatch.undo()
    (weights, importances, states), (other_weights, other_importances, other_states) = left
    assert all(map(torch.equal, weights, other_weights))
    assert importances == pytest.approx(other_importances, nan_ok=True, rel=0)
    assert states.keys() == other_states.keys() and states
    torch.testing.assert_close(states, other_states, rtol=0, atol=0)


def test_updates_at_once_take_no_more_than_the_largest_unit(monkeypatch):
    monkeypatch.setattr(joint_update, "MOST_AT_ONCE", 0)
    model = tiny(vocab=400)  # the embedding is larger than all layers
    optimizer = made(model)
    take_steps(model, optimizer, range(2))
    units = optimizer._layer_optimizers[:3] + optimizer._role_optimizers
    sizes = [sum(p.numel() for _, p in unit.unit.params) for unit in units if unit.has_state]
    runs = list(joint_update._in_runs([unit for unit in units if unit.has_state]))
    assert [unit for run in runs for unit in run] == [unit for unit in units if unit.has_state]
    assert len(runs) >= 2
    assert all(sum(sum(p.numel() for _, p in unit.unit.params) for unit in run) <= max(sizes) for run in runs)


class LeavesOut(nn.Module):
    """A model that leaves parameters of its lowest, or another layer, out of some batches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}) for _ in range(4))
        self.head = nn.Linear(8, 16)

    def forward(self, ids, out=()):
        x = self.embed(ids)
        for number, layer in enumerate(self.layers):
            x = x + layer["a"](x)
            if number not in out:
                x = x + torch.tanh(layer["b"](x))
        return self.head(x)


@pytest.mark.parametrize("out", [(), (0,), (2,), (0, 2), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("roles", [True, False])
def test_importances_are_of_gradients_before_any_clipping(out, roles):
    model = LeavesOut()
    always = {} if roles else {"always_active": ()}
    optimizer = made(model, optimizer=torch.optim.SGD, kwargs={"lr": 1e-3}, update_interval=1, ema_alpha=1.0, **always)
    ids = torch.arange(12).view(3, 4)
    for absent in ((), out, ()):
        loss = nn.functional.cross_entropy(model(ids, absent).flatten(0, 1), ids.flatten())
        loss.backward()
        grads = [[p.grad for p in layer.parameters() if p.grad is not None] for layer in model.layers]
        squares = [sum(grad.double().square().sum() for grad in own) for own in grads]
        expected = [(float(own) / 144) ** 0.5 for own in squares]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        assert optimizer.grass.importances == pytest.approx(expected)
        optimizer.zero_grad()
