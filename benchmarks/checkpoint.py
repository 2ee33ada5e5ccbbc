#!/usr/bin/env python
"""What a checkpoint costs training: how long a step waits for a save, beside a step's time; and its bytes.

    torchrun --nproc-per-node 2 benchmarks/checkpoint.py [--backend fsdp2] [--rounds 5] [--json FILE]

One training goes through rounds of three turns of some steps each: without a save; with a save that is written in the
background, begun before the first of them and ended before the next turn; with one that is written while training
waits. A turn's time is that of the slowest rank. What a save costs is a turn with it over the turn without it of the
same round, in steps; its stall is how long the call took. Some layers have trained by then and others never: the least
that must be written is the weights once, and master and moments of those that have.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from offload_runs import Run, add_arguments, random_ids

from grass_dist.checkpoint import files
from grass_dist.checkpoint.folders import checkpoints_in
from grass_dist.checkpoint.loading import load, open_checkpoint
from grass_dist.checkpoint.pieces import Holdings
from grass_dist.checkpoint.saving import Saved, Saver
from grass_dist.checkpoint.zero_run import ZeroHoldings
from grass_dist.job.world import World
from grass_dist.ranks import Ranks

TURNS = ("without", "background", "waiting")


def measure(args: argparse.Namespace, world: World, folder: Path) -> dict[str, Any]:
    run = Run(args, world, {"mode": "interval"})
    holdings: Holdings = ZeroHoldings(run.engine) if run.engine else run.optimizer.holdings()
    ranks = Ranks(world.background)
    savers = {name: Saver(folder / name, holdings, ranks, keep=2, background=name == TURNS[1]) for name in TURNS[1:]}
    for at in range(args.interval * 2 + 1):  # the probe, and two rounds of layers
        run.step(random_ids(run, at, args.batch, args.length))
    took: dict[str, list[float]] = {name: [] for name in TURNS}
    saves: dict[str, list[Saved]] = {name: [] for name in savers}
    for number in range(-1, args.rounds):  # the first round makes the memory that copies go to
        for name in (TURNS[(number + i) % 3] for i in range(3)):
            dist.barrier(group=world.patient)
            began = time.perf_counter()
            if name in savers:
                savers[name].save(number + 1, {})
            for _ in range(args.steps):
                at += 1
                run.step(random_ids(run, at, args.batch, args.length))
            if name in savers:
                saved = savers[name].outcome()
                assert saved and not saved.error, saved
            seconds = world_max(world, time.perf_counter() - began)
            if number >= 0:
                took[name].append(seconds)
                if name in savers:
                    saves[name].append(saved)
    newest = checkpoints_in(folder / TURNS[1])[0]
    began = time.perf_counter()
    load(open_checkpoint(newest, ranks), holdings)
    told = {name: _told(took, saves[name], name, args.steps, world) for name in savers}
    return {
        "step seconds": statistics.median(took["without"]) / args.steps,
        "saves": told,
        "load seconds": world_max(world, time.perf_counter() - began),
        "bytes": bytes_of(newest, holdings, world),
    }


def _told(took: dict[str, list[float]], saves: list[Saved], name: str, steps: int, world: World) -> dict[str, Any]:
    plain = [seconds / steps for seconds in took["without"]]
    extra = [(a - b) / step for a, b, step in zip(took[name], took["without"], plain, strict=True)]
    stalls = [world_max(world, saved.stall_seconds) for saved in saves]
    return {
        "stall seconds": statistics.median(stalls),
        "stall over step": statistics.median(a / b for a, b in zip(stalls, plain, strict=True)),
        "writing seconds": statistics.median(saved.seconds for saved in saves),
        "whole cost in steps": statistics.quantiles(extra, n=4, method="inclusive"),
    }


def bytes_of(folder: Path, holdings: Holdings, world: World) -> dict[str, float]:
    """Of the files, and the least: weights, and the states of layers that have one, once."""
    mine = sum(p.tensor.nbytes for piece in holdings.weights() if (p := piece.to_write(holdings.ranks)))
    states = [piece for unit in holdings.states() for piece in unit.tensors]
    mine += sum(p.tensor.nbytes for piece in states if (p := piece.to_write(holdings.ranks)))
    least, written = world.sum(mine)[0], files.total_bytes(files.read_manifest(folder))
    return {"written": written, "least": least, "over least": written / least}


def world_max(world: World, value: float) -> float:
    carried = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(carried, op=dist.ReduceOp.MAX, group=world.patient)
    return carried.item()


def show(args: argparse.Namespace, record: dict[str, Any]) -> None:
    told = record["costs"]
    print(
        f"{args.random_llama or args.model}, {args.backend} on {record['ranks']} ranks ({record['device']}), "
        f"{args.batch} x {args.length} tokens a rank, γ = {args.active}; {args.rounds} rounds of turns of {args.steps} "
        f"steps of {told['step seconds']:.2f} s; torch {record['torch']}; load before: {record['load before']:.1f}"
    )
    for name, own in told["saves"].items():
        low, middle, high = own["whole cost in steps"]
        print(
            f"{name:11} a save: training waits {own['stall seconds']:.3f} s ({own['stall over step']:.3f} of a step), "
            f"written in {own['writing seconds']:.2f} s; costs {middle:.2f} steps in all ({low:.2f} to {high:.2f})"
        )
    sizes = told["bytes"]
    print(
        f"{sizes['written'] / 1e6:.1f} MB written, {sizes['over least']:.4f} of the least; checked and loaded in "
        f"{told['load seconds']:.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5, help="at least 2")
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    parser.add_argument("--folder", type=Path, help="where to write, e.g. on the disk that checkpoints go to")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    load_before = os.getloadavg()[0]
    world = World.join(datetime.timedelta(minutes=10))
    made = [tempfile.mkdtemp(dir=args.folder) if world.is_main else None]
    dist.broadcast_object_list(made, group=world.patient)
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"
    given = {**vars(args), "json": str(args.json), "folder": str(args.folder)}
    record: dict[str, Any] = {"arguments": given, "device": device, "ranks": world.size, "torch": torch.__version__}
    try:
        record |= {"load before": load_before, "costs": measure(args, world, Path(str(made[0])))}
    finally:
        if world.is_main:
            shutil.rmtree(str(made[0]), ignore_errors=True)
    if world.is_main:
        show(args, record)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(record, indent=1) + "\n")
    world.leave()


if __name__ == "__main__":
    main()
