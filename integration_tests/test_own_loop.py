"""Steps of loops of one's own on several ranks: batches that are dropped, layers that a batch leaves out, and models
that are called in other ways than by their forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from grass_dist import GrassConfig, GrassOptimizer
from integration_tests.support.ranks import refused
from integration_tests.support.scenarios import TWO, Spawn, scenarios
from integration_tests.support.training import full
from tests.dropped_batches import DROPS, Drop, after_clipping, outcome, same, train
from tests.tiny import Tiny, loss_of, tiny

pytestmark = pytest.mark.timeout(420)

THREE = Spawn(3)
LR = {"lr": 1e-2}
ROUNDS = {"active_layers": 2, "sampling_interval": 2, "update_interval": 2}


def sharded(model: nn.Module, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    for module in (*model.layers, model):
        fully_shard(module, mp_policy=policy or MixedPrecisionPolicy())
    return model


def grass(model: nn.Module, accumulation: int = 1, **config: Any) -> GrassOptimizer:
    return GrassOptimizer(
        model,
        torch.optim.AdamW,
        LR,
        config=GrassConfig(**{"probe_steps": 0, **ROUNDS, **config}),
        gradient_accumulation_steps=accumulation,
    )


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): full(p).clone() for name, p in model.named_parameters()}


# Batches that are dropped.

FP32_REDUCTION = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def dropped(rank: int, world_size: int, wrap: str) -> list[str]:
    """The ways of dropping batches that leave a trace, of which there should be none."""

    def ran(drop: Drop | None, accumulation: int, begun: int | None = None) -> list:
        model = tiny()
        if wrap == "ddp":
            model = DistributedDataParallel(model)
        else:
            sharded(model, FP32_REDUCTION if wrap == "fsdp2, mixed" else None)
        optimizer = grass(model, accumulation, probe_steps=2)

        def loss(number: int) -> torch.Tensor:
            if isinstance(model, FSDPModule) and accumulation > 1:
                model.set_requires_gradient_sync(number % accumulation == accumulation - 1)
            return loss_of(model, world_size * number + rank)

        train(optimizer, loss, 7, drop, accumulation, begun)
        return outcome(model, optimizer, full)

    expected = {accumulation: ran(None, accumulation) for accumulation in (1, 2)}
    return [
        f"{drop.__name__}, {begun} of {accumulation} micro-batches"
        for drop in DROPS
        for accumulation, begun in ((1, 1), (2, 2), (2, 1))
        if not (drop is after_clipping and begun < accumulation)  # whose gradients FSDP2 has not reduced yet
        and not same(ran(drop, accumulation, begun), expected[accumulation])
    ]


@pytest.mark.integration
@scenarios(THREE(dropped, "ddp"), THREE(dropped, "fsdp2"), THREE(dropped, "fsdp2, mixed"))
def test_dropped_batches_leave_no_trace_on_any_rank(runs):
    assert runs == [[]] * 3


# Layers that a batch leaves out.


class LayerDrop(Tiny):
    """Runs the layers that it is told."""

    skipped: tuple[int, ...] = ()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for number, layer in enumerate(self.layers):
            x = x if number in self.skipped else layer(x)
        return self.head(self.norm(x))


def layer_drop(wrap: Callable[[nn.Module], nn.Module]) -> tuple[LayerDrop, nn.Module]:
    torch.manual_seed(0)
    bare = LayerDrop(layers=4)
    return bare, wrap(bare)


def skips(step: int, micro: int, rank: int) -> tuple[int, ...]:
    """Layer 1 is left out by no rank, by rank 0 and by all ranks in turn, and layer 2 always by rank 1."""
    out = {0: (), 1: (1,) if rank == 0 else (), 2: (1,), 3: (1,) if micro else ()}[step % 4]
    return (*out, 2) if rank == 1 else out


def left_out(rank: int, world_size: int, accumulation: int, sync_all: bool, **config: Any) -> list[int]:
    """Positions of the gradients and weights that differ with γ = L from those of the stock optimizer under
    ``find_unused_parameters=True``."""
    seen = []
    for ours in (False, True):
        bare, model = layer_drop(lambda model: DistributedDataParallel(model, find_unused_parameters=True))
        if ours:
            optimizer = grass(model, accumulation, active_layers=4, **config)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), **LR)
        grads = []
        for step in range(8):
            for micro in range(accumulation):
                bare.skipped = skips(step, micro, rank)
                model.require_backward_grad_sync = sync_all or micro == accumulation - 1
                (loss_of(model, 10 * step + 5 * micro + rank) / accumulation).backward()
            if ours:
                optimizer.grass.finish_gradients()
            if not config:
                grads += [None if p.grad is None else p.grad.clone() for p in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
        seen.append([*grads, *weights(model).values()])
    same = [a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(*seen, strict=True)]
    differ = [position for position, equal in enumerate(same) if not equal]
    return differ


IN_BACKWARD = {"offload": {"mode": "stream", "slots": 2, "update_in_backward": True}}


@scenarios(
    TWO(left_out, 1, True), TWO(left_out, 2, True), TWO(left_out, 2, False), TWO(left_out, 1, True, **IN_BACKWARD)
)
def test_layers_that_no_rank_uses_are_updated_as_by_stock_ddp(runs):
    for run in runs:
        assert run == []


def measured_without_a_layer(rank: int, world_size: int) -> dict[str, tuple[float, ...]]:
    """Importances after a probe step in which no rank uses layer 1, by the way of wrapping."""
    told = {}
    for wrap in (DistributedDataParallel, sharded, None):
        bare, model = layer_drop(wrap or (lambda model: model))
        optimizer = grass(model, active_layers=1, probe_steps=1)
        bare.skipped = (1,)
        of_ranks = [rank] if wrap else range(world_size)
        torch.stack([loss_of(model, one) for one in of_ranks]).mean().backward()
        optimizer.step()
        told[wrap.__name__ if wrap else "single"] = optimizer.grass.importances
    return told


@scenarios(TWO(measured_without_a_layer))
def test_a_layer_that_no_rank_uses_has_no_importance(runs):
    for run in runs:
        for importances in run.values():
            assert importances[1] == 0 and min(importances[0], *importances[2:]) > 0
            assert importances == pytest.approx(run["single"])


def past_ddp(rank: int, world_size: int) -> list[int]:
    """Positions of the gradients that differ when the module inside of DDP is called, and by no rank whole."""
    seen = []
    for inner in (False, True):
        bare, model = layer_drop(DistributedDataParallel)
        optimizer = grass(model, 2, active_layers=4)
        grads = []
        for step in range(3):
            for micro in range(2):
                bare.skipped = (1,) if rank == micro else ()
                with model.no_sync() if micro == step else contextlib.nullcontext():
                    loss_of(bare if inner else model, 10 * step + 5 * micro + rank).backward()
            optimizer.grass.finish_gradients()
            grads += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
        seen.append(grads)
    assert len(seen[0]) == len(seen[1]) > 0
    return [position for position, (a, b) in enumerate(zip(*seen, strict=True)) if not torch.equal(a, b)]


@scenarios(TWO(past_ddp))
def test_gradients_are_averaged_also_past_the_ddp_module(runs):
    assert runs == [[]] * 2


def joined(rank: int, world_size: int) -> dict[str, str]:
    """What is said where ranks have different numbers of batches."""
    model = DistributedDataParallel(tiny())
    optimizer = grass(model)

    def loop(context: Any) -> None:
        with context:
            for step in range(2 + rank):
                loss_of(model, step).backward()
                optimizer.step()

    told = {
        "join": refused(lambda: loop(model.join())),
        "Join": refused(lambda: loop(Join([model], divide_by_initial_world_size=False))),
    }
    with model.join(enable=False):
        loss_of(model, 0).backward()
        optimizer.step()
    optimizer.detach()
    with model.join():
        for step in range(2 + rank):
            loss_of(model, step).backward()
    return told


@scenarios(TWO(joined))
def test_uneven_batches_under_join_are_refused_on_all_ranks(runs):
    for told in runs:
        assert all(
            said.startswith("GrassError: DistributedDataParallel.join() does not work") for said in told.values()
        )


# Ways to call a model.


class ManyWays(Tiny):
    """A model that is trained through methods of several names, as those for SFT, DPO or chunked losses are."""

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(ids))

    def loss(self, step: int) -> torch.Tensor:
        return loss_of(self.forward, step)

    def other_loss(self, step: int) -> torch.Tensor:
        return self.loss(step) / 2


class Trunk(nn.Module):
    """Embeddings, layers and norm, with the head beside: a chunked loss calls the two one after the other."""

    def __init__(self) -> None:
        super().__init__()
        bare = tiny()
        self.embed, self.layers, self.norm = bare.embed, bare.layers, bare.norm

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.head = Trunk(), tiny().head


def loss_in_chunks(model: Parts, number: int) -> torch.Tensor:
    """The backward through the head, one for each chunk, and then one through the rest; gives the loss."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 16, (4, 6), generator=generator)
    hidden = model.model(ids)
    cut = hidden.detach().requires_grad_()
    for chunk, targets in zip(cut.chunk(2), ids.chunk(2), strict=True):
        nn.functional.cross_entropy(model.head(chunk).flatten(0, 1).float(), targets.flatten()).backward()
    hidden.backward(cut.grad)
    return hidden


