"""Whatever a caller may read of a training with moving states waits for its own copies: after a step, switch or load.

Every read is compared with that of a training whose states stay; chaos delays copies, and fills memory that a state has
left with NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from grass_dist import GrassOptimizer
from tests.offload_runs import make, uneven
from tests.tiny import loss_of

Read = dict[str, torch.Tensor]


def by_state(model: nn.Module, optimizer: GrassOptimizer) -> Read:
    names = {param: name for name, param in model.named_parameters()}
    return {f"{names[p]} {k}": v for p, own in optimizer.state.items() for k, v in own.items() if torch.is_tensor(v)}


def by_state_dict(model: nn.Module, optimizer: GrassOptimizer) -> Read:
    state = optimizer.state_dict()["state"]
    return {f"{i} {k}": v for i, own in state.items() for k, v in own.items() if torch.is_tensor(v)}


def by_checkpoint(model: nn.Module, optimizer: GrassOptimizer) -> Read:
    holdings = optimizer.holdings()
    pieces = [*holdings.weights(), *(piece for unit in holdings.states() for piece in unit.tensors)]
    return {piece.key: piece.tensor for piece in pieces}


def by_model(model: nn.Module, optimizer: GrassOptimizer) -> Read:
    return dict(model.state_dict())


def by_gradients(model: nn.Module, optimizer: GrassOptimizer) -> Read:
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


DOORS: dict[str, Callable[[nn.Module, GrassOptimizer], Read]] = {
    "optimizer.state": by_state,
    "optimizer.state_dict": by_state_dict,
    "a checkpoint": by_checkpoint,
    "model.state_dict": by_model,
    "gradients": by_gradients,
}
STEPS, LOADS = 18, (7, 12)
"""Switches are after steps 6, 10 and 14; a state that was saved before is loaded after these."""


def seen(door: str, offload: dict[str, Any], dtype: torch.dtype) -> list[Read]:
    """What comes through ``door`` after every step, and after every load."""
    model, optimizer = make(offload, model=uneven(dtype))
    reads, saved = [], None

    def look() -> None:
        found = DOORS[door](model, optimizer)
        reads.append({name: tensor.detach().clone() for name, tensor in found.items()})

    for step in range(STEPS):
        loss_of(model, step).backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        look()
        optimizer.zero_grad()
        if step in LOADS:
            assert saved is not None
            optimizer.load_state_dict(saved)
            look()
        if step + 2 in LOADS:
            state = optimizer.state_dict()
            saved = {**state, "state": {i: {k: clone(v) for k, v in own.items()} for i, own in state["state"].items()}}
    return reads


def clone(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("door", DOORS)
def test_what_comes_through_a_door_has_arrived(door, dtype):
    expected = seen(door, {"mode": "none"}, dtype)
    assert len(expected) == STEPS + len(LOADS) and max(map(len, expected)) > 10
    for offload in ({"mode": "interval", "prefetch_steps": 2}, {"mode": "stream", "slots": 2}):
        for chaos in range(2):
            found = seen(door, {**offload, "chaos": chaos}, dtype)
            for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
                assert ours.keys() == theirs.keys(), (offload, number)
                wrong = [name for name in ours if not torch.equal(ours[name], theirs[name])]
                assert not wrong, (offload, chaos, number, wrong[:3])
