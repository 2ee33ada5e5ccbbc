#!/usr/bin/env python
"""Step time of GRASS under DeepSpeed ZeRO over full fine-tuning by stock ZeRO, and what a draw costs, side by side.

    torchrun --nproc-per-node 2 benchmarks/zero_step.py [--stage 2] [--rounds 12] [--json FILE]

Both engines train the same model (SmolLM2-135M unless --model) on the same tokens and take turns step by step in one
run. A step's time is that of the slowest rank; the ratio is formed within a round. GRASS draws at every fourth step;
steps with a draw (the ZeRO optimizer is constructed anew over other layers) are told apart from the others.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist

import grass_dist
from grass_dist.training.packaged_model import resolve_model
from grass_dist.training.world import World
from grass_dist.zero.jit import spare_the_compiler

INTERVAL = 4


def engine_for(args: argparse.Namespace, world: World, grass: dict | None):
    from transformers import AutoModelForCausalLM

    low = world.device.type == "cuda"
    model = AutoModelForCausalLM.from_pretrained(
        resolve_model(args.model), dtype=torch.bfloat16 if low else torch.float32
    )
    config = {
        "train_micro_batch_size_per_gpu": args.batch,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": args.stage},
        "bf16": {"enabled": low},
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        **({"grass": grass} if grass else {}),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    return grass_dist.initialize(model=model, optimizer=optimizer, config=config)[0]


def timed_step(engine, ids: torch.Tensor, world: World) -> float:
    dist.barrier()
    began = time.perf_counter()
    engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
    engine.step()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - began, device=world.device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="packaged:smollm2-135m")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--active", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    world = World.join(datetime.timedelta(minutes=10))
    spare_the_compiler({})
    grass = {"active_layers": args.active, "sampling_interval": INTERVAL, "update_interval": INTERVAL, "probe_steps": 1}
    engines = {"full": engine_for(args, world, None), "grass": engine_for(args, world, grass)}
    times: dict[str, list[float]] = {"full": [], "grass": [], "draw": []}
    ratios = []
    for number in range(-2, args.rounds):  # two rounds warm up; the first of them is the probe's
        ids = torch.randint(0, 1000, (args.batch, args.length), device=world.device)
        step = engines["grass"].grass.step
        draws = step > 1 and step % INTERVAL == 0  # this step ends with a draw
        took = {name: timed_step(engines[name], ids, world) for name in sorted(engines, reverse=number % 2 == 0)}
        if number >= 0:
            times["full"].append(took["full"])
            times["draw" if draws else "grass"].append(took["grass"])
            ratios.append(took["grass"] / took["full"])
    medians = {name: statistics.median(values) for name, values in times.items() if values}
    told = {"stage": args.stage, "seconds": medians, "over full": statistics.median(ratios)}
    told["quartiles"] = statistics.quantiles(ratios, n=4)[::2]
    told["draw seconds"] = medians["draw"] - medians["grass"]
    if world.rank == 0:
        print(json.dumps(told, indent=1))
        if args.json:
            args.json.write_text(json.dumps(told, indent=1) + "\n")
    world.leave()


if __name__ == "__main__":
    main()
