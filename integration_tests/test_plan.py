"""The planner against truth: the live bytes of real training steps, weights, gradients and states of each rank counted.

SmolLM2-135M and a smaller Llama on CPU ranks, every backend and every place of the states. Activations and buffers are
not counted here: a CPU allocator does not tell them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import grass_dist
from grass_dist.model.packaged import resolve_model
from grass_dist.plan import memory
from grass_dist.plan.runs import Method, PlannedRun
from grass_dist.plan.shape import shape_of_config, shape_of_model
from integration_tests.support.model import wrapped
from integration_tests.support.ranks import run_ranks
from integration_tests.support.training import local

pytestmark = [pytest.mark.timeout(300), pytest.mark.integration]

MODEL = "packaged:smollm2-135m"
GAMMA, TOKENS = 4, 8
# By world, so that the ranks of one start do all of its cases.
CASES = {
    (1, "torch"): [("smollm2", "fsdp2", "interval", "float32")],
    (2, "torch"): [
        ("smollm2", "fsdp2", "interval", "float32"),
        ("llama", "fsdp2", "none", "float32"),
        ("llama", "fsdp2", "interval", "bfloat16"),
        ("llama", "ddp", "none", "float32"),
        ("llama", "ddp", "interval", "bfloat16"),
        ("llama", "ddp", "stream", "float32"),
    ],
    (4, "torch"): [
        ("smollm2", "fsdp2", "stream", "float32"),
        ("llama", "fsdp2", "interval", "bfloat16"),
        ("llama", "hsdp", "interval", "bfloat16"),
    ],
    (2, "zero"): [
        ("smollm2", "zero2", "interval", "float32"),
        ("llama", "zero1", "interval", "bfloat16"),
        ("llama", "zero2", "none", "bfloat16"),
        ("llama", "zero2", "stream", "float32"),
        ("llama", "zero3", "none", "float32"),
        ("llama", "zero3", "stream", "bfloat16"),
        ("llama", "zero3", "interval", "float32"),
    ],
}
LLAMA = LlamaConfig(
    vocab_size=4000,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=12,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def settings(offload: str) -> dict[str, Any]:
    """Layers in turn. With "none" all of them must have trained before all have a state: half at a time."""
    gamma, interval = (6, 1) if offload == "none" else (GAMMA, 2)
    return {
        **{"active_layers": gamma, "sampler": "cyclic", "sampling_interval": interval, "update_interval": interval},
        "offload": {"mode": offload},
    }


STEPS = 3


def live(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the memory that tensors lie in, each piece once."""
    memories = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(memories.values())


def counted(rank: int, world_size: int, name: str, backend: str, offload: str, dtype: str) -> dict[str, int]:
    """A short training; the most that its weights, gradients and states took on this rank."""
    kind = getattr(torch, dtype)
    if name == "llama":
        model = AutoModelForCausalLM.from_config(LLAMA, dtype=kind)
    else:
        model = AutoModelForCausalLM.from_pretrained(resolve_model(MODEL), dtype=kind)
    model.train()
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
    from grass_dist.deepspeed import initialize
    from integration_tests.support.zero import ds_config

    config = ds_config(int(backend[-1]), settings(offload), 1, getattr(torch, dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    engine, *_ = initialize(model=model, optimizer=optimizer, config=config)
    states = engine.optimizer.states
    for step in range(STEPS):
        x = torch.randint(0, 1000, (1, TOKENS), generator=torch.Generator().manual_seed(step * world_size + rank))
        engine.backward(engine(input_ids=x, labels=x, use_cache=False).loss)
        averaged = engine.optimizer.averaged_gradients
        parts = [g for own in averaged.values() for g in own or () if g is not None]
        gradients = live([*parts, *(p.grad for p in engine.module.parameters() if p.grad is not None)])
        engine.step()
        params = [getattr(p, "ds_tensor", p).detach() for p in engine.module.parameters()]
        yield {
            "weights": live(params),
            "gradients": gradients,
            "states": states.device_bytes,
            "host": 0 if offload == "none" else states.mode.store.nbytes,
        }
    engine.destroy()


@pytest.fixture(scope="module")
def shapes():
    return {"smollm2": shape_of_model(MODEL), "llama": shape_of_config("llama", LLAMA)}


def job_of(ranks: int, backend: str, offload: str, dtype: str) -> PlannedRun:
    replicate = 2 if backend == "hsdp" else 1
    same: dict[str, Any] = {"gpus": ranks, "gpus_per_host": ranks, "gpu_bytes": 24e9, "seq_len": TOKENS}
    more: dict[str, Any] = {"backend": backend, "replicate": replicate, "offload": offload, "dtype": dtype}
    return PlannedRun(**same, **more)


@pytest.mark.parametrize(("ranks", "kind"), list(CASES))
def test_live_bytes_are_as_planned(shapes, ranks, kind):
    by_rank = run_ranks(ranks, count_all, kind, timeout=220)
    for (name, backend, offload, dtype), *measured in zip(CASES[ranks, kind], *by_rank, strict=True):
        shape, job = shapes[name], job_of(ranks, backend, offload, dtype)
        method = Method("grass", settings(offload)["active_layers"])
        device, host = memory.states_of(shape, job, method)
        planned = {
            # The DeepSpeed configuration of these tests leaves no small parameters gathered.
            "weights": memory.weights_of(shape, job) - memory._persistent(shape, job),
            "gradients": memory.gradients_of(shape, job, method),
            "states": device,
            "host": host,
        }
        cuts = backend in ("zero1", "zero2")  # which parameters are cut, and kept whole, is another matter on each rank
        for part, nbytes in planned.items():
            counts = [rank[part] for rank in measured]
            assert nbytes == pytest.approx(max(counts), rel=0.05, abs=1e4), (
                name,
                backend,
                offload,
                dtype,
                part,
                counts,
            )
            assert cuts or nbytes == pytest.approx(min(counts), rel=0.05, abs=1e4), (name, backend, part, counts)
        most = {part: max(rank[part] for rank in measured) for part in planned}
        in_mb = " | ".join(f"{planned[part] / 1e6:.1f}, {most[part] / 1e6:.1f}" for part in planned)
        off = max(abs(nbytes / most[part] - 1) for part, nbytes in planned.items() if most[part])
        print(f"\n| {name} | {backend} | {ranks} | {offload} | {dtype} | {in_mb} | {off:.2%} |")
        parts = ("weights", "gradients", "states")
        total = max(sum(rank[p] for p in parts) for rank in measured)
        assert sum(planned[p] for p in parts) == pytest.approx(total, rel=0.05)
