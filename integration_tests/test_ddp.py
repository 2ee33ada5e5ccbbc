"""What only DDP has: gradients that it averages, and states that the ranks divide although each has whole weights."""

from __future__ import annotations

import contextlib
import copy
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import grass_dist
from grass_dist.states.update_rule import ELEMENTWISE
from integration_tests.support.model import ADAMW, small_llama, wrapped
from integration_tests.support.ranks import refused
from integration_tests.support.scenarios import FOUR, TWO, scenarios
from integration_tests.support.wire import Wire
from tests.tiny import loss_of, take_steps, tiny

pytestmark = pytest.mark.timeout(420)

# Gradients.


def two_micro_batches(rank: int, world_size: int, mode: str, inputs: str) -> dict[str, Any]:
    """Gradients of two micro-batches under DDP beside those of one process with all of them.

    Args:
        mode: which micro-batch synchronises: each, the last one, or none (then the step does it).
        inputs: the model is given ids, or embeddings, which leaves its own embeddings without a gradient.
    """

    def loss(model, micro, of_rank):
        generator = torch.Generator().manual_seed(10 * micro + of_rank)
        ids = torch.randint(0, 128, (2, 8), generator=generator)
        given = {"input_ids": ids} if inputs == "ids" else {"inputs_embeds": torch.randn(2, 8, 64, generator=generator)}
        return model(labels=ids, **given).loss / 2

    reference = small_llama()
    for micro in range(2):
        for of_rank in range(world_size):
            (loss(reference, micro, of_rank) / world_size).backward()
    expected = {n: p.grad for n, p in reference.named_parameters()}
    model = wrapped(small_llama(), "ddp", world_size)
    config = grass_dist.GrassConfig(active_layers=2, probe_steps=0, update_interval=1, sampling_interval=9)
    optimizer = grass_dist.GrassOptimizer(model, torch.optim.AdamW, {"lr": 0.0}, config=config)
    units = optimizer.grass.trainable_units()
    for micro in range(2):
        quiet = mode == "none" or (mode == "last" and micro == 0)
        with model.no_sync() if quiet else contextlib.nullcontext():
            loss(model, micro, rank).backward()
    optimizer.clip_grad_norm_(1e9)  # makes gradients final; the step then has nothing more to reduce
    once = optimizer.grass.bytes_reduced
    pairs = [(p.grad, expected[n.removeprefix("module.")]) for u in units for n, p in u.params if p.grad is not None]
    worst = max((g - (torch.zeros_like(g) if e is None else e)).abs().max().item() for g, e in pairs)
    optimizer.clip_grad_norm_(1e-3)
    optimizer.step()
    layer = units[0]
    squares = sum(expected[n.removeprefix("module.")].double().square().sum().item() for n, _ in layer.params)
    return {
        "worst": worst,
        "largest": max(g.abs().max().item() for g, _ in pairs),
        "importance": optimizer.grass.importances[layer.index],
        "expected importance": (squares / layer.numel) ** 0.5,
        "reduced once": once == optimizer.grass.bytes_reduced,
    }


@scenarios(
    *(TWO(two_micro_batches, mode, inputs) for mode in ("each", "last", "none") for inputs in ("ids", "embeddings"))
)
def test_gradients_and_importances_are_averages_in_any_mode(runs):
    for seen in runs:
        assert seen["worst"] < 1e-6 < seen["largest"]
        assert seen["importance"] == pytest.approx(seen["expected importance"], rel=1e-5)
        assert seen["reduced once"]


def embeddings_without_gradient(rank: int, world_size: int) -> dict[str, Any]:
    """Under DDP, a unit that trains and gets no gradient: the last one to be reduced, which others could wait for."""
    model = wrapped(small_llama(), "ddp", world_size)
    config = grass_dist.GrassConfig(active_layers=2, probe_steps=2, sampling_interval=2, update_interval=2)
    optimizer = grass_dist.GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=config)
    reduced = []
    for step in range(6):
        before = optimizer.grass.bytes_reduced
        generator = torch.Generator().manual_seed(100 * step + rank)
        hidden = torch.randn(2, 8, 64, generator=generator)
        x = torch.randint(0, 128, (2, 8), generator=generator)
        model(inputs_embeds=hidden, labels=x).loss.backward()
        expected = 4 * sum(u.numel + len(u.params) for u in optimizer.grass.trainable_units())
        optimizer.step()
        optimizer.zero_grad()
        reduced.append((optimizer.grass.bytes_reduced - before, expected))
    return {"reduced": reduced, "sum": sum(p.double().sum().item() for p in model.parameters())}


