"""GRASS in one process, written out by hand from the paper: no code of grass_dist, one torch AdamW a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from integration_tests.support.model import ADAMW, CLIP, global_batch, schedule, small_llama


def draw(
    p: list[float], count: int, seed: int, round: int, sizes: Sequence[int] = (), budget: int | None = None
) -> tuple[int, ...]:
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, round], dtype=np.uint64)))
    times = [-math.log1p(-u) / q for u, q in zip(generator.random(len(p)), p, strict=True)]
    order = sorted(range(len(p)), key=lambda i: times[i])
    if budget is None:
        return tuple(sorted(order[:count]))
    taken: list[int] = []
    for i in order:
        if len(taken) < count and sum(sizes[j] for j in [*taken, i]) <= budget:
            taken.append(i)
    return tuple(sorted(taken))


def probabilities(m: list[float], temperature: float) -> list[float]:
    mean = sum(m) / len(m)
    weights = [math.exp(x / mean / temperature) for x in m]
    return [w / sum(weights) for w in weights]


def run_reference(
    settings: dict, steps: int, dtype: torch.dtype = torch.float32, frozen: Sequence[int] = (), make: Any = small_llama
) -> dict:
    """The trajectory of `small_llama`, or of what ``make`` makes of it."""
    model = make(dtype, frozen)
    layers = [layer for i, layer in enumerate(model.model.layers) if i not in frozen]

    def loss_at(step: int) -> torch.Tensor:
        x = global_batch(step)
        return model(input_ids=x, labels=x).loss

    return follow(model, layers, loss_at, settings, steps)


def follow(
    model: nn.Module, layers: Sequence[nn.Module], loss_at: Callable[[int], torch.Tensor], settings: dict, steps: int
) -> dict:
    """The trajectory of any model, of which ``layers`` compete and all else with ``requires_grad`` trains always.

    Adapters in the layers, by their names in peft, train always as well, at the rate of ``settings["adapters"]``.

    Args:
        loss_at: the loss of the global batch of a step.
    """
    known: set[int] = set()
    units = []
    for layer in layers:  # what two layers share is the first one's
        units.append([p for n, p in layer.named_parameters() if id(p) not in known and "lora_" not in n])
        known.update(map(id, units[-1]))
    names = {id(p): n for n, p in model.named_parameters()}
    in_layers = {id(p) for unit in units for p in unit}
    roles = [p for p in model.parameters() if id(p) not in in_layers and p.requires_grad]
    sizes = [sum(p.numel() for p in unit) for unit in units]
    master = {id(p): p.detach().clone().float().requires_grad_() for p in model.parameters()}

    def adamw(params):
        groups = [
            {"params": [master[id(p)] for p in params if "norm" not in names[id(p)]], "weight_decay": 0.1},
            {"params": [master[id(p)] for p in params if "norm" in names[id(p)]], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], **ADAMW)

    optimizers = [adamw(unit) for unit in units]
    role_optimizer = adamw([p for p in roles if "lora_" not in names[id(p)]])
    adapters = [p for p in roles if "lora_" in names[id(p)]]
    always = [(role_optimizer, ADAMW["lr"])]
    if adapters:
        always.append((adamw(adapters), settings["adapters"]["learning_rate"]))
    probe, interval, update = settings["probe_steps"], settings["sampling_interval"], settings["update_interval"]
    ahead = settings.get("draw_ahead")
    if ahead is None:
        ahead = min(2, interval - 1, update - 1)
    alpha, tau, gamma, seed = (settings[k] for k in ("ema_alpha", "temperature", "active_layers", "seed"))
    budget = settings.get("active_parameters")
    m = [math.nan] * len(units)
    measured: list[list[float]] = [[] for _ in units]
    active = drawn = tuple(range(len(units)))
    log = {"active": [], "importances": [], "losses": [], "norms": []}
    for step in range(steps):
        trained = step - probe
        if trained == 0 or (trained > 0 and (trained + ahead) % update == 0):
            for i, values in enumerate(measured):
                if values:
                    new = sum(values) / len(values)
                    m[i] = new if math.isnan(m[i]) else alpha * new + (1 - alpha) * m[i]
            measured = [[] for _ in units]
        if trained == 0:
            drawn = draw(probabilities(m, tau), gamma, seed, 0, sizes, budget)
        elif trained > 0 and (trained + ahead) % interval == 0:
            drawn = draw(probabilities(m, tau), gamma, seed, (trained + ahead) // interval, sizes, budget)
        if trained >= 0 and trained % interval == 0:
            active = drawn
        log["active"].append(active)
        log["importances"].append(list(m))
        model.zero_grad()
        loss = loss_at(step)
        loss.backward()
        log["losses"].append(loss.item())
        for i in active:
            squares = [p.grad.double().pow(2).sum().item() for p in units[i] if p.grad is not None]
            measured[i].append(math.sqrt(sum(squares) / sizes[i]))
        if trained < 0:
            continue
        live = [p for i in active for p in units[i]] + roles
        for p in live:
            master[id(p)].grad = None if p.grad is None else p.grad.float()
        log["norms"].append(torch.nn.utils.clip_grad_norm_([master[id(p)] for p in live], CLIP).item())
        for optimizer, rate in [*[(optimizers[i], ADAMW["lr"]) for i in active], *always]:
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(step)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for p in live:
                p.copy_(master[id(p)])
    log["params"] = {n: p.detach().float().clone() for n, p in model.named_parameters()}
    return log
