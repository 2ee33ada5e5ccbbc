"""Ranks on several hosts count what the backward of a step puts on their host's network, and how long a step takes.

    python -m integration_tests.support.traffic FOLDER    (with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT)

The weights stay gathered between forward and backward, so that the backward sends gradients alone.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import grass_dist
from grass_dist.job.world import World
from integration_tests.support.hosts import Host, traffic

LAYERS, ACTIVE, LENGTH, STEPS = 8, 2, 16, 3
GRASS = {"active_layers": ACTIVE, "sampler": "uniform", "sampling_interval": 1}
BACKENDS = ("fsdp2", "hsdp", "zero2")


@dataclass(frozen=True)
class Measured:
    """One training on one host."""

    sent: float
    """Bytes that its interface sent in the backward of a step, on average."""
    sent_in_step: float
    """In all of the step: also weights that are gathered for it, and what the update sends."""
    seconds: float
    """Of a whole step, the median."""
    trained: float
    """Share of the parameters that train."""


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )


def in_torch(backend: str, grass: bool) -> tuple[Callable[[torch.Tensor], None], Callable[[], None], float]:
    """Forward and backward, the update, and the share of the parameters that train."""
    shape = (2, dist.get_world_size() // 2) if backend == "hsdp" else (dist.get_world_size(),)
    names = ("dp_replicate", "dp_shard") if backend == "hsdp" else ("dp_shard",)
    mesh, model = init_device_mesh("cpu", shape, mesh_dim_names=names), llama()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    if grass:
        optimizer = grass_dist.GrassOptimizer(
            model, torch.optim.AdamW, {"lr": 1e-3}, config=grass_dist.GrassConfig(**GRASS)
        )
        share = trained_share(model, optimizer.grass)
    else:
        optimizer, share = torch.optim.AdamW(model.parameters(), lr=1e-3), 1.0

    def backward(ids: torch.Tensor) -> None:
        loss = model(input_ids=ids, labels=ids).loss
        settle()
        loss.backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return backward, update, share


def in_zero(grass: bool) -> tuple[Callable[[torch.Tensor], None], Callable[[], None], float]:
    from integration_tests.support.zero import ds_config

    config = ds_config(2, GRASS if grass else None) | {"gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}
    model = llama()
    engine = grass_dist.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), config=config
    )[0]

    def backward(ids: torch.Tensor) -> None:
        loss = engine(input_ids=ids, labels=ids).loss
        settle()
        engine.backward(loss)

    return backward, engine.step, trained_share(model, engine.grass) if grass else 1.0


def trained_share(model: torch.nn.Module, grass: grass_dist.GrassController) -> float:
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    total = sum(p.numel() for p in model.parameters())
    always = total - LAYERS * layer if grass.roles else 0
    return (ACTIVE * layer + always) / total


SENT: list[int] = []


def settle() -> None:
    """Notes what has been sent, when all ranks are at the same place."""
    dist.barrier()
    SENT.append(traffic()[1])
    dist.barrier()


def measure(backend: str, grass: bool, rank: int) -> Measured:
    backward, update, share = in_zero(grass) if backend == "zero2" else in_torch(backend, grass)
    generator = torch.Generator().manual_seed(rank)
    sent, whole, seconds = [], [], []
    for step in range(STEPS + 1):
        ids = torch.randint(128, (1, LENGTH), generator=generator)
        SENT.clear()
        settle()
        began = time.perf_counter()
        backward(ids)
        settle()
        update()
        dist.barrier()
        took = time.perf_counter() - began
        settle()
        if step:  # the first one makes connections
            sent.append(SENT[2] - SENT[1])
            whole.append(SENT[3] - SENT[0])
            seconds.append(took)
    return Measured(sum(sent) / STEPS, sum(whole) / STEPS, statistics.median(seconds), share)


def run_apart(hosts: list[Host], folder: Path, each: int = 2, timeout: float = 120) -> dict[str, dict]:
    """Runs this program with ``each`` ranks on each host; what they measured, by host and training."""
    where = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29400", "WORLD_SIZE": str(each * len(hosts))}
    ranks = [
        host.popen(
            [sys.executable, "-m", "integration_tests.support.traffic", str(folder)],
            env={**os.environ, **where, "RANK": str(number * each + local), "LOCAL_RANK": str(local)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, host in enumerate(hosts)
        for local in range(each)
    ]
    try:
        said = [rank.communicate(timeout=timeout)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), "\n".join(said)
    return {host.name: json.loads((folder / f"{host.name}.json").read_text()) for host in hosts}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    world = World.join(datetime.timedelta(seconds=60))
    found = {
        f"{backend} {'grass' if grass else 'full'}": asdict(measure(backend, grass, world.rank))
        for backend in BACKENDS
        for grass in (True, False)
    }
    if world.local_rank == 0:
        (folder / f"{socket.gethostname()}.json").write_text(json.dumps(found))
    world.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
