"""Counts the bytes that a forward keeps for its backward, by a closed form over a decoder's shapes.

The form counts what transformers' Llama keeps with ``attention="sdpa"``. Per token, a layer of width h, with q
entries of queries, k of keys and of values, and i in the feed-forward, keeps for weights of w bytes:

    two norms          each an fp32 copy of its input, 4 h, and one number; if trained the normed and the scaled, 2 w h
    attention          queries, keys, values, output: w (2 q + 2 k), and one fp32 number a head
    feed-forward       gate, up and the activated gate: 3 w i; if trained the product that goes down, w i

The output keeps what a norm keeps, and the log-probabilities in fp32. A frozen layer need not keep its inputs, and the
layers below the lowest one that trains keep nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from grass_dist.plan.runs import PlannedRun
from grass_dist.plan.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of the activations of one micro-batch on a rank."""

    trained_layer: float
    frozen_layer: float
    """A frozen layer that a gradient passes through."""
    kept_layer: float
    """What a layer keeps from forward to backward under activation checkpointing: its input."""
    head: float
    """What comes after the layers, without the loss."""
    loss: float
    """Upper bound: log-probabilities and the gradients that the loss makes of them."""
    flow: float
    """Gradients of activations that pass through a layer in the backward."""


def activations_of(shape: ModelShape, run: PlannedRun) -> Activations:
    """Computes them by the closed form that the module describes."""
    w, h, i, tokens = run.weight_bytes, shape.hidden, shape.intermediate, run.tokens
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = w * (2 * queries + 2 * keys) + 4 * shape.heads
    inner = (3 if shape.gated else 2) * w * i
    frozen = 2 * (4 * h + 4) + attention + inner
    trained = frozen + 4 * w * h + (w * i if shape.gated else 0)
    head = 4 * h + 4 + 2 * w * h
    # The loss's backward holds the log-probabilities, their gradient and that of the logits, each in fp32.
    loss = 12 * shape.vocab
    flow = w * (2 * h + 2 * i) + 4 * h
    return Activations(*(tokens * nbytes for nbytes in (trained, frozen, w * h, head, loss, flow)))
