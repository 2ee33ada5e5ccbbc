"""The measure of every backend: the same samples and weights as one process with an AdamW per layer, by hand."""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Any

import pytest
import torch

import grass_dist
from integration_tests.support.model import (
    ADAMW,
    CLIP,
    DRAWS,
    FROZEN,
    GLOBAL_BATCH,
    LAYERS,
    decay_groups,
    global_batch,
    schedule,
    small_llama,
    wrapped,
)
from integration_tests.support.parity import check_parity
from integration_tests.support.reference import run_reference
from integration_tests.support.scenarios import FOUR, TWO, scenarios
from integration_tests.support.training import full, local, train_grass

pytestmark = pytest.mark.timeout(420)

STEPS = 30


@pytest.fixture(scope="module")
def reference():
    return run_reference(DRAWS, STEPS)


def test_the_reference_run_tests_something(reference):
    training = reference["active"][DRAWS["probe_steps"] :]
    assert len(set(training)) >= 6 and len(reference["norms"]) == STEPS - 3
    assert min(reference["norms"]) > 0.5  # clipping binds at every step
    final = reference["importances"][-1]
    assert max(final) > 1.5 * min(final) and reference["importances"][3] != final


# One process.


def test_one_process(reference):
    check_parity([train_grass(0, 1, "single", DRAWS, STEPS)], reference)


@pytest.mark.parametrize("ahead", [0, 1])
def test_one_process_that_draws_less_far_ahead(reference, ahead):
    settings = {**DRAWS, "draw_ahead": ahead}
    by_hand = run_reference(settings, STEPS)
    assert by_hand["active"] != reference["active"]
    check_parity([train_grass(0, 1, "single", settings, STEPS)], by_hand)


def test_one_process_without_accumulation(reference):
    check_parity([train_grass(0, 1, "single", DRAWS, STEPS, accumulation=1)], reference)


# Several ranks.


def trained(rank: int, world_size: int, backend: str, offload: str | None = None, **how: Any) -> dict[str, Any]:
    settings = DRAWS if offload is None else {**DRAWS, "offload": {"mode": offload}}
    return train_grass(rank, world_size, backend, settings, STEPS, **how)


@scenarios(
    TWO(trained, "fsdp2"),
    TWO(trained, "fsdp2", sync_every_micro_batch=False),
    TWO(trained, "fsdp2", accumulation=1),
    TWO(trained, "ddp"),
    TWO(trained, "ddp", "none", sync_every_micro_batch=False),
)
def test_two_ranks(runs, reference):
    check_parity(runs, reference)


@scenarios(FOUR(trained, "fsdp2"), FOUR(trained, "hsdp"), FOUR(trained, "ddp"))
def test_four_ranks(runs, reference):
    check_parity(runs, reference)


@pytest.fixture(scope="module")
def frozen_reference():
    return run_reference(DRAWS, STEPS, frozen=FROZEN)


@scenarios(TWO(trained, "fsdp2", frozen=FROZEN), TWO(trained, "ddp", frozen=FROZEN))
def test_layers_that_the_user_has_frozen_do_not_compete(runs, frozen_reference):
    assert max(map(max, frozen_reference["active"])) == LAYERS - len(FROZEN) - 1
    check_parity(runs, frozen_reference)


@pytest.fixture(scope="module")
def bf16_reference():
    return run_reference(DRAWS, STEPS, torch.bfloat16)


@scenarios(
    TWO(trained, "fsdp2", dtype=torch.bfloat16),
    TWO(trained, "fsdp2", dtype=torch.bfloat16, sync_every_micro_batch=False),
    TWO(trained, "ddp", dtype=torch.bfloat16),
)
def test_bf16_weights_with_fp32_masters(runs, bf16_reference):
    assert runs[0]["active"] == runs[1]["active"] == bf16_reference["active"]
    moved = rounded = 0.0
    start = run_reference(DRAWS, 0, torch.bfloat16)["params"]
    for name, theirs in bf16_reference["params"].items():
        moved += (theirs - start[name]).square().sum().item()
        rounded += (runs[0]["params"][name] - theirs).square().sum().item()
    assert runs[0]["state_bytes"] > 0
    assert math.sqrt(rounded / moved) < 0.1  # bf16 gradients differ by rounding; the trajectory is the same
    assert runs[0]["frozen_moved"] == runs[1]["frozen_moved"] == 0


