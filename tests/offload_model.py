"""Toy states, moved as those of an optimizer are, and what they must come to: arithmetic on plain tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from grass_dist.states.layout import Field, Layout
from tests.late_cuda import DEVICE, LateCuda

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
    parts: Any,
    mode: str,
    seed: int,
    *,
    steps: int = 24,
    shuffled: bool = False,
    inline: bool = False,
    cuda: LateCuda | None = None,
    folder: str | None = None,
) -> None:
    """A run of `IntervalStates` or `StreamedStates`, checked as it goes: under chaos, or on a GPU that is late.

    Layers switch every third step; now and then all states are read, one is replaced, or a step updates nothing.

    Args:
        parts: modules of the package by their names, one of which may be a mutant.
        cuda: `torch.cuda` of now; None is the CPU and chaos.
        folder: of files in the place of host memory.

    Raises:
        AssertionError: a state or weight is not what it must be.
    """
    rng = random.Random(seed)
    toys = [Toy(i) for i in range(LAYERS)]
    active = rng.randint(2, 4)
    ahead = rng.randint(0, 2) if mode == "interval" else 0
    slots = active + bool(ahead) if mode == "interval" else 2
    longest = max(toy.layout.device_bytes for toy in toys)
    device, chaos = (CPU, seed) if cuda is None else (DEVICE, None)
    store = parts.store.LayerStateStore([toy.layout.host_bytes for toy in toys], device, folder)
    transfers = parts.transfer.TransferEngine(device, mapped=folder is not None, chaos=chaos, inline=inline)
    if cuda is not None:
        busy = torch.zeros(8, device=device)
        for _ in range(40):
            busy.add_(1)  # the compute has much to do before what follows
    pool = parts.slots.SlotPool(slots, longest, device, transfers.allocated)
    if mode == "interval":
        states = parts.moving.IntervalStates(toys, pool, store, transfers, prefetch_steps=ahead)
    else:
        states = parts.moving.StreamedStates(toys, pool, store, transfers)
    on = quiet(cuda if folder is None else None)
    known = [(0.0, 0.0)] * LAYERS
    weights = torch.zeros(LAYERS, dtype=torch.float64, device=device)
    layers, told = tuple(sorted(rng.sample(range(LAYERS), active))), None
    for layer in rng.sample(range(LAYERS), rng.randint(0, 3)):  # as a checkpoint does
        fill(states, toys, known, weights, layer)
    with on():
        states.leave(layers)
        states.enter(layers)
    for step in range(steps):
        order = rng.sample(layers, active) if shuffled else list(reversed(layers))
        updates = rng.random() < 0.9
        numbers = {layer: float(rng.randint(1, 9)) for layer in order if updates}
        resting = [] if inline else states.resting(list(numbers))

        def update_resting(numbers=numbers, resting=resting) -> None:
            for layer in resting:
                toys[layer].update(numbers[layer], weights[layer])

        with on():
            if resting:
                states.update_all("", resting, update_resting)
            for layer, number in numbers.items():
                if layer not in resting:
                    update(states, layer, toys[layer], number, weights[layer], inline=inline)
        for layer, number in numbers.items():
            known[layer] = expected(*known[layer], number)
        if updates:
            check_places(states, layers, told, slots)
        if rng.random() < 0.1:  # while updates may still be under way
            replace(states, toys, known, weights, rng.randrange(LAYERS), layers, told)
        with on():
            states.finish()
        for layer, (_, b) in enumerate(known):
            assert weights[layer].item() == b * toys[layer].layout.fields[1].shape[0], f"weight of {layer}"
        assert states.device_bytes == slots * longest
        if step % 3 == 0:
            following, draws_ahead = tuple(sorted(rng.sample(range(LAYERS), active))), rng.random() < 0.8
        if step % 3 == 2:
            layers = following
            told = None
            with on():
                states.leave(layers)
                states.enter(layers)
            if inline and cuda is None:
                check_shown(states, toys, layers, resident=mode == "interval")
        elif draws_ahead:
            told = following, 2 - step % 3
            with on():
                states.expect(*told)
            if told[1] <= ahead and not set(following) <= set(layers):
                assert len(states._on_device()) == active + 1, "no layer has come ahead"
        under_way: list[tuple[torch.Tensor, float]] = []
        if rng.random() < 0.2:
            read(states, toys, known)
            if cuda is not None:  # reads that are queued
                for toy, numbers in zip(toys, known, strict=True):
                    under_way += [(v.clone(), n) for v, n in zip(toy.views, numbers, strict=False)]
        if rng.random() < (0.6 if under_way else 0.15):
            replace(states, toys, known, weights, rng.randrange(LAYERS), layers, told)
        assert all(copy.eq(number).all() for copy, number in under_way if copy.is_cuda), "read too late"
    read(states, toys, known)
    traffic = states.harvest()
    assert traffic.seconds > 0 and (cuda is None or traffic.waited > 0)
    assert len(states._updates) + len(transfers._copied) + len(transfers._computed) < 8 * LAYERS, "events are kept"


def check_places(states: Any, layers: Sequence[int], told: tuple[Sequence[int], int] | None, slots: int) -> None:
    """After the updates of a step: what is needed next has a slot, and begins to come, and nothing else has one."""
    follow = told[0] if told is not None and told[1] == 1 else None
    if states.stays:
        assert follow is None or set(states._on_device()) == set(follow), "a switch has not begun"
    else:
        needed = sorted(layers if follow is None else follow, reverse=True)[:slots]
        assert set(states._on_device()) == set(needed), "what is needed next does not come"


def quiet(cuda: LateCuda | None) -> Any:
    """Makes a context in which the host must not wait for the device; on the CPU it may."""

    @contextmanager
    def on() -> Iterator[None]:
        assert cuda is not None
        cuda.quiet = True
        try:
            yield
        finally:
            cuda.quiet = False

    def nothing() -> AbstractContextManager[None]:
        return nullcontext()

    return nothing if cuda is None else on


def update(states: Any, layer: int, toy: Toy, number: float, weight: torch.Tensor, *, inline: bool) -> None:
    if inline:
        states.ready(layer)
        toy.update(number, weight)
        states.used(layer)
    else:
        states.update(layer, lambda: toy.update(number, weight))


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


def fill(states: Any, toys: list[Toy], known: Any, weights: torch.Tensor, layer: int) -> None:
    """Gives a layer another state."""
    toy = toys[layer]

    def write() -> None:
        toy.views[0].fill_(2.0)
        toy.views[1].fill_(3.0)
        toy.born = True

    states.put(layer, write)
    known[layer] = (2.0, 3.0)
    weights[layer] = 3.0 * toy.layout.fields[1].shape[0]


def replace(states, toys, known, weights, layer, layers, following) -> None:
    fill(states, toys, known, weights, layer)
    states.leave(layers)
    states.enter(layers)
    if following is not None:
        states.expect(*following)