@scenarios(TWO(embeddings_without_gradient))
def test_a_unit_without_a_gradient_holds_nothing_up(runs):
    assert all(got == expected for got, expected in runs[0]["reduced"])
    assert runs[0] == runs[1]


class TwoOutputs(nn.Module):
    """As a reward model with a value head: the loss is of the second output, and nothing of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small_llama()
        self.value = nn.Linear(64, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.model(input_ids=x, output_hidden_states=True)
        return out.logits, self.value(out.hidden_states[-1])


def an_output_that_no_loss_uses(rank: int, world_size: int) -> list[float]:
    """DDP hands on a gradient that is not there, to the head as well."""
    ends = []
    for find in (False, True):
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(TwoOutputs(), find_unused_parameters=find)
        config = grass_dist.GrassConfig(active_layers=2, probe_steps=2, sampling_interval=2, update_interval=2)
        optimizer = grass_dist.GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=config)
        for step in range(6):
            x = torch.randint(0, 128, (2, 8), generator=torch.Generator().manual_seed(100 * step + rank))
            model(x)[1].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(sum(p.double().sum().item() for p in model.parameters()))
        same = torch.equal(model.module.model.lm_head.weight, TwoOutputs().model.lm_head.weight)
        assert same, "the head had no gradient"
    return ends


@scenarios(TWO(an_output_that_no_loss_uses))
def test_an_output_that_no_loss_uses_gives_its_weights_nothing(runs):
    assert runs[0] == runs[1] and runs[0][0] == runs[0][1]


# States in parts.


ODD = {"layers": 4, "width": 5, "vocab": 17}  # a norm in four parts: 2, 2, 1 and no entries
DIVIDED = {"active_layers": 3, "probe_steps": 1, "sampling_interval": 2, "update_interval": 2}


def divided(
    world_size: int,
    cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
    shard_states: bool = True,
    dtype: torch.dtype = torch.float32,
    **offload: Any,
) -> tuple[nn.Module, grass_dist.GrassOptimizer]:
    model = wrapped(tiny(dtype, **ODD), "ddp", world_size)
    config = grass_dist.GrassConfig(**DIVIDED, offload=offload or {"mode": "none"})
    return model, grass_dist.GrassOptimizer(model, cls, {"lr": 1e-3}, config=config, shard_states=shard_states)


def divided_and_whole(
    rank: int, world_size: int, cls: type[torch.optim.Optimizer], dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Six steps under DDP with states in parts, and with whole ones: weights, bytes of states, bytes of the gathers."""
    out: dict[str, Any] = {}
    for shard_states in (True, False):
        model, optimizer = divided(world_size, cls, shard_states, dtype)
        gathered, padded = [], []
        for step in range(6):
            units = optimizer.grass.trainable_units() if optimizer.grass.phase == "train" else []
            padded.append(
                sum(
                    -(-p.shape[0] // world_size) * world_size * p.shape[1:].numel() * p.element_size()
                    for u in units
                    for _, p in u.params
                )
            )
            loss_of(model, step * world_size + rank).backward()
            with Wire() as wire:
                optimizer.step()
            gathered.append(wire.floats["all_gather"])
            optimizer.zero_grad()
        state = optimizer.state_dict()["state"]
        kept = [v for entry in state.values() for v in entry.values() if torch.is_tensor(v) and v.ndim]
        out["parts" if shard_states else "whole"] = {
            "params": [p.detach().clone() for p in model.parameters()],
            "entries": sum(v.to_local().numel() if isinstance(v, DTensor) else v.numel() for v in kept),
            "gathered": gathered,
            "padded": padded,
        }
    return out


@scenarios(
    *(FOUR(divided_and_whole, cls) for cls in sorted(ELEMENTWISE, key=lambda cls: cls.__name__)),
    FOUR(divided_and_whole, torch.optim.AdamW, torch.bfloat16),
)
def test_states_in_parts_make_the_update_of_whole_ones(runs):
    whole = runs[0]["whole"]
    assert sum(run["parts"]["entries"] for run in runs) == whole["entries"]
    for run in runs:
        assert run["parts"]["gathered"] == run["parts"]["padded"] and not any(run["whole"]["gathered"])
        assert all(map(torch.equal, run["parts"]["params"], runs[0]["parts"]["params"]))
        worst = max((a - b).abs().max().item() for a, b in zip(run["parts"]["params"], whole["params"], strict=True))
        print(f"worst parameter difference {worst:.1e}, entries {run['parts']['entries']} of {whole['entries']}")
        assert worst <= 1e-6


@scenarios(FOUR(divided_and_whole, torch.optim.Adafactor))
def test_a_class_that_needs_whole_parameters_has_them(runs):
    for run in runs:
        for kind in ("parts", "whole"):
            assert run[kind]["entries"] == runs[0]["whole"]["entries"] > 0 and not any(run[kind]["gathered"])
            assert all(map(torch.equal, run[kind]["params"], runs[0]["whole"]["params"]))


def in_backward_and_after(rank: int, world_size: int) -> list[str]:
    """Parameters that differ when layers are updated within the backward, with states in parts."""
    runs = []
    for in_backward in (True, False):
        model, optimizer = divided(world_size, mode="stream", slots=2, update_in_backward=in_backward)
        for step in range(9):
            loss_of(model, step * world_size + rank).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(dict(model.named_parameters()))
    return [name for name in runs[0] if not torch.equal(runs[0][name], runs[1][name])]


@scenarios(FOUR(in_backward_and_after))
def test_parts_are_updated_in_the_backward_to_the_same_weights(runs):
    assert runs == [[]] * 4


def disagree(rank: int, world_size: int) -> str:
    return refused(lambda: divided(world_size, shard_states=rank != 3))


@scenarios(FOUR(disagree))
def test_ranks_that_disagree_about_dividing_states_say_so(runs):
    for said in runs:
        assert said.startswith("RanksDisagree: shard_states is False on rank 3 and True on rank 0; ")


def foreign_states(rank: int, world_size: int) -> dict[str, str]:
    """What loading says of a state that is not this rank's: of whole parameters, of another rank, of other ranks."""

    def said(shard_states: bool, state: dict[str, Any]) -> str:
        try:
            divided(world_size, shard_states=shard_states)[1].load_state_dict(state)
        except ValueError as error:
            return str(error)
        return "loaded"

    states = {}
    for shard_states in (True, False):
        model, optimizer = divided(world_size, shard_states=shard_states)
        take_steps(model, optimizer, range(4))
        states[shard_states] = copy.deepcopy(optimizer.state_dict())
    theirs = optimizer.grass.backend.ranks.gather_objects(states[True])[0]
    fewer = {**states[True], "grass": {**states[True]["grass"], "of": [rank, 2]}}
    return {
        "own": said(True, states[True]),
        "own whole": said(False, states[False]),
        "whole": said(True, states[False]),
        "part": said(False, states[True]),
        "of rank 0": said(True, theirs),
        "of fewer": said(True, fewer),
    }


@scenarios(FOUR(foreign_states))
def test_a_state_that_is_not_the_ranks_own_is_refused(runs):
    for rank, said in enumerate(runs):
        assert said["own"] == said["own whole"] == said["whole"] == "loaded"
        assert re.search(r"^The saved \w+ of module\.\S+ is of shape .* and divided as .*Shard\(dim=0\)", said["part"])
        mine = f"and this is rank {rank} of 4: each rank loads what it has saved itself"
        assert f" is that of rank {rank} of 2, {mine}" in said["of fewer"]
        # Rank 0 could take its own, and hears of the next one that cannot.
        heard = f" is that of rank 0 of 4, and this is rank {rank or 1} of 4: each rank loads what it has saved itself"
        assert heard in said["of rank 0"] and said["of rank 0"].startswith("rank 1: " if rank == 0 else "The saved")
