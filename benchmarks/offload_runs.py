"""What the benchmarks of moving states share: a model that trains in one of the modes, and the same draws for all."""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import grass_dist
from grass_dist.job.world import World
from grass_dist.model.discovery import find_layers
from grass_dist.model.packaged import resolve_model

ADAMW = {"lr": 1e-5}
NO_CLIPPING = 1e9
IN_BACKWARD = "stream, in backward"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=("fsdp2", "ddp", "zero2", "zero3"), default="fsdp2")
    parser.add_argument("--model", default="packaged:smollm2-135m")
    parser.add_argument("--random-llama", metavar="SIZE", help="a Llama of this size instead, e.g. 1.5B")
    parser.add_argument("--active", type=int, default=4, help="γ")
    parser.add_argument("--interval", type=int, default=4, help="steps between two switches, at least 3")
    parser.add_argument("--slots", type=int, default=2, help='of the mode "stream"')
    parser.add_argument(
        "--weights", choices=("resident", "host"), default="resident", help="host: only compare them, under ddp"
    )
    parser.add_argument("--batch", type=int, default=2, help="sequences a rank")
    parser.add_argument("--length", type=int, default=128)


def modes(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What is compared: with the first one."""
    if args.weights == "host":
        return {"resident": {"mode": "interval"}, "host": {"mode": "interval", "weights": "host"}}
    stream = {"mode": "stream", "slots": args.slots}
    found = {"none": {"mode": "none"}, "interval": {"mode": "interval"}, "stream": stream}
    if not args.backend.startswith("zero"):  # DeepSpeed updates after the norm
        found[IN_BACKWARD] = {**stream, "update_in_backward": True}
    return found


class Run:
    """One mode, with a model of its own.

    Args:
        offload: `GrassConfig.offload`.
        settings: of `GrassConfig`, other than those of all runs.
    """

    def __init__(self, args: argparse.Namespace, world: World, offload: dict[str, Any], **settings: Any) -> None:
        self.world, self.clips = world, not offload.get("update_in_backward")
        config = {
            **{"active_layers": args.active, "sampling_interval": args.interval, "update_interval": args.interval},
            **{"draw_ahead": 2, "probe_steps": 1, "sampler": in_turn(args.active), "offload": offload},
            **settings,
        }
        model = load(args, world)
        self.vocabulary = model.config.vocab_size
        self.layers = len(find_layers(model).layers)
        self.engine: Any = None
        if args.backend.startswith("zero"):
            self.engine = self._engine(args, model, config)
            self.model, self.grass = self.engine.module, self.engine.grass
            return
        if args.backend == "fsdp2":
            mesh = init_device_mesh(world.device.type, (world.size,))
            for layer in (model.get_submodule(unit.name) for unit in find_layers(model).layers):
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        self.model = DistributedDataParallel(model) if args.backend == "ddp" else model
        self.optimizer = grass_dist.GrassOptimizer(
            self.model, torch.optim.AdamW, ADAMW, config=grass_dist.GrassConfig(**config)
        )
        self.grass = self.optimizer.grass

    def _engine(self, args: argparse.Namespace, model: nn.Module, grass: dict[str, Any]) -> Any:
        from grass_dist.backends.zero.jit import spare_the_compiler

        spare_the_compiler({})
        config = {
            **{"train_micro_batch_size_per_gpu": args.batch, "gradient_clipping": NO_CLIPPING},
            **{"zero_optimization": {"stage": int(args.backend[-1])}, "bf16": {"enabled": dtype() != torch.float32}},
            **{"steps_per_print": 10**9, "zero_allow_untested_optimizer": True, "grass": grass},
        }
        optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
        return grass_dist.initialize(model=model, optimizer=optimizer, config=config)[0]

    def train(self, ids: torch.Tensor) -> None:
        """A step."""
        if self.engine is not None:
            self.engine.backward(self.engine(input_ids=ids, labels=ids, use_cache=False).loss)
            self.engine.step()
            return
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if self.clips:
            self.optimizer.clip_grad_norm_(NO_CLIPPING)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, ids: torch.Tensor) -> float:
        """A step, which all ranks begin at once; seconds of the slowest rank."""
        dist.barrier(group=self.world.patient)
        began = time.perf_counter()
        self.train(ids)
        if self.world.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # not the device: copies may run on
        seconds = torch.tensor(time.perf_counter() - began)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=self.world.patient)
        return seconds.item()

    def loss(self, batches: list[torch.Tensor]) -> float:
        with torch.no_grad():
            return statistics.mean(self.model(input_ids=x, labels=x, use_cache=False).loss.item() for x in batches)

    def weights(self) -> list[torch.Tensor]:
        """This rank's."""
        shards = (getattr(p, "ds_tensor", p).detach() for p in self.model.parameters())
        return [shard.to_local() if isinstance(shard, DTensor) else shard for shard in shards]

    def state_bytes(self) -> tuple[int, int]:
        """On the device and on the host, of this rank."""
        if self.engine is not None:
            states = self.engine.optimizer.states
            return states.device_bytes, states.host_bytes
        return self.optimizer.state_bytes, self.optimizer.host_state_bytes

    def traffic(self) -> list[float]:
        """Bytes to the device and to the host, seconds of copies and of waiting; of this rank, since the start."""
        traffic = self.grass.traffic
        to_device = traffic.bytes_to_device + traffic.weight_bytes_to_device
        to_host = traffic.bytes_to_host + traffic.weight_bytes_to_host
        return [to_device, to_host, traffic.seconds, traffic.waited]

    def cycle(self) -> int:
        """Steps until every layer has a state."""
        config = self.grass.config
        return 1 + config.sampling_interval * math.ceil(self.layers / config.active_layers)


def dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def load(args: argparse.Namespace, world: World) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    if not args.random_llama:
        return AutoModelForCausalLM.from_pretrained(resolve_model(args.model), dtype=dtype()).to(world.device).train()
    depth, entries = 24, float(args.random_llama.upper().replace("B", "e9").replace("M", "e6"))
    heads = max(1, round(math.sqrt(entries / depth / 12) / 128))
    shape = {"hidden_size": 128 * heads, "intermediate_size": 128 * heads * 8 // 3, "num_hidden_layers": depth}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 32000}
    torch.manual_seed(0)
    with world.device:
        config = LlamaConfig(max_position_embeddings=max(2048, args.length), **shape)
        return AutoModelForCausalLM.from_config(config, dtype=dtype()).train()


def in_turn(gamma: int) -> str:
    """Name of a sampler that measures as the method's own does, and draws ``gamma`` of all layers after the other.

    They are mixed. A draw has none of the last one's layers, save where a cycle ends whose last draw is filled up.
    """

    def draw(importances: np.ndarray, generator: Any) -> list[int]:
        order = np.random.Generator(np.random.Philox(0)).permutation(len(importances))
        start = generator.round % math.ceil(len(order) / gamma) * gamma
        return [int(order[i % len(order)]) for i in range(start, start + gamma)]

    name = f"{gamma} in turn"
    with contextlib.suppress(grass_dist.ConfigError):  # it is known already
        grass_dist.register_sampler(name, draw)
    return name


def random_ids(run: Run, step: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + run.world.rank)
    return torch.randint(0, run.vocabulary, shape, generator=generator).to(run.world.device)


def give_all_layers_a_state(runs: list[Run]) -> int:
    """A cycle of short steps; how many."""
    count = runs[0].cycle()
    for step in range(count):
        for run in runs:
            run.step(random_ids(run, step, 1, 16))
    return count
