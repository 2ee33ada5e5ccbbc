#!/usr/bin/env python
"""Step time of GRASS over full fine-tuning and over a bare loop that toggles the same layers, side by side.

    torchrun --nproc-per-node 2 -m benchmarks.step_time [--rounds 16] [--json FILE]

All variants train the same model (SmolLM2-135M unless --model) under FSDP2 on the same tokens. They take turns step by
step in one run, in an order that rotates, so that whatever slows the machine slows all of them. A step's time is that
of the slowest rank; ratios are formed within a round and the median over the rounds is shown with the quartiles.
On GPUs the weights are bfloat16: GRASS then keeps fp32 masters, which the stock AdamW of the other variants does not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

import grass_dist
from benchmarks.limits import by_layers, with_head
from grass_dist.job.world import World
from grass_dist.model.discovery import find_layers
from grass_dist.model.packaged import resolve_model

ADAMW = {"lr": 1e-5}
ROLES = ("embeddings", "final_norm", "lm_head")


class Variant:
    """One way of training, with a model of its own."""

    def __init__(self, name: str, args: argparse.Namespace, world: World) -> None:
        self.name, self.world = name, world
        self.model = load(args, world)
        self.layers = find_layers(self.model)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), **ADAMW)

    def before(self) -> None:
        """What changes before a step; timed with it."""

    def step(self, ids: torch.Tensor) -> float:
        dist.barrier()
        began = time.perf_counter()
        self.before()
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = torch.tensor(time.perf_counter() - began)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return seconds.item()


class Grass(Variant):
    def __init__(self, name: str, args: argparse.Namespace, world: World, **config) -> None:
        super().__init__(name, args, world)
        settings = {
            "active_layers": args.active_layers,
            "probe_steps": 0,
            "sampling_interval": args.interval,
            "update_interval": args.interval,
            **config,
        }
        self.optimizer = grass_dist.GrassOptimizer(
            self.model, torch.optim.AdamW, ADAMW, config=grass_dist.GrassConfig(**settings)
        )
        self.active = self.optimizer.grass.active_layers

    def before(self) -> None:
        self.active = self.optimizer.grass.active_layers


class Bare(Variant):
    """Sets requires_grad on the layers that ``leader`` trained in this round, and nothing else."""

    def __init__(
        self, name: str, args: argparse.Namespace, world: World, leader: Callable[[], Grass], roles: bool
    ) -> None:
        super().__init__(name, args, world)
        self.leader, self.roles = leader, roles

    def before(self) -> None:
        active = self.leader().active
        for unit in self.layers.layers:
            for _, param in unit.params:
                param.requires_grad_(unit.index in active)
        for unit in self.layers.roles:
            for _, param in unit.params:
                param.requires_grad_(self.roles)


def load(args: argparse.Namespace, world: World) -> nn.Module:
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(resolve_model(args.model), dtype=dtype)
    mesh = init_device_mesh(world.device.type, (world.size,))
    for layer in (model.get_submodule(unit.name) for unit in find_layers(model).layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="packaged:smollm2-135m")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--active-layers", type=int, default=3)
    parser.add_argument("--interval", type=int, default=4, help="steps between draws, and between refreshes")
    parser.add_argument("--batch", type=int, default=2, help="sequences a rank")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    world = World.join(datetime.timedelta(minutes=10))
    with_roles = Grass("GRASS, always-active roles", args, world)
    without = Grass("GRASS, layers only", args, world, always_active=())
    variants = [
        Variant("full fine-tuning", args, world),
        with_roles,
        Bare("bare loop, always-active roles", args, world, lambda: with_roles, True),
        without,
        Bare("bare loop, layers only", args, world, lambda: without, False),
        Grass("GRASS, probe steps", args, world, probe_steps=10**6),
    ]
    vocabulary = variants[0].model.config.vocab_size
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    limits: dict[str, list[float]] = {
        "roles": [],
        "layers only": [],
        "roles, by layers": [],
        "layers only, by layers": [],
    }
    for round in range(-2, args.rounds):  # two rounds warm up
        generator = torch.Generator().manual_seed(1000 * (round + 2) + world.rank)
        ids = torch.randint(0, vocabulary, (args.batch, args.length), generator=generator).to(world.device)
        # Pairs stay together, each led by its GRASS, and the pairs and members take turns at going first.
        shift = round % len(variants) // 2 * 2
        for variant in in_turn(variants, shift, round):
            seconds = variant.step(ids)
            if round >= 0:
                times[variant.name].append(seconds)
        if round >= 0:
            found = variants[0].layers
            limits["roles"].append(with_head(found, with_roles.active, True))
            limits["layers only"].append(with_head(found, without.active, False))
            limits["roles, by layers"].append(by_layers(found, with_roles.active, True))
            limits["layers only, by layers"].append(by_layers(found, without.active, False))
    if world.is_main:
        show(args, world, times, limits)
    world.leave()


def in_turn(variants: list[Variant], shift: int, round: int) -> list[Variant]:
    order = variants[shift:] + variants[:shift]
    if round % 2:  # every second round the bare loops go before their leaders, with the layers that those will train
        order = list(reversed(order))
        for variant in order:
            if isinstance(variant, Grass):
                variant.before()
    return order


def ratio(times: dict[str, list[float]], over: str, under: str) -> tuple[float, float, float]:
    quotients = [a / b for a, b in zip(times[over], times[under], strict=True)]
    low, middle, high = statistics.quantiles(quotients, n=4)
    return middle, low, high


def show(args: argparse.Namespace, world: World, times: dict[str, list[float]], limits: dict[str, list[float]]) -> None:
    full = "full fine-tuning"
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"
    print(f"{args.model}, FSDP2 on {world.size} ranks ({device}), {args.batch} x {args.length} tokens a rank, "
          f"γ = {args.active_layers}, {args.rounds} rounds; torch {torch.__version__}")  # fmt: skip
    print(f"{'':34} {'median s':>9} {'over full':>10} {'quartiles':>16}")
    for name in times:
        middle, low, high = ratio(times, name, full)
        print(f"{name:34} {statistics.median(times[name]):9.2f} {middle:10.3f} {low:8.3f}-{high:.3f}")
    pairs = [(f"GRASS, {kind}", f"bare loop, {kind}") for kind in ("always-active roles", "layers only")]
    for over, under in pairs:
        middle, low, high = ratio(times, over, under)
        print(f"{over} over {under}: {middle:.3f} ({low:.3f}-{high:.3f})")
    print(
        "limits over full fine-tuning, by FLOPs: "
        + ", ".join(f"{k} {statistics.mean(v):.3f}" for k, v in limits.items())
    )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        record = {"arguments": {**vars(args), "json": str(args.json)}, "device": device, "ranks": world.size,
                  "torch": torch.__version__, "seconds": times, "limits": limits}  # fmt: skip
        args.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
