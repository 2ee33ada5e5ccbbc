"""Bytes of a step: the gradients and weights of what trains go over the wire, and no byte more; states are divided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import grass_dist
from integration_tests.support.model import ADAMW, global_batch, small_llama, wrapped
from integration_tests.support.scenarios import FOUR, TWO, scenarios
from integration_tests.support.wire import Wire

pytestmark = pytest.mark.timeout(420)
LATER = pytest.mark.integration


def layers_reached_by_backward(model: nn.Module, optimizer: grass_dist.GrassOptimizer) -> set[int]:
    """Fills with the indices of the layers whose output gets a gradient in the next backward."""
    reached: set[int] = set()
    handles = []
    inner = model.module if hasattr(model, "module") else model

    def watch(index):
        def hook(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda grad: reached.add(index))

        return hook

    for index, layer in enumerate(inner.model.layers):
        handles.append(layer.register_forward_hook(watch(index)))
    return reached


def four_steps(rank: int, world_size: int, backend: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Bytes of four training steps, with and without the always-active roles: gradients, weights, what trains, states.

    The states are summed over the device and the host. After the first and the third step no layer without a state has
    a slot on the device, so that the sum is of those that have trained.
    """
    out = {}
    for name, always in (("with roles", grass_dist.config.ROLES), ("layers only", ())):
        reduce_dtype = torch.float32 if dtype != torch.float32 else None
        model = wrapped(small_llama(dtype), backend, world_size, reduce_dtype)
        config = grass_dist.GrassConfig(
            active_layers=2,
            probe_steps=0,
            sampling_interval=2,
            update_interval=3,
            draw_ahead=0,
            always_active=always,
        )
        optimizer = grass_dist.GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=config)
        counted, expected, counts, claimed, squares, lowest = [], [], [], [], [], []
        states, trained = [], {}
        roles = 4 * sum(len(unit.params) for unit in optimizer.grass.roles)  # AdamW's steps; layers' are not counted
        for step in range(4):
            units = optimizer.grass.trainable_units()
            expected.append(4 * sum(p.numel() for u in units for _, p in u.params))
            counts.append(4 * sum(len(u.params) for u in units))
            reached = layers_reached_by_backward(model, optimizer)
            before = optimizer.grass.bytes_reduced
            x = global_batch(step, 2 * world_size)[2 * rank : 2 * rank + 2]
            with Wire() as wire:
                model(input_ids=x, labels=x).loss.backward()
                optimizer.step()
            lowest.append((min(u.index for u in units if u.index is not None), min(reached, default=None)))
            counted.append({kind: wire.floats[kind] for kind in ("reduce_scatter", "all_reduce", "all_gather")})
            trained.update((unit.name, unit.numel) for unit in units)
            states.append((optimizer.state_bytes + optimizer.host_state_bytes - roles, sum(trained.values())))
            squares.append((wire.calls["all_reduce"], wire.bytes["all_reduce"] - wire.floats["all_reduce"]))
            claimed.append(optimizer.grass.bytes_reduced - before)
            optimizer.zero_grad()
        out[name] = {
            "counted": counted,
            "expected": expected,
            "counts": counts,
            "claimed": claimed,
            "squares": squares,
            "lowest": lowest,
            "states": states[0::2],
            "all layers": 4 * sum(unit.numel for unit in optimizer.grass.layers),
        }
    return out


@pytest.mark.parametrize(
    ("runs", "width", "parts"),
    [
        (TWO(four_steps, "fsdp2"), 8, 2),  # AdamW's two moments in fp32
        (TWO(four_steps, "ddp"), 8, 2),
        (TWO(four_steps, "fsdp2", torch.bfloat16), 12, 2),  # and the master
        (TWO(four_steps, "ddp", torch.bfloat16), 12, 2),
        pytest.param(FOUR(four_steps, "ddp"), 8, 4, marks=LATER),
        pytest.param(FOUR(four_steps, "hsdp"), 8, 2, marks=LATER),
    ],
    indirect=["runs"],
    ids=str,
)
def test_a_rank_keeps_its_part_of_the_states_that_exist(runs, width, parts):
    for run in runs:
        for seen in run.values():
            (first, once), (second, more) = seen["states"]
            assert parts * first == width * once and parts * second == width * more
            assert more > once > 0


@pytest.mark.parametrize("what", ["with roles", "layers only"])
@scenarios(TWO(four_steps, "fsdp2"), TWO(four_steps, "fsdp2", torch.bfloat16))
def test_fsdp2_scatters_what_trains_and_no_byte_more(runs, what):
    for run in runs:
        seen = run[what]
        assert [step["reduce_scatter"] for step in seen["counted"]] == seen["expected"] == seen["claimed"]
        assert all(step["all_reduce"] == 0 for step in seen["counted"])


@pytest.mark.parametrize("what", ["with roles", "layers only"])
@scenarios(TWO(four_steps, "ddp"))
def test_ddp_reduces_what_trains_and_a_count_of_each_parameter(runs, what):
    """How many ranks have used it: one element."""
    for run in runs:
        seen = run[what]
        expected = [e + counts for e, counts in zip(seen["expected"], seen["counts"], strict=True)]
        assert [step["all_reduce"] for step in seen["counted"]] == expected == seen["claimed"]


@pytest.mark.parametrize(
    ("runs", "width"),
    [
        (TWO(four_steps, "ddp"), 4),
        pytest.param(FOUR(four_steps, "ddp"), 4, marks=LATER),
        (TWO(four_steps, "ddp", torch.bfloat16), 2),
    ],
    indirect=["runs"],
    ids=str,
)
def test_ddp_gathers_what_has_trained_and_no_byte_more(runs, width):
    for run in runs:
        for what, seen in run.items():
            gathered = [step["all_gather"] * 4 // width for step in seen["counted"]]
            assert gathered == seen["expected"]
            if what == "layers only":
                assert [8 * n for n in gathered] == [2 * seen["all layers"]] * 4  # γ of L layers


@LATER
@scenarios(FOUR(four_steps, "hsdp"))
def test_hsdp_scatters_among_shards_and_reduces_over_replicas(runs):
    for run in runs:
        seen = run["with roles"]
        assert [step["reduce_scatter"] for step in seen["counted"]] == seen["expected"]
        assert [step["all_reduce"] * 2 for step in seen["counted"]] == seen["expected"]
        assert [2 * claimed for claimed in seen["claimed"]] == [3 * expected for expected in seen["expected"]]


@scenarios(TWO(four_steps, "fsdp2"), pytest.param(FOUR(four_steps, "hsdp"), marks=LATER))
def test_one_all_reduce_a_refresh_carries_the_measurements(runs):
    seen = runs[0]["layers only"]["squares"]
    extra = [bytes_ for _, bytes_ in seen]
    assert extra == [0, 0, 3 * 2 * 8, 0]  # T_u = 3 steps of γ = 2 layers in fp64, and nothing on other steps
    if len(runs) == 2:  # HSDP reduces gradients by the same collective
        assert [calls for calls, _ in seen] == [0, 0, 1, 0]


@scenarios(TWO(four_steps, "fsdp2"), TWO(four_steps, "ddp"))
def test_the_backward_stops_at_the_lowest_active_layer(runs):
    for run in runs:
        assert all(active == reached for active, reached in run["layers only"]["lowest"])
        assert all(reached == 0 for _, reached in run["with roles"]["lowest"])
