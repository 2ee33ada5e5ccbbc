"""Counts the FLOPs of a step, from the multiply-adds of a forward and from what a draw has the backward do.

The planner uses it with the mean over all draws, and the training program with the draw of each step.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Work:
    """Multiply-adds that layers take in a forward."""

    matrices: float
    """By the weights of their matrices."""
    attention: float = 0.0
    """Of queries with keys, and of probabilities with values, which have no weights."""


def step_flops(
    layers: Work,
    reached: Work,
    trained: float,
    *,
    head: float = 0.0,
    head_trains: bool = False,
    frozen: float = 0.0,
    recomputed: bool = False,
) -> tuple[float, float]:
    """Returns the FLOPs of a forward, and those of its backward.

    A multiply-add is 2 FLOP. A matrix takes one multiply-add for each entry and position in the forward, one for the
    gradient of its input, and one for the gradient of its weights. Attention has two inputs, so that its backward is
    twice its forward.

    Args:
        layers: all layers.
        reached: the layers that a gradient passes through: those at and above the lowest one that trains.
        trained: multiply-adds by matrices that train.
        head: multiply-adds of the output head. A gradient always passes through it.
        frozen: multiply-adds of what is only part of the forward.
        recomputed: the layers that a gradient passes through run forward once more, in the backward (activation
            checkpointing).
    """
    forward = 2 * (layers.matrices + layers.attention + head + frozen)
    backward = 2 * reached.matrices + 4 * reached.attention + 2 * trained + 2 * head * (2 if head_trains else 1)
    if recomputed:
        backward += 2 * (reached.matrices + reached.attention)
    return forward, backward


def lowest_reached(active: Collection[int], *, down_to_all: bool) -> int:
    """Returns the lowest layer that a gradient passes through.

    Args:
        active: indices of the layers that train, at least one.
        down_to_all: embeddings train, which are below all layers, or adapters, which are in all of them.
    """
    return 0 if down_to_all else min(active)
