"""Toy layers whose weights rest in host memory, used as a model's are, and what their sums must come to."""

from __future__ import annotations

import random
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import nn

from grass_dist.states import layer_weights
from grass_dist.states.layer_weights import LayerWeights
from tests.late_cuda import DEVICE, LateCuda
from tests.offload_model import CPU, quiet

LAYERS = 7


def drive_weights(parts: Any, seed: int, *, steps: int = 8, cuda: LateCuda | None = None) -> None:
    """A run of `HostWeights`, checked as it goes: under chaos, or on a GPU that is late.

    Args:
        parts: modules of the package by their names, one of which may be a mutant.
        cuda: `torch.cuda` of now; None is the CPU and chaos.

    Raises:
        AssertionError: what was computed with the weights, or what rests in host memory, is not what it must be.
    """
    rng = random.Random(seed)
    device, chaos = (CPU, seed) if cuda is None else (DEVICE, None)
    sizes = [40 + 24 * (n % 3) for n in range(LAYERS)]
    params = [nn.Parameter(torch.full((size,), float(n + 1), device=device)) for n, size in enumerate(sizes)]
    known = [float(n + 1) for n in range(LAYERS)]
    layers = [LayerWeights(f"layer {n}", [(f"{n}.weight", param)]) for n, param in enumerate(params)]
    store = parts.store.LayerStateStore([layer.layout.host_bytes for layer in layers], device)
    transfers = parts.transfer.TransferEngine(device, chaos=chaos, inline=True)
    if cuda is not None:
        busy = torch.zeros(8, device=device)
        for _ in range(40):
            busy.add_(1)
    slots, active = rng.randint(2, 3), 2
    longest = max(layer.layout.device_bytes for layer in layers)
    pool = parts.slots.SlotPool(slots + active, longest, device, transfers.allocated)
    on, trains, changed = quiet(cuda), (), False
    sums: list[tuple[torch.Tensor, torch.Tensor, float]] = []
    with ExitStack() as stack:
        if cuda is not None:  # which has no stream with an address, for DLPack to ask for
            stack.enter_context(mock.patch.object(layer_weights, "_alone", lambda view: view))
        weights = parts.weights.HostWeights(layers, range(LAYERS), pool, store, transfers, slots)
        stack.enter_context(torch.no_grad())
        back = stack.enter_context(mock.patch.object(parts.weights, "in_backward", return_value=False))
        stack.enter_context(mock.patch.object(parts.weights, "at_end_of_backward"))
        for step in range(steps):
            if step % 2 == 0:
                trains = tuple(sorted(rng.sample(range(LAYERS), active)))
                weights.leave(trains)
                for n, param in enumerate(params):
                    if n not in trains and not param.is_cuda:  # else someone has just set it
                        assert all(value == known[n] for value in read(param)), f"layer {n} in host memory"
                with nullcontext() if changed else on():  # to take over what someone has set, the host waits
                    weights.enter(trains)
            forward, backward = torch.zeros((), device=device), torch.zeros((), device=device)
            with nullcontext() if changed else on():
                weights.pass_begins(0)
                left_out = rng.randrange(-LAYERS, LAYERS)  # its weights come for nothing
                for n in range(LAYERS):
                    if n == left_out:
                        continue
                    weights.forward_begins(n)
                    forward.add_(params[n].data.sum())
                    weights.forward_ends(n, differentiable=True)
                weights.pass_ends()
                back.return_value = True
                for n in reversed(range(LAYERS)):
                    if n == left_out:
                        continue
                    weights.backward_begins(n, weights.epoch)
                    if n not in trains and rng.random() < 0.3:  # recomputed
                        weights.forward_begins(n)
                        backward.add_(0 * params[n].data.sum())
                        weights.forward_ends(n)
                    backward.add_(params[n].data.sum())
                weights._backward_ends()
                back.return_value = False
                for n in trains:
                    params[n].data.add_(1)
            used = [size * value for n, (size, value) in enumerate(zip(sizes, known, strict=True)) if n != left_out]
            sums.append((forward, backward, sum(used)))
            if step % 2 == 0:
                check(sums)
            for n in trains:
                known[n] += 1
            if changed := rng.random() < 0.3:
                n = rng.choice([n for n in range(LAYERS) if n not in trains])
                known[n] = 2.0
                params[n].data = torch.full((sizes[n],), 2.0, device=device)
        check(sums)
        traffic = weights.harvest()
        assert traffic.seconds > 0 and (cuda is None or traffic.waited > 0)
        assert len(transfers._copied) + len(transfers._computed) < 20 * LAYERS, "events are kept"
        weights.close()
        for n, param in enumerate(params):
            assert param.detach().sum().item() == sizes[n] * known[n], f"layer {n} at the end"


def check(sums: list[tuple[torch.Tensor, torch.Tensor, float]]) -> None:
    for forward, backward, expected in sums:
        assert forward.item() == expected, "the forward"
        assert backward.item() == expected, "the backward"
    sums.clear()


def read(param: nn.Parameter) -> list[float]:
    """What the host sees now, without waiting for anything."""
    return param.detach().tolist()