def called(rank: int, world_size: int, way: str, gamma: int, policy: MixedPrecisionPolicy) -> str:
    """What differs after ten steps from the stock optimizer, or with γ < L from the same through the forward."""
    ends = []
    for number in range(2):
        torch.manual_seed(0)
        ours = number == 0 or gamma < 8
        if way == "chunks":
            model: Any = Parts()
            for module in (*model.model.layers, model.model, model.head, model):
                fully_shard(module, mp_policy=policy)
        else:
            model = sharded(ManyWays(), policy)
            if way == "whole":
                model = ManyWays()
                fully_shard(model, mp_policy=policy)
            for name in ("loss", "other_loss"):
                register_fsdp_forward_method(model, name)
        plain = gamma < 8 and number == 1
        if ours:
            names = {"layers": "model.layers"} if way == "chunks" else {}
            optimizer: Any = grass(model, active_layers=gamma, probe_steps=2 if gamma < 8 else 0, **names)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), **LR)
        for step in range(10):
            if way == "chunks":
                loss_in_chunks(model, 3 * step + rank)
            elif way == "alternating" and step % 2:
                (loss_of(model, 3 * step + rank) / 2 if plain else model.other_loss(3 * step + rank)).backward()
            else:
                (loss_of(model, 3 * step + rank) if plain else model.loss(3 * step + rank)).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(weights(model))
    return [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])]


