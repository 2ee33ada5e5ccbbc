"""What cannot work ends on every rank with one sentence, at the start or at the next draw, and never hangs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import grass_dist
from integration_tests.support.model import ADAMW, global_batch, small_llama, wrapped
from integration_tests.support.ranks import refused, run_ranks

CONFIG = {"active_layers": 2, "probe_steps": 0, "sampling_interval": 2, "update_interval": 2}


def optimizer_for(model, kwargs=ADAMW, **config):
    return grass_dist.GrassOptimizer(
        model, torch.optim.AdamW, kwargs, config=grass_dist.GrassConfig(**{**CONFIG, **config})
    )


def disagreeing_draw(rank: int) -> str:
    grass_dist.register_sampler("by-rank", lambda importances, generator: [0, 1 + generator.round * rank])
    model = wrapped(small_llama(), "fsdp2", 2)
    optimizer = optimizer_for(model, sampler="by-rank")  # round 0 is the same on both ranks

    def train():
        for step in range(3):
            x = global_batch(step)
            model(input_ids=x, labels=x).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return refused(train)


def failing_draw(rank: int) -> str:
    def draw(importances, generator):
        if rank == 1:
            raise RuntimeError("out of luck")
        return [0, 1]

    grass_dist.register_sampler("by-luck", draw)
    try:
        optimizer_for(wrapped(small_llama(), "ddp", 2), sampler="by-luck")
    except (grass_dist.GrassError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def half_sharded() -> None:
    mesh, model = init_device_mesh("cpu", (2,)), small_llama()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    optimizer_for(model)


def never_sharded() -> None:
    mesh = init_device_mesh("cpu", (2,))

    def replicated(name, module, mesh):
        for key, param in list(module.named_parameters(recurse=False)):
            module.register_parameter(key, torch.nn.Parameter(distribute_tensor(param, mesh, [Replicate()])))

    optimizer_for(distribute_module(small_llama(), mesh, replicated))


def fsdp2(**config) -> str:
    return refused(lambda: optimizer_for(wrapped(small_llama(), "fsdp2", 2), **config))


CASES: dict[str, tuple[Callable[[int], str], str, str | None]] = {
    "seeds": (lambda rank: fsdp2(seed=rank), "RanksDisagree: grass.seed is 1 on rank 1 and 0 on rank 0", None),
    "rates": (
        lambda rank: refused(lambda: optimizer_for(wrapped(small_llama(), "ddp", 2), {"lr": 0.1 * (rank + 1)})),
        "RanksDisagree: optimizer is ",
        None,
    ),
    "models": (
        lambda rank: fsdp2(layers=[None, "nope"][rank]),
        "GrassError: rank 1: layers='nope': ",
        "ConfigError: layers='nope': ",
    ),
    "one rank": (
        lambda rank: fsdp2(active_layers=2 + 90 * rank),
        "GrassError: rank 1: active_layers=92: the model has 8 layers",
        "ConfigError: active_layers=92: ",
    ),
    "draw": (disagreeing_draw, "RanksDisagree: Draw 1 at step 1 came out differently on the ranks: ", None),
    "failing draw": (failing_draw, "GrassError: Draw 0 at step 0 failed on rank 1.", "RuntimeError: out of luck"),
    "half sharded": (
        lambda rank: refused(half_sharded),
        "UnsupportedModel: 3 parameters are not sharded (model.embed_tokens.weight, ...)",
        None,
    ),
    "never sharded": (
        lambda rank: refused(never_sharded),
        "UnsupportedModel: The parameters are DTensors but no module is sharded",
        None,
    ),
    "static graph": (
        lambda rank: refused(lambda: optimizer_for(DistributedDataParallel(small_llama(), static_graph=True))),
        "UnsupportedModel: DistributedDataParallel(static_graph=True) expects",
        None,
    ),
}
"""What a rank does, and how the sentence begins that it hears: on rank 0, and on rank 1 if that is another."""


def every_case(rank: int, world_size: int) -> dict[str, str]:
    return {case: said(rank) for case, (said, *_) in CASES.items()}


@pytest.fixture(scope="module")
def sentences():
    return run_ranks(2, every_case, timeout=120)


@pytest.mark.parametrize("case", CASES)
def test_a_sentence_on_every_rank(sentences, case):
    _, on_rank_0, on_rank_1 = CASES[case]
    first, second = sentences[0][case], sentences[1][case]
    assert first.startswith(on_rank_0), first
    assert second.startswith(on_rank_1 or on_rank_0), second
    assert "\n" not in first + second
