"""Families of models on two ranks: the same layers and weights as one process with an AdamW for each layer, by hand.

A row of `STACKS` is a family of `tests/families.py`: to add one, write its model and batches there, and here the lists
whose blocks are its layers.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import grass_dist
from integration_tests.support.model import ADAMW, CLIP, decay_groups, schedule, wrapped
from integration_tests.support.reference import follow
from integration_tests.support.scenarios import Spawn, scenarios
from integration_tests.support.training import full
from tests.families import loss_of, made

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

STACKS: dict[str, tuple[str, ...]] = {
    "esm2": ("esm.encoder.layer",),
    "esmfold": ("trunk.blocks",),
    "t5": ("encoder.block", "decoder.block"),
    "whisper": ("model.encoder.layers", "model.decoder.layers"),
    "llava": ("model.vision_tower.encoder.layers", "model.language_model.layers"),
    "vit": ("vit.layers",),
    "reward": ("model.layers",),
    "jamba": ("model.layers",),
    "mixtral": ("model.layers",),
    "swin": ("swin.encoder.layers.0.blocks", "swin.encoder.layers.1.blocks"),
    "zamba": ("model.layers",),
}
ROWS, STEPS = 4, 10
SETTINGS = {
    "active_layers": 2,
    "probe_steps": 2,
    "sampling_interval": 2,
    "update_interval": 2,
    "ema_alpha": 0.3,
    "temperature": 2.0,
    "seed": 7,
}
MORE = {"swin": {"active_layers": 3, "active_parameters": 5000}}
"""Of blocks with 890 and 3298 parameters: two small ones and a large one, or fewer where two large ones come first."""
TORCH, ZERO = Spawn(2, timeout=800), Spawn(2, before=gc.freeze, timeout=800)


def blocks_of(model: nn.Module, name: str) -> list[nn.Module]:
    return [block for stack in STACKS[name] for block in model.get_submodule(stack).children()]


def rows_of(batch: dict[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    """The rows of a rank; what is no tensor is the same for all."""
    rows = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    return {key: value[rows] if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def observed(grass: Any, take_step: Callable[[int], float]) -> dict[str, Any]:
    """The layers, importances and losses of a run."""
    log: dict[str, Any] = {"active": [], "importances": [], "losses": []}
    for step in range(STEPS):
        log["active"].append(grass.active_layers)
        log["importances"].append(grass.importances)
        log["losses"].append(take_step(step))
    return log


def over_torch(rank: int, world_size: int, name: str, backend: str) -> dict[str, Any]:
    model, batch, _ = made(name)
    model = wrapped(model, backend, world_size, layers=blocks_of(model, name))
    config = grass_dist.GrassConfig(**SETTINGS | MORE.get(name, {}))
    optimizer = grass_dist.GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=config, params=decay_groups(model))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)

    def take_step(step: int) -> float:
        loss = loss_of(model(**rows_of(batch(step, ROWS), rank, world_size)))
        loss.backward()
        optimizer.clip_grad_norm_(CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return loss.item()

    log = observed(optimizer.grass, take_step)
    log["params"] = {n.removeprefix("module."): full(p).clone() for n, p in model.named_parameters()}
    return log


def over_zero(rank: int, world_size: int, name: str, stage: int) -> dict[str, Any]:
    from integration_tests.support import zero

    model, batch, _ = made(name)
    engine = zero.make_engine(zero.ds_config(stage, SETTINGS | MORE.get(name, {})), model=model)

    def take_step(step: int) -> float:
        loss = loss_of(engine(**rows_of(batch(step, ROWS), rank, world_size)))
        engine.backward(loss)
        engine.step()
        return loss.item()

    log = observed(engine.grass, take_step)
    log["params"] = {n: zero.full(p) for n, p in engine.module.named_parameters()}
    engine.destroy()
    return log


@pytest.fixture(scope="module")
def reference() -> Callable[[str], dict[str, Any]]:
    """Trains a family in one process, once."""
    known: dict[str, dict[str, Any]] = {}

    def of(name: str) -> dict[str, Any]:
        if name not in known:
            model, batch, _ = made(name)
            settings = SETTINGS | MORE.get(name, {})
            known[name] = follow(
                model, blocks_of(model, name), lambda step: loss_of(model(**batch(step, ROWS))), settings, STEPS
            )
        return known[name]

    return of


def check(runs: list[dict[str, Any]], by_hand: dict[str, Any], name: str) -> None:
    start = dict(made(name)[0].named_parameters())
    drawn = set(by_hand["active"][SETTINGS["probe_steps"] :])
    assert len(drawn) > 2, "the same layers nearly always"
    worst = {n: (runs[0]["params"][n] - p).abs().max().item() for n, p in by_hand["params"].items()}
    far = sorted(worst, key=lambda n: -worst[n])[:3]
    print(f"{name}: worst parameter difference {worst[far[0]]:.1e}", [f"{n} {worst[n]:.1e}" for n in far[1:]])
    for run in runs:
        assert run["active"] == by_hand["active"]
        assert all(torch.equal(run["params"][n], p) for n, p in runs[0]["params"].items())
    for ours, theirs in zip(runs[0]["importances"], by_hand["importances"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-9, nan_ok=True)
    losses = [sum(each) / len(runs) for each in zip(*(run["losses"] for run in runs), strict=True)]
    assert losses == pytest.approx(by_hand["losses"], rel=1e-5)
    assert worst[far[0]] <= 3e-6, far
    moved = {n for n, p in start.items() if not torch.equal(p, runs[0]["params"][n])}
    assert moved == {n for n, p in start.items() if not torch.equal(p, by_hand["params"][n])}
    assert moved and not any(n in moved for n, p in start.items() if not p.requires_grad)


@scenarios(*(TORCH(over_torch, name, backend) for name in STACKS for backend in ("fsdp2", "ddp")))
def test_a_family_under_torch(runs, request, reference):
    name = request.node.callspec.params["runs"].args[0]
    check(runs, reference(name), name)


@scenarios(*(ZERO(over_zero, name, stage) for name in STACKS for stage in (2, 3)))
def test_a_family_under_zero(runs, request, reference):
    name = request.node.callspec.params["runs"].args[0]
    check(runs, reference(name), name)