LOW = MixedPrecisionPolicy(param_dtype=torch.bfloat16)


@pytest.mark.integration
@scenarios(
    *(
        THREE(called, way, 8, policy)
        for way in ("method", "alternating", "chunks", "whole")
        for policy in (FP32_REDUCTION, LOW)
    ),
    *(THREE(called, way, 2, FP32_REDUCTION) for way in ("method", "alternating", "whole")),
)
def test_fsdp2_reduces_alike_however_the_model_is_called(runs):
    assert runs == [[]] * 3


# Scaled losses.


def scaled(rank: int, world_size: int, wrap: str) -> dict[str, Any]:
    """γ = L beside the stock optimizer, and a probe, with a scale that only the last rank's gradients overflow by."""
    scales, ends = [], []
    for ours in (True, False):
        model = DistributedDataParallel(tiny()) if wrap == "ddp" else sharded(tiny())
        optimizer: Any = grass(model, active_layers=8) if ours else torch.optim.AdamW(model.parameters(), **LR)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**124, backoff_factor=2.0**-3, growth_interval=3)
        scales.append(steps_of(model, optimizer, scaler, rank, world_size, 12))
        ends.append(weights(model))
        if ours:
            skipped = optimizer.grass.skipped
    model = DistributedDataParallel(tiny()) if wrap == "ddp" else sharded(tiny())
    optimizer = grass(model, probe_steps=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**124, backoff_factor=2.0**-60)
    probe = steps_of(model, optimizer, scaler, rank, world_size, 2)
    return {
        "scales": scales[0] == scales[1],
        "differ": [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])],
        "skipped": skipped,
        "probe": (probe, optimizer.grass.step),
    }


