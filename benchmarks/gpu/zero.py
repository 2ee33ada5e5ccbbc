"""ZeRO-2 and ZeRO-3 on one rank: what a switch costs, and that moved states give the weights of states that stay."""

from __future__ import annotations

import logging
import statistics
import time
from typing import Any

import torch

import grass_dist
from benchmarks.gpu import training
from benchmarks.gpu.told import Told
from grass_dist.backends.zero.jit import spare_the_compiler

INTERVAL = 4


def show(told: Told) -> None:
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    spare_the_compiler({})
    training.join_alone(told)
    for stage in (2, 3):
        found: dict[str, list[torch.Tensor]] = {}
        for mode in ("none", "interval"):
            name = f"ZeRO-{stage}, {mode}"
            told.attempt(name, lambda stage=stage, mode=mode, found=found: trained(told, stage, mode, found))
        if len(found) == 2:
            name = f"ZeRO-{stage}: interval gives the weights of none"
            same = all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))
            told.check(name, same, apart=training.apart(*found.values()))


def trained(told: Told, stage: int, mode: str, found: dict[str, list[torch.Tensor]]) -> None:
    """Trains 0.6B for eight intervals, keeps the weights in ``found`` and tells the figures."""
    import deepspeed

    model = training.llama(told, layers=12, width=2048, inner=5632)
    engine = made(model, stage, mode)
    seconds, host, asked = [], [], []
    for step in range(INTERVAL * (3 if told.tiny else 8)):
        training.synchronize(told)
        before, began = device_allocations(told), time.perf_counter()
        value = training.loss(engine, training.batch(told, model, step))
        engine.backward(value)
        at_step = time.perf_counter()
        engine.step()
        host.append(time.perf_counter() - at_step)
        training.synchronize(told)
        seconds.append(time.perf_counter() - began)
        asked.append(device_allocations(told) - before)
    switches = range(2 * INTERVAL - 1, len(seconds), INTERVAL)
    others = [n for n in range(INTERVAL, len(seconds)) if n % INTERVAL in (1, 2)]
    usual = statistics.median(seconds[n] for n in others)
    told.figure(
        f"ZeRO-{stage}, {mode}",
        {
            "seconds of a step": round(usual, 4),
            "host seconds of a switch": round(
                statistics.median(host[n] for n in switches) - statistics.median(host[n] for n in others), 4
            ),
            "a switch, in steps": round(statistics.median(seconds[n] for n in switches) / usual - 1, 3),
            "device allocations of a switch": max(asked[n] for n in switches),
            "hidden": round(engine.grass.traffic.hidden, 4),
        },
    )
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        found[mode] = training.weights(model)
    engine.grass.states.settle()
    engine.destroy()
    del model, engine
    training.free(told)


def made(model: Any, stage: int, mode: str) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
        "grass": {**training.CYCLIC, "offload": training.MODES[mode]},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    return grass_dist.initialize(model=model, optimizer=optimizer, config=config)[0]


def device_allocations(told: Told) -> int:
    """How often torch's allocator has asked the device for memory."""
    return 0 if told.tiny else torch.cuda.memory_stats()["num_device_alloc"]
