"""A loop that drops batches, each in one of the ways of loops of one's own; it must train as if it never saw them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from grass_dist import GrassOptimizer

Loss = Callable[[int], torch.Tensor]
"""Loss of the micro-batch of a number."""


class Broken(Exception):
    """What a loop raises and catches."""


def before_its_backward(optimizer: GrassOptimizer, backward: Callable[[], None], loss: Loss) -> None:
    """A guard on the loss, with no other line than ``continue``; and a validation that forgot no_grad."""
    loss(99)


def by_zero_grad(optimizer: GrassOptimizer, backward: Callable[[], None], loss: Loss) -> None:
    backward()
    optimizer.zero_grad()


def by_zero_grad_to_zeros(optimizer: GrassOptimizer, backward: Callable[[], None], loss: Loss) -> None:
    backward()
    optimizer.zero_grad(set_to_none=False)
    optimizer.zero_grad()


def by_skip_step(optimizer: GrassOptimizer, backward: Callable[[], None], loss: Loss) -> None:
    backward()
    optimizer.skip_step()


def by_skip_step_of_the_method(optimizer: GrassOptimizer, backward: Callable[[], None], loss: Loss) -> None:
    backward()
    optimizer.zero_grad()
    optimizer.grass.skip_step()


def after_clipping(optimizer: GrassOptimizer, backward: Callable[[], None], loss: Loss) -> None:
    """A guard on the norm."""
    backward()
    optimizer.clip_grad_norm_(1.0)
    optimizer.zero_grad()


def by_an_exception(optimizer: GrassOptimizer, backward: Callable[[], None], loss: Loss) -> None:
    try:
        backward()
        raise Broken
    except Broken:
        optimizer.zero_grad()


DROPS = (
    before_its_backward,
    by_zero_grad,
    by_zero_grad_to_zeros,
    by_skip_step,
    by_skip_step_of_the_method,
    after_clipping,
    by_an_exception,
)

Drop = Callable[[GrassOptimizer, Callable[[], None], Loss], None]


def train(
    optimizer: GrassOptimizer,
    loss: Loss,
    steps: int,
    drop: Drop | None,
    accumulation: int = 1,
    begun: int | None = None,
) -> None:
    """Trains ``steps`` steps, and before each of them drops one that has begun.

    Args:
        accumulation: micro-batches of a step.
        begun: micro-batches of a dropped step.
    """

    def backward(micro_batches: int, first: int) -> None:
        for micro in range(micro_batches):
            (loss(first + micro) / accumulation).backward()

    for step in range(steps):
        if drop is not None:
            drop(optimizer, lambda: backward(begun or accumulation, 50), loss)
        backward(accumulation, accumulation * step)
        optimizer.step()
        optimizer.zero_grad()


def outcome(model: nn.Module, optimizer: GrassOptimizer, full: Callable[[torch.Tensor], torch.Tensor]) -> list:
    """Weights, importances and clock: what must not depend on dropped batches."""
    grass = optimizer.grass
    return [[full(p).detach().clone() for p in model.parameters()], grass.importances, grass.active_layers, grass.step]


def same(one: list, other: list) -> bool:
    weights = all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    return weights and repr(one[1:]) == repr(other[1:])  # NaN is not equal to itself
