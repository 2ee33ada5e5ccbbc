"""Mixtures of experts on ranks that use different experts, one of which no rank uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from grass_dist import GrassConfig, GrassOptimizer, initialize
from integration_tests.support.scenarios import TWO, Spawn, scenarios
from integration_tests.support.zero import ds_config, full
from tests.routed import Routed, ids_for

pytestmark = pytest.mark.timeout(300)

STEPS, ADAMW = 6, {"lr": 1e-2, "weight_decay": 0.0}
SETTINGS: dict[str, Any] = {"active_layers": 2, "probe_steps": 2, "sampling_interval": 2, "update_interval": 2}


def prepared() -> None:
    from grass_dist.backends.zero.jit import spare_the_compiler

    spare_the_compiler({})


ZERO = Spawn(2, before=prepared)


def reference(settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of one process that has the tokens of both ranks."""
    model = Routed()
    optimizer = GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=GrassConfig(**settings))
    for step in range(STEPS):
        model(torch.cat([ids_for(step, rank) for rank in range(2)])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def wrapped_run(rank: int, world_size: int, wrapper: str, settings: dict[str, Any]) -> float:
    """How far the weights are from those of one process."""
    expected = reference(settings)
    model: torch.nn.Module = Routed()
    if wrapper == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    else:
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=GrassConfig(**settings))
    for step in range(STEPS):
        model(ids_for(step, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return worst(expected, model)


def zero_run(rank: int, world_size: int, stage: int, settings: dict[str, Any]) -> float:
    expected, model = reference(settings), Routed()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    config = ds_config(stage, settings) | {"gradient_clipping": 0.0}
    engine, *_ = initialize(model=model, optimizer=optimizer, config=config)
    for step in range(STEPS):
        engine.backward(engine(ids_for(step, rank)))
        engine.step()
    engine.empty_partition_cache()
    found = worst(expected, engine.module)
    engine.destroy()
    return found


def worst(expected: dict[str, torch.Tensor], model: torch.nn.Module) -> float:
    def whole(param: Any) -> torch.Tensor:
        return param.full_tensor() if hasattr(param, "full_tensor") else full(param)

    found = {name.removeprefix("module."): whole(param).detach() for name, param in model.named_parameters()}
    if any(not torch.equal(found[name], weight) for name, weight in Routed().named_parameters() if "experts.2" in name):
        return float("inf")  # no token came to them
    return max((found[name] - weight).abs().max().item() for name, weight in expected.items())


FROZEN = {**SETTINGS, "freeze": ["*.router"]}


@scenarios(
    *(TWO(wrapped_run, wrapper, SETTINGS) for wrapper in ("ddp", "fsdp2")),
    TWO(wrapped_run, "fsdp2", FROZEN),
    ZERO(zero_run, 3, SETTINGS),
    ZERO(zero_run, 2, FROZEN),
)
def test_ranks_may_use_different_experts(runs):
    assert max(runs) <= 3e-6
