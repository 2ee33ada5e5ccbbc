"""Batches that a loop drops, in one process: the run goes on as if it had never seen them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from grass_dist import GrassConfig, GrassError, GrassOptimizer
from tests.dropped_batches import DROPS, before_its_backward, outcome, same, train
from tests.tiny import loss_of, tiny


def made(accumulation: int = 1, **config: Any) -> tuple[nn.Module, GrassOptimizer]:
    model = tiny()
    settings = {"active_layers": 2, "probe_steps": 2, "sampling_interval": 2, "update_interval": 2, **config}
    optimizer = GrassOptimizer(
        model,
        torch.optim.AdamW,
        {"lr": 1e-2},
        config=GrassConfig(**settings),
        gradient_accumulation_steps=accumulation,
    )
    return model, optimizer


def ran(drop, accumulation: int = 1, begun: int | None = None, **config: Any) -> list:
    model, optimizer = made(accumulation, **config)
    train(optimizer, lambda number: loss_of(model, number), 7, drop, accumulation, begun)
    return outcome(model, optimizer, torch.Tensor.detach)


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize(("accumulation", "begun"), [(1, 1), (2, 2), (2, 1)])
def test_a_dropped_batch_leaves_no_trace(drop, accumulation, begun):
    assert same(ran(drop, accumulation, begun), ran(None, accumulation))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_batch_dropped_before_its_backward_blocks_nothing(accumulation):
    in_backward = {"offload": {"mode": "stream", "update_in_backward": True}}
    assert same(ran(before_its_backward, accumulation, **in_backward), ran(None, accumulation))


def test_an_update_in_the_backward_cannot_be_dropped():
    model, optimizer = made(probe_steps=0, offload={"mode": "interval", "update_in_backward": True})
    loss_of(model, 0).backward()
    first, second = (f"layers.{layer}" for layer in optimizer.grass.active_layers)
    for drop in (optimizer.zero_grad, optimizer.skip_step):
        with pytest.raises(GrassError, match=rf"has updated 2 layers \({first}, {second}\) in its backward"):
            drop()
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.grass.step == 1


def test_half_a_step_can_be_dropped_if_nothing_was_updated():
    in_backward = {"offload": {"mode": "interval", "update_in_backward": True}}
    dropped = ran(lambda optimizer, backward, loss: [backward(), optimizer.skip_step()], 2, 1, **in_backward)
    assert same(dropped, ran(None, 2))


@pytest.mark.parametrize("in_backward", [False, True])
def test_gradients_may_be_dropped_between_forward_and_backward(in_backward):
    """As many loops do; layers are still updated in the backward."""
    model, optimizer = made(offload={"mode": "interval", "update_in_backward": in_backward})
    for step in range(7):
        loss = loss_of(model, step)
        optimizer.zero_grad()
        loss.backward()
        active = [p for i in optimizer.grass.active_layers for p in model.layers[i].parameters()]
        updated = all(p.grad is None for p in active)
        assert updated == (in_backward or step < 2)
        optimizer.step()
    assert same(outcome(model, optimizer, torch.Tensor.detach), ran(None))


def test_a_skipped_step_is_counted_and_leaves_no_gradient():
    model, optimizer = made(probe_steps=0)
    loss_of(model, 0).backward()
    optimizer.skip_step()
    assert (optimizer.grass.skipped, optimizer.grass.step) == (1, 0)
    assert all(p.grad is None for p in model.parameters())
    optimizer.detach()
    optimizer.zero_grad()
    with pytest.raises(GrassError, match="detached"):
        optimizer.skip_step()


def test_one_backward_too_many_in_a_probe_names_skip_step():
    model, _optimizer = made()
    loss_of(model, 0).backward()
    with pytest.raises(GrassError, match=r"one backward more .* optimizer\.skip_step\(\) where a batch is dropped"):
        loss_of(model, 1).backward()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_of_the_probe_without_a_backward_is_none(accumulation, caplog):
    """Stock does nothing at such a step, and in the probe it would measure nothing."""

    def trained(idle: int) -> list:
        model, optimizer = made(accumulation)
        for step in range(6):
            for _ in range(idle if step < 2 else 0):
                optimizer.step()
            for micro in range(accumulation):
                (loss_of(model, 2 * step + micro) / accumulation).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert (optimizer.grass.step, optimizer.grass.skipped) == (6, 2 * idle)
        return outcome(model, optimizer, torch.Tensor.detach)

    expected = trained(0)
    caplog.clear()
    assert same(trained(2), expected)
    assert [r.message for r in caplog.records if "states (" not in r.message] == [
        "optimizer.step() was called in the probe after 0 steps, and no backward had given a gradient: it measures "
        "nothing and is no step of the probe; such calls are counted in grass.skipped."
    ]


def test_a_probe_step_without_a_backward_keeps_the_graph():
    model, optimizer = made()
    loss = loss_of(model, 0)
    optimizer.step()
    loss.backward()
    optimizer.step()
    assert (optimizer.grass.step, optimizer.grass.skipped) == (1, 1)
