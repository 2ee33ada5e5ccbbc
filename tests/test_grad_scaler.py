"""A `torch.amp.GradScaler` in a loop of one's own, from the first step of a probe on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from grass_dist import GrassConfig, GrassError, GrassOptimizer
from tests.tiny import loss_of, tiny

CONFIG = {"active_layers": 2, "probe_steps": 3, "sampling_interval": 3, "update_interval": 3}
TIMES = 2.0**6
"""Factor of the losses: so a scale of 2 ** 127 is too large, and one of 2 ** 121 is not."""


def made(**config: Any) -> tuple[nn.Module, GrassOptimizer]:
    model = tiny()
    return model, GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=GrassConfig(**{**CONFIG, **config}))


def loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    scaler: torch.amp.GradScaler | None = None,
    unscale: bool = False,
    clip: float | None = None,
    zero_grad: Callable[[], None] | None = None,
) -> list[float]:
    """Trains as in torch's recipe of automatic mixed precision; gives the scale after each step."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    scales = []
    for step in range(steps):
        (zero_grad or optimizer.zero_grad)()
        scaler.scale(loss_of(model, step) * TIMES).backward()
        if unscale:
            scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


@pytest.mark.parametrize(("unscale", "clip"), [(False, None), (True, None), (True, 0.1)])
def test_a_scale_changes_neither_norms_nor_weights(unscale, clip):
    scaled, plain = made(), made()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
    scales = loop(*scaled, 12, scaler=scaler, unscale=unscale, clip=clip)
    loop(*plain, 12, clip=clip)
    assert scales[-1] == 2.0**22
    assert scaled[1].grass.importances == plain[1].grass.importances
    assert scaled[1].grass.active_layers == plain[1].grass.active_layers
    assert same(scaled[0], plain[0])


@pytest.mark.parametrize("unscale", [False, True])
def test_all_layers_train_as_with_the_stock_optimizer(unscale):
    """The first scale is so large that the gradients of some steps are not finite."""
    ends = []
    for ours in (True, False):
        model = tiny()
        if ours:
            config = GrassConfig(active_layers=8, probe_steps=0, sampling_interval=3, update_interval=3)
            optimizer: Any = GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=config)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-3, growth_interval=3)
        ends.append((loop(model, optimizer, 20, scaler=scaler, unscale=unscale, clip=0.1 if unscale else None), model))
        skipped = optimizer.grass.skipped if ours else None
        if ours:
            assert skipped > 1 and optimizer.grass.step == 20 - skipped
    assert ends[0][0] == ends[1][0]
    assert same(ends[0][1], ends[1][1])


@pytest.mark.parametrize("of_model", [False, True])
def test_a_probe_step_that_is_not_finite_is_dropped(of_model):
    """Batches are the same as in a run without a scaler whose first steps are left out."""
    model, optimizer = made()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-20)
    zero_grad = model.zero_grad if of_model else None
    scales = loop(model, optimizer, 2, scaler=scaler, zero_grad=zero_grad)
    assert scales == [2.0**107, 2.0**107] and optimizer.grass.step == 1
    assert optimizer.grass.skipped == 1 and optimizer.grass.dropped == 0
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    loop(model, optimizer, 3, scaler=scaler, zero_grad=zero_grad)

    other, plain = made()
    for step in (1, 0, 1, 2):
        plain.zero_grad()
        (loss_of(other, step) * TIMES).backward()
        plain.step()
    assert optimizer.grass.importances == plain.grass.importances
    assert same(model, other)


def test_a_probe_shows_one_gradient_of_zeros_until_its_step():
    model, optimizer = made()
    loss_of(model, 0).backward()
    shown = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(shown) == 1 and not shown[0].any() and shown[0].numel() == 8
    assert optimizer.clip_grad_norm_(1.0) == 0
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    (loss_of(model, 1) * torch.inf).backward()
    assert [p.grad.isnan().all() for p in model.parameters() if p.grad is not None] == [True]
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_without_roles_the_gradient_is_on_a_layer():
    scaled, plain = made(always_active=()), made(always_active=())
    loop(*scaled, 9, scaler=torch.amp.GradScaler("cpu"), unscale=True)
    loop(*plain, 9)
    assert scaled[1].grass.importances == plain[1].grass.importances and same(scaled[0], plain[0])


def test_a_scaler_and_updates_in_the_backward_are_refused():
    model, optimizer = made(offload={"mode": "interval", "update_in_backward": True})
    with pytest.raises(GrassError, match="GradScaler unscales gradients after the backward"):
        loop(model, optimizer, 1, scaler=torch.amp.GradScaler("cpu"))