# All layers, without a probe.


def all_layers_and_adamw(rank: int, world_size: int, backend: str) -> dict[str, Any]:
    """γ = L without a probe beside stock AdamW under the same wrapper: six steps, accumulation, clipping, groups."""

    def run(make_optimizer) -> dict[str, torch.Tensor]:
        model = wrapped(small_llama(), backend, world_size)
        optimizer = make_optimizer(model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        per = GLOBAL_BATCH // world_size // 2
        for step in range(6):
            x = global_batch(step)
            for micro in range(2):
                mine = x[(micro * world_size + rank) * per :][:per]
                with model.no_sync() if backend == "ddp" and micro == 0 else contextlib.nullcontext():
                    (model(input_ids=mine, labels=mine).loss / 2).backward()
            if isinstance(optimizer, grass_dist.GrassOptimizer):
                optimizer.clip_grad_norm_(CLIP)
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return {n: full(p).clone() for n, p in model.named_parameters()}

    config = grass_dist.GrassConfig(active_layers=8, probe_steps=0, sampling_interval=2, update_interval=2)
    ours = run(lambda m: grass_dist.GrassOptimizer(m, torch.optim.AdamW, ADAMW, config=config, params=decay_groups(m)))
    stock = run(lambda m: torch.optim.AdamW(decay_groups(m), **ADAMW))
    return {"differing": [n for n in stock if not torch.equal(ours[n], stock[n])], "compared": len(stock)}


@scenarios(TWO(all_layers_and_adamw, "fsdp2"), TWO(all_layers_and_adamw, "ddp"), FOUR(all_layers_and_adamw, "hsdp"))
def test_with_all_layers_and_no_probe_it_is_adamw_to_the_bit(runs):
    for run in runs:
        assert run["compared"] > 70 and run["differing"] == []


# A state dict.


def saved_and_loaded(rank: int, world_size: int, backend: str) -> dict[str, Any]:
    """Two ends of a run saved between a draw and its switch: undisturbed, and of a new model that loaded it."""
    settings = {**DRAWS, "probe_steps": 2, "draw_ahead": 2}  # drawn after 8 steps, switched after 10

    def build(state=None):
        model = wrapped(small_llama(), backend, world_size)
        optimizer = grass_dist.GrassOptimizer(
            model, torch.optim.AdamW, ADAMW, config=grass_dist.GrassConfig(**settings), params=decay_groups(model)
        )
        if state is not None:
            weights, optimizer_state = state
            with torch.no_grad():
                for p, w in zip(model.parameters(), weights, strict=True):
                    local(p).copy_(w)
            optimizer.load_state_dict(optimizer_state)
        return model, optimizer

    def steps(model, optimizer, numbers):
        for step in numbers:
            x = global_batch(step, 2 * world_size)[2 * rank : 2 * rank + 2]
            model(input_ids=x, labels=x).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = build()
    steps(model, optimizer, range(9))
    saved = [local(p).clone() for p in model.parameters()], copy.deepcopy(optimizer.state_dict())
    steps(model, optimizer, range(9, 20))
    other, other_optimizer = build(saved)
    steps(other, other_optimizer, range(9, 20))
    return {
        "differing": [
            n
            for (n, p), q in zip(model.named_parameters(), other.parameters(), strict=True)
            if not torch.equal(local(p), local(q))
        ],
        "same layers": optimizer.grass.active_layers == other_optimizer.grass.active_layers,
        "step": other_optimizer.grass.step,
    }


@scenarios(TWO(saved_and_loaded, "fsdp2"), TWO(saved_and_loaded, "ddp"))
def test_a_saved_run_continues_to_the_bit(runs):
    for run in runs:
        assert run == {"differing": [], "same layers": True, "step": 20}