def steps_of(
    model: nn.Module, optimizer: Any, scaler: torch.amp.GradScaler, rank: int, world_size: int, steps: int
) -> list[float]:
    """Scales after each step of a loop."""
    scales = []
    for step in range(steps):
        times = 2.0**8 if rank == world_size - 1 else 1.0
        scaler.scale(loss_of(model, 10 * step + rank) * times).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return scales


@scenarios(TWO(scaled, "ddp"), TWO(scaled, "fsdp2"))
def test_a_scaler_skips_the_steps_that_it_skips_with_stock(runs):
    for run in runs:
        assert run["scales"] and run["differ"] == []
        assert run["skipped"] > 1
        assert run["probe"] == ([2.0**64, 2.0**64], 1)


# Steps of a probe without a backward.


def idle(rank: int, world_size: int, wrap: str) -> list[Any]:
    """Weights and clock with and without calls of step that no backward precedes."""
    seen = []
    for times in (0, 2):
        model = DistributedDataParallel(tiny()) if wrap == "ddp" else sharded(tiny())
        optimizer = grass(model, 2, probe_steps=2)
        for step in range(5):
            for _ in range(times if step < 2 else 0):
                optimizer.step()
            for micro in range(2):
                (loss_of(model, 10 * step + 2 * micro + rank) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        seen.append((weights(model), optimizer.grass.step, optimizer.grass.importances))
        assert optimizer.grass.skipped == 2 * times
    (first, *clock), (second, *other) = seen
    return [name for name in first if not torch.equal(first[name], second[name])] + [clock != other] * (clock != other)


@scenarios(TWO(idle, "ddp"), TWO(idle, "fsdp2"))
def test_a_probe_step_without_a_backward_is_none_on_all_ranks(runs):
    assert runs == [[]] * 2


# Buffers under DDP.


class Normed(nn.Module):
    """Batch statistics within the layers and beside them, and a count that only the evaluation changes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(6)) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 16, bias=False)
        self.beside = nn.BatchNorm1d(6, affine=False)
        self.register_buffer("evaluated", torch.zeros(()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        self.evaluated += not self.training
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm(self.beside(x)))


def with_buffers(rank: int, world_size: int, broadcasts: bool, gamma: int) -> list[str]:
    """Weights and buffers that differ, at some step, from those of stock DDP with a stock optimizer of all layers; with
    γ < L the buffers of a forward alone, which weights do not change."""
    ends: list[list[torch.Tensor]] = []
    for ours in (False, True):
        torch.manual_seed(0)
        bare = Normed()
        model = DistributedDataParallel(bare, broadcast_buffers=broadcasts)
        rate = {"lr": 1e-2 if gamma == 4 else 0.0}
        if ours:
            config = GrassConfig(**{**ROUNDS, "active_layers": gamma, "probe_steps": 0 if gamma == 4 else 2})
            optimizer: Any = GrassOptimizer(
                model, torch.optim.AdamW, rate, config=config, gradient_accumulation_steps=2
            )
        else:
            optimizer = torch.optim.AdamW(model.parameters(), **rate)
        seen: list[torch.Tensor] = []
        for step in range(6):
            for micro in range(2):
                alone = gamma == 2 and micro == 0 and step % 2
                with model.no_sync() if alone else contextlib.nullcontext():
                    (loss_of(model, 10 * step + 2 * micro + rank) / 2).backward()
                seen += [buffer.clone() for buffer in bare.buffers()]
            optimizer.step()
            optimizer.zero_grad()
            if step % 2:
                model.eval()
                with torch.no_grad():
                    for number in range(2):
                        loss_of(model, 100 + number + rank)
                        seen += [buffer.clone() for buffer in bare.buffers()]
                model.train()
        ends.append([*seen, *(weights(model).values() if gamma == 4 else ())])
    return [
        f"number {n} of {len(ends[0])}" for n, (a, b) in enumerate(zip(*ends, strict=True)) if not torch.equal(a, b)
    ]


@scenarios(*(TWO(with_buffers, broadcasts, gamma) for broadcasts in (True, False) for gamma in (4, 2)))
def test_buffers_are_broadcast_when_stock_ddp_does(runs):
    assert runs == [[]] * 2
