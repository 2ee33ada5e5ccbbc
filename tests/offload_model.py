"""Toy states, moved as those of an optimizer are, and what they must come to: arithmetic on plain tensors."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from grass_dist.offload.layout import Field, Layout
from grass_dist.offload.slots import SlotPool
from grass_dist.offload.store import LayerStateStore
from grass_dist.offload.transfer import TransferEngine

LAYERS = 6
CPU = torch.device("cpu")


class Toy:
    """A state of two vectors; layers are of unequal sizes."""

    def __init__(self, layer: int) -> None:
        self.name = f"layer {layer}"
        shape = torch.Size([40 + 24 * (layer % 3)])
        self.layout = Layout([Field("a", shape, torch.float32), Field("b", shape, torch.float64)])
        self.views: Sequence[torch.Tensor] = []
        self.born = self.resident = False

    def bind(self, views: Sequence[torch.Tensor], *, resident: bool) -> None:
        self.views, self.resident = views, resident

    def update(self, number: float, weight: torch.Tensor) -> None:
        a, b = self.views
        if not self.born:
            a.zero_()
            b.zero_()
            self.born = True
        a.neg_().add_(number)
        b.add_(a.double())
        weight.copy_(b.sum())


def expected(a: float, b: float, number: float) -> tuple[float, float]:
    a = number - a
    return a, b + a


def drive(
    module: Any,
    mode: str,
    seed: int,
    *,
    steps: int = 24,
    shuffled: bool = False,
    inline: bool = False,
    make_pool: Any = SlotPool,
) -> None:
    """A run of ``module``'s `IntervalStates` or `StreamedStates` under chaos, checked as it goes.

    Layers switch every third step; now and then all states are read, one is replaced, or a step updates nothing.

    Args:
        make_pool: `SlotPool`, or a mutant of it.

    Raises:
        AssertionError: a state or weight is not what it must be.
    """
    rng = random.Random(seed)
    toys = [Toy(i) for i in range(LAYERS)]
    active = rng.randint(2, 4)
    ahead = rng.randint(0, 2) if mode == "interval" else 0
    slots = active + bool(ahead) if mode == "interval" else 2
    longest = max(toy.layout.device_bytes for toy in toys)
    store = LayerStateStore([toy.layout.host_bytes for toy in toys], CPU)
    transfers = TransferEngine(CPU, chaos=seed, inline=inline)
    pool = make_pool(slots, longest, CPU, transfers.allocated)
    if mode == "interval":
        states = module.IntervalStates(toys, pool, store, transfers, prefetch_steps=ahead)
    else:
        states = module.StreamedStates(toys, pool, store, transfers)
    known = [(0.0, 0.0)] * LAYERS
    weights = torch.zeros(LAYERS, dtype=torch.float64)
    layers, told = tuple(sorted(rng.sample(range(LAYERS), active))), None
    states.leave(layers)
    states.enter(layers)
    for step in range(steps):
        order = rng.sample(layers, active) if shuffled else list(reversed(layers))
        for layer in order if rng.random() < 0.9 else []:
            number = float(rng.randint(1, 9))
            if inline:
                states.ready(layer)
                toys[layer].update(number, weights[layer])
                states.used(layer)
            else:
                states.update(layer, lambda t=toys[layer], n=number, w=weights[layer]: t.update(n, w))
            known[layer] = expected(*known[layer], number)
        if rng.random() < 0.1:  # while updates may still be under way
            replace(states, toys, known, weights, rng.randrange(LAYERS), layers, told)
        states.finish()
        for layer, (_, b) in enumerate(known):
            assert weights[layer].item() == b * toys[layer].layout.fields[1].shape[0], f"weight of {layer}"
        assert states.device_bytes == slots * longest
        if step % 3 == 0:
            following = tuple(sorted(rng.sample(range(LAYERS), active)))
        if step % 3 == 2:
            layers = following
            told = None
            states.leave(layers)
            states.enter(layers)
            if inline:
                check_shown(states, toys, layers, resident=mode == "interval")
        else:
            told = following, 2 - step % 3
            states.expect(*told)
        if rng.random() < 0.2:
            read(states, toys, known)
        if rng.random() < 0.15:
            replace(states, toys, known, weights, rng.randrange(LAYERS), layers, told)
    read(states, toys, known)


def check_shown(states: Any, toys: list[Toy], layers: Sequence[int], *, resident: bool) -> None:
    for layer in layers:
        states.show(layer)
    states.transfers.compute("", lambda: None, [states._places[layer].left for layer in layers])
    assert all(toys[layer].resident == resident for layer in layers if toys[layer].born)


def read(states: Any, toys: list[Toy], known: list[tuple[float, float]]) -> None:
    states.settle()
    for toy, (a, b) in zip(toys, known, strict=True):
        if toy.born:
            assert toy.views[0].eq(a).all() and toy.views[1].eq(b).all(), f"state of {toy.name}"


def replace(states, toys, known, weights, layer, layers, following) -> None:
    toy = toys[layer]

    def fill() -> None:
        toy.views[0].fill_(2.0)
        toy.views[1].fill_(3.0)
        toy.born = True

    states.put(layer, fill)
    states.leave(layers)
    states.enter(layers)
    if following is not None:
        states.expect(*following)
    known[layer] = (2.0, 3.0)
    weights[layer] = 3.0 * toy.layout.fields[1].shape[0]
