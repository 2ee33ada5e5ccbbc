"""The probe: it holds one layer's gradient at a time, updates nothing, and drops what is not finite on any rank."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

import grass_dist
from integration_tests.support.model import ADAMW, global_batch, small_llama, wrapped
from integration_tests.support.ranks import refused
from integration_tests.support.scenarios import TWO, scenarios
from integration_tests.support.training import full, local

pytestmark = pytest.mark.timeout(420)


class HeldGradients:
    """Adds up, at each gradient's arrival, the memory behind all ``.grad``s: each storage once."""

    def __init__(self, model: nn.Module) -> None:
        self.params = list(model.parameters())
        self.peak = self.calls = 0
        for param in self.params:  # registered before the optimizer's hooks, so it runs before they free anything
            param.register_post_accumulate_grad_hook(self._arrived)

    def now(self) -> int:
        storages = {}
        for param in self.params:
            if param.grad is not None:
                grad = local(param.grad)
                storages[grad.untyped_storage().data_ptr()] = grad.nbytes + storages.get(
                    grad.untyped_storage().data_ptr(), 0
                )
        return sum(storages.values())

    def _arrived(self, _: torch.Tensor) -> None:
        self.calls += 1
        self.peak = max(self.peak, self.now())


def probed(rank: int, world_size: int, backend: str, accumulation: int) -> dict[str, Any]:
    """The most bytes of gradients that parameters hold at any hook of a probe, on this rank."""
    model = wrapped(small_llama(), backend, world_size)
    config = grass_dist.GrassConfig(
        active_layers=1, probe_steps=2, sampling_interval=2, update_interval=2, offload={"mode": "none"}
    )
    held = HeldGradients(model)
    optimizer = grass_dist.GrassOptimizer(
        model, torch.optim.AdamW, ADAMW, config=config, gradient_accumulation_steps=accumulation
    )
    state_in_probe = 0
    for step in range(2):
        x = global_batch(step, 4 * world_size)
        for micro in range(accumulation):
            mine = x[(micro * world_size + rank) * 2 :][:2]
            (model(input_ids=mine, labels=mine).loss / accumulation).backward()
        optimizer.step()
        state_in_probe += optimizer.state_bytes
    return {
        "peak": held.peak,
        "left": held.now(),
        "hooks": held.calls,
        "layer": max(sum(local(p).nbytes for _, p in unit.params) for unit in optimizer.grass.layers),
        "shown": min(local(p).nbytes for unit in optimizer.grass.roles for _, p in unit.params),
        "all": sum(local(p).nbytes for p in model.parameters()),
        "state": state_in_probe,
        "moved": sum(
            not torch.equal(full(a), b) for a, b in zip(model.parameters(), small_llama().parameters(), strict=True)
        ),
    }


@scenarios(TWO(probed, "fsdp2", 1), TWO(probed, "fsdp2", 2))
def test_a_probe_holds_one_layers_gradient_and_updates_nothing(runs):
    for run in runs:
        assert 0 < run["peak"] <= run["layer"] < run["all"] / 8
        assert run["hooks"] > 0 and run["left"] == run["state"] == run["moved"] == 0


@scenarios(TWO(probed, "ddp", 1), TWO(probed, "ddp", 2))
def test_under_ddp_a_probe_holds_the_gradients_of_two_layers(runs):
    """The layer that is being reduced and the one that the backward is at; training itself needs one. (And the small
    one that a probe shows.)
    """
    for run in runs:
        assert 0 < run["peak"] <= 2 * run["layer"] + run["shown"]
        assert run["hooks"] > 0 and run["left"] == run["state"] == run["moved"] == 0


def not_finite_on_one_rank(rank: int, world_size: int, backend: str) -> dict[str, Any]:
    """A probe of three steps, in the second of which the last rank's loss is not finite."""
    model = wrapped(small_llama(), backend, world_size)
    config = grass_dist.GrassConfig(active_layers=2, probe_steps=3)
    optimizer = grass_dist.GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=config)
    for step in range(3):
        x = global_batch(step, 2 * world_size)[2 * rank : 2 * rank + 2]
        scale = float("inf") if step == 1 and rank == world_size - 1 else 1.0
        (model(input_ids=x, labels=x).loss * scale).backward()
        optimizer.step()
    return {"dropped": optimizer.grass.dropped, "importances": optimizer.grass.importances}


@scenarios(TWO(not_finite_on_one_rank, "fsdp2"), TWO(not_finite_on_one_rank, "ddp"))
def test_a_norm_that_is_not_finite_on_one_rank_drops_on_all(runs):
    for run in runs:
        assert run["dropped"] == 1
        assert all(math.isfinite(m) and m > 0 for m in run["importances"])
    assert runs[0] == runs[1]


CUT_OFF: dict[str, dict[str, Any]] = {
    "a probe": {"probe_steps": 2},
    "a round": {"sampler": "uniform", "always_active": ["final_norm", "lm_head"]},
}


def cut_off(rank: int, world_size: int, backend: str, within: str) -> str:
    """What is said of a step whose layers reentrant checkpointing cuts off."""
    bare = small_llama().train()
    layers = [checkpoint_wrapper(layer, CheckpointImpl.REENTRANT) for layer in bare.model.layers]
    bare.model.layers = nn.ModuleList(layers)
    model = wrapped(bare, backend, world_size)
    config = grass_dist.GrassConfig(active_layers=2, **CUT_OFF[within])
    optimizer = grass_dist.GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=config)
    x = global_batch(0)[rank * 4 :][:4]

    def step() -> None:
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()

    return refused(step)


@pytest.mark.parametrize(
    ("runs", "within"),
    [(TWO(cut_off, backend, within), within) for backend in ("fsdp2", "ddp") for within in CUT_OFF],
    indirect=["runs"],
    ids=str,
)
def test_layers_cut_off_from_the_backward_end_every_rank(runs, within):
    for said in runs:
        assert said.startswith("GrassError: ") and "use_reentrant=False" in said
        if within == "a probe":
            assert " active layers (" in said
