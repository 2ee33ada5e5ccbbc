"""The planner against truth: the live bytes of real training steps, weights, gradients and states of each rank counted.

SmolLM2-135M on CPU ranks, every backend and every place of the states. Activations and buffers are not counted here:
a CPU allocator does not tell them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

import grass_dist
from grass_dist.plan import memory
from grass_dist.plan.job import Job, Method
from grass_dist.plan.shape import shape_of_model
from grass_dist.training.packaged_model import resolve_model
from integration_tests.model import wrapped
from integration_tests.ranks import run_ranks
from integration_tests.training import local

pytestmark = [pytest.mark.timeout(240), pytest.mark.integration]

MODEL = "packaged:smollm2-135m"
GAMMA, TOKENS = 4, 8
# By world, so that the ranks of one start do all of its cases.
CASES = {
    (1, "torch"): [("fsdp2", "interval", "float32")],
    (2, "torch"): [
        ("fsdp2", "none", "float32"),
        ("fsdp2", "interval", "bfloat16"),
        ("ddp", "interval", "bfloat16"),
        ("ddp", "stream", "float32"),
    ],
    (4, "torch"): [("fsdp2", "stream", "float32"), ("hsdp", "interval", "bfloat16")],
    (2, "zero"): [
        ("zero1", "interval", "bfloat16"),
        ("zero2", "stream", "float32"),
        ("zero2", "none", "bfloat16"),
        ("zero3", "stream", "bfloat16"),
        ("zero3", "interval", "float32"),
    ],
}


def settings(offload: str) -> dict[str, Any]:
    """Layers in turn. With "none" all of them must have trained before all have a state: half at a time."""
    gamma, interval = (15, 1) if offload == "none" else (GAMMA, 2)
    return {
        **{"active_layers": gamma, "sampler": "cyclic", "sampling_interval": interval, "update_interval": interval},
        "offload": {"mode": offload},
    }


STEPS = 3
"""With "interval" the landing slot is there from the first step to the second."""


def live(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the memory that tensors lie in, each piece once."""
    memories = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(memories.values())


def counted(rank: int, world_size: int, backend: str, offload: str, dtype: str) -> dict[str, int]:
    """A short training; the most that its weights, gradients and states took on this rank."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(resolve_model(MODEL), dtype=getattr(torch, dtype)).train()
    run = _zero if backend.startswith("zero") else _torch
    most = {"weights": 0, "gradients": 0, "states": 0, "host": 0}
    for now in run(model, rank, world_size, backend, offload, dtype):
        most = {part: max(most[part], nbytes) for part, nbytes in now.items()}
    return most


def count_all(rank: int, world_size: int, kind: str) -> list[dict[str, int]]:
    return [counted(rank, world_size, *case) for case in CASES[world_size, kind]]


def _torch(model: Any, rank: int, world_size: int, backend: str, offload: str, dtype: str) -> Iterable[dict[str, int]]:
    model = wrapped(model, backend, world_size, torch.float32 if dtype == "bfloat16" else None)
    optimizer = grass_dist.GrassOptimizer(
        model, torch.optim.AdamW, {"lr": 1e-5}, config=grass_dist.GrassConfig(**settings(offload))
    )
    host = 0 if offload == "none" else optimizer._states.store.nbytes
    for step in range(STEPS):
        x = torch.randint(0, 1000, (1, TOKENS), generator=torch.Generator().manual_seed(step * world_size + rank))
        model(input_ids=x, labels=x, use_cache=False).loss.backward()
        params = list(model.parameters())
        optimizer.grass.finish_gradients()
        gradients = live(local(p.grad) for p in params if p.grad is not None)
        optimizer.step()
        yield {
            "weights": live(local(p) for p in params),
            "gradients": gradients,
            "states": optimizer.state_bytes,
            "host": host,
        }
        optimizer.zero_grad()


def _zero(model: Any, rank: int, world_size: int, backend: str, offload: str, dtype: str) -> Iterable[dict[str, int]]:
    from grass_dist.zero.initialize import initialize
    from integration_tests.zero import ds_config

    config = ds_config(int(backend[-1]), settings(offload), 1, getattr(torch, dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    engine, *_ = initialize(model=model, optimizer=optimizer, config=config)
    states = engine.optimizer.states
    for step in range(STEPS):
        x = torch.randint(0, 1000, (1, TOKENS), generator=torch.Generator().manual_seed(step * world_size + rank))
        engine.backward(engine(input_ids=x, labels=x, use_cache=False).loss)
        averaged = engine.optimizer.averaged_gradients
        gradients = live(g for parts in averaged.values() for g in parts or () if g is not None)
        engine.step()
        params = [getattr(p, "ds_tensor", p).detach() for p in engine.module.parameters()]
        yield {
            "weights": live(params),
            "gradients": gradients,
            "states": states.device_bytes,
            "host": 0 if offload == "none" else states._moving.store.nbytes,
        }
    engine.destroy()


@pytest.fixture(scope="module")
def shape():
    return shape_of_model(MODEL)


def job_of(ranks: int, backend: str, offload: str, dtype: str) -> Job:
    replicate = 2 if backend == "hsdp" else 1
    same: dict[str, Any] = {"gpus": ranks, "gpus_per_host": ranks, "gpu_bytes": 24e9, "seq_len": TOKENS}
    more: dict[str, Any] = {"backend": backend, "replicate": replicate, "offload": offload, "dtype": dtype}
    return Job(**same, **more)


@pytest.mark.parametrize(("ranks", "kind"), list(CASES))
def test_live_bytes_are_as_planned(shape, ranks, kind):
    by_rank = run_ranks(ranks, count_all, kind)
    for (backend, offload, dtype), *measured in zip(CASES[ranks, kind], *by_rank, strict=True):
        job = job_of(ranks, backend, offload, dtype)
        method = Method("grass", settings(offload)["active_layers"])
        device, host = memory.states_of(shape, job, method)
        planned = {
            # The DeepSpeed configuration of these tests leaves no small parameters gathered.
            "weights": memory.weights_of(shape, job) - memory._persistent(shape, job),
            "gradients": memory.gradients_of(shape, job, method),
            "states": device,
            "host": host,
        }
        worst = {
            part: max(abs(nbytes / max(rank[part], 1) - 1) for rank in measured) if nbytes or measured[0][part] else 0.0
            for part, nbytes in planned.items()
        }
        in_mb = " | ".join(f"{planned[part] / 1e6:.1f}, {measured[0][part] / 1e6:.1f}" for part in planned)
        print(f"\n| {backend} | {ranks} | {offload} | {dtype} | {in_mb} | {max(worst.values()):.2%} |")
        assert max(worst.values()) < 0.05, (backend, offload, dtype, planned, measured)
        parts = ("weights", "gradients", "states")
        for rank in measured:
            assert sum(planned[p] for p in parts) == pytest.approx(sum(rank[p] for p in parts), rel=0.05)
