#!/usr/bin/env python
"""What moving the layers' optimizer states costs, over states that stay on the device: step time, bytes and memory.

    torchrun --nproc-per-node 2 benchmarks/offload.py [--backend fsdp2] [--rounds 4] [--json FILE]
    torchrun --nproc-per-node 2 benchmarks/offload.py --host-dtype 48      # what rounded moments change, and no more
    torchrun --nproc-per-node 1 benchmarks/offload.py --backend ddp --weights host    # weights on the host
    torchrun --nproc-per-node 1 benchmarks/offload.py --random-llama 1.5B --batch 4 --length 1024      # on a GPU

The modes train models of their own, of the same weights on the same tokens with the same draws. Layers are drawn in
turn, so that a switch replaces all of them (save where a cycle ends), which is the most that it can move; a
cycle of short steps gives all layers a state to move, before anything is timed. Gradients are clipped to a norm that
they never reach, except where layers are updated in the backward, so that all modes train the same weights.

A copy may run on beside the next step, which must be one of its own mode. So the modes take turns of an interval, not
of a step: a first step, then those of a whole interval, which are timed, then a wait for what is still on its way. A
step's time is that of the slowest rank. Ratios are formed with the same step of the first mode in the same round;
medians are shown with the quartiles. The order of the modes rotates.

On a GPU a second part builds, trains and frees each mode alone, and full fine-tuning, and measures device memory.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from offload_runs import IN_BACKWARD, Run, add_arguments, give_all_layers_a_state, modes, random_ids

from grass_dist.job.world import World
from grass_dist.model.packaged import resolve_model

GOALS = {
    "cpu": {"interval": 1.02, "stream": 1.05, IN_BACKWARD: 1.05, "host": 1.10},
    "gpu": {"stream": 1.03, IN_BACKWARD: 1.03},
}
HIDDEN = 0.95
"""The goal on a GPU, where states are streamed."""


def step_times(args: argparse.Namespace, world: World) -> dict[str, Any]:
    runs = {name: Run(args, world, offload) for name, offload in modes(args).items()}
    names, timed = list(runs), list[int]()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    drawn: dict[str, list[tuple[int, ...]]] = {name: [] for name in runs}
    traffic: dict[str, list[float]] = {name: [0] * 4 for name in runs}
    held: dict[str, list[tuple[int, int]]] = {name: [] for name in runs}
    at = give_all_layers_a_state(list(runs.values()))
    for number in range(args.rounds):
        turn = range(at + 1, at + 1 + args.interval)
        for name in (names[(number + i) % len(names)] for i in range(len(names))):
            run = runs[name]
            run.step(random_ids(run, at, args.batch, args.length))
            before = run.traffic()
            for step in turn:
                drawn[name].append(run.grass.active_layers)
                seconds[name].append(run.step(random_ids(run, step, args.batch, args.length)))
                held[name].append(run.state_bytes())
            traffic[name] = [a + y - x for a, x, y in zip(traffic[name], before, run.traffic(), strict=True)]
            run.grass.states.settle()  # waits for all copies
        timed += turn
        at = turn[-1] + 1
    told = {}
    for name in names:
        to_device, to_host, copies, waited = (value / len(timed) for value in traffic[name])
        on_device, on_host = map(max, zip(*held[name], strict=True))
        told[name] = {
            "seconds": seconds[name],
            "same layers as none": drawn[name] == drawn[names[0]],
            "a step": {"to device": to_device, "to host": to_host, "copies": copies, "waited": waited},
            "hidden": max(0.0, 1 - waited / copies) if copies else None,
            "most state bytes": {"device": on_device, "host": on_host},
        }
    return {
        "layers": run.layers,
        "place in the interval": [(step - 1) % args.interval for step in timed],
        "modes": told,
    }


def memory(args: argparse.Namespace, world: World, layers: int) -> dict[str, Any]:
    """Device memory of each mode alone, on this rank: at most, and between two steps beyond the weights."""
    if world.device.type != "cuda":
        return {}
    full = {"active_layers": layers, "sampler": "cyclic", "probe_steps": 0}
    told = {}
    for name, offload in {"full fine-tuning": {"mode": "none"}, **modes(args)}.items():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run = Run(args, world, offload, **({} if name in modes(args) else full))
        for step in range(run.cycle() + 2):
            run.step(random_ids(run, step, args.batch, args.length))
        run.grass.states.settle()
        grown = torch.cuda.memory_allocated() - sum(shard.nbytes for shard in run.weights())
        told[name] = {"peak": torch.cuda.max_memory_allocated(), "beyond the weights": grown}
        if run.engine is not None:
            run.engine.destroy()
        del run
    return told


def rounded(args: argparse.Namespace, world: World) -> dict[str, Any]:
    """Weights and loss after steps on text with moments that the host rounds, against exact ones."""
    told: dict[str, Any] = {"steps": args.host_dtype}
    weights: dict[str, list[torch.Tensor]] = {}
    for name, offload in {"exact": {}, "bfloat16": {"host_dtype": "bfloat16"}}.items():
        run = Run(args, world, {"mode": "interval", **offload})
        text = words(args, run.vocabulary)
        rows = text[: len(text) // args.length * args.length].view(-1, args.length)
        known, held_out = rows[: len(rows) * 5 // 6], rows[len(rows) * 5 // 6 :].to(world.device)
        weights.setdefault("start", [w.double() for w in run.weights()])
        for step in range(args.host_dtype):
            first = (step * world.size + world.rank) * args.batch
            run.step(known[[(first + i) % len(known) for i in range(args.batch)]].to(world.device))
        weights[name] = [w.double() for w in run.weights()]  # before a forward without backward leaves some gathered
        to_device, to_host, *_ = run.traffic()
        told[name] = {"loss on text held out": run.loss(list(held_out.split(1))), "host bytes": run.state_bytes()[1]}
        told[name] |= {"bytes to device": to_device, "bytes to host": to_host}
        del run
    start, exact, low = (torch.cat([w.flatten() for w in own]).cpu() for own in weights.values())
    sums = torch.stack([(low - exact).square().sum(), exact.square().sum(), (exact - start).square().sum()])
    count, largest = torch.tensor(len(exact)), (low - exact).abs().max()
    for tensor, op in ((sums, dist.ReduceOp.SUM), (count, dist.ReduceOp.SUM), (largest, dist.ReduceOp.MAX)):
        dist.all_reduce(tensor, op=op, group=world.patient)
    rms = (sums / count).sqrt()
    told["rms difference over rms weight"] = (rms[0] / rms[1]).item()
    told["largest difference over rms weight"] = (largest / rms[1]).item()
    told["rms difference over rms of what was trained"] = (rms[0] / rms[2]).item()
    return told


def words(args: argparse.Namespace, vocabulary: int) -> torch.Tensor:
    """Token ids of this project's documentation; of a model without a tokenizer, random ones of uneven frequency."""
    if args.random_llama:
        return (torch.rand(2**16, generator=torch.Generator().manual_seed(0)) ** 3 * vocabulary).long()
    from transformers import AutoTokenizer

    project = Path(__file__).parent.parent
    text = "\n".join(path.read_text() for path in (project / "README.md", *sorted((project / "docs").glob("*.md"))))
    return torch.tensor(AutoTokenizer.from_pretrained(resolve_model(args.model))(text)["input_ids"])


def spread(over: list[float], under: list[float]) -> list[float]:
    """Median and quartiles of the ratios."""
    low, middle, high = statistics.quantiles((a / b for a, b in zip(over, under, strict=True)), n=4, method="inclusive")
    return [middle, low, high]


def compare(told: dict[str, Any], interval: int) -> None:
    """Adds ratios: over the first mode ("none") by place in the interval, and of a switch over its other steps."""
    places, none = told["place in the interval"], next(iter(told["modes"].values()))["seconds"]
    kinds = {"all": range(interval), "first": [0], "others": range(1, interval - 1), "switch": [interval - 1]}
    for own in told["modes"].values():
        took, own["over none"] = own["seconds"], {}
        for kind, wanted in kinds.items():
            chosen = [i for i, place in enumerate(places) if place in wanted]
            own["over none"][kind] = spread([took[i] for i in chosen], [none[i] for i in chosen])
        switches = [i for i, place in enumerate(places) if place == interval - 1]
        turns = [took[i // interval * interval :][:interval] for i in switches]
        rest = [(sum(turn) - took[i]) / (interval - 1) for i, turn in zip(switches, turns, strict=True)]
        own["switch over other steps"] = spread([took[i] for i in switches], rest)


def show(args: argparse.Namespace, record: dict[str, Any]) -> None:
    told, on_cpu = record["step times"], record["device"] == "cpu"
    goals = GOALS["cpu" if on_cpu else "gpu"]
    print(
        f"{args.random_llama or args.model}, {args.backend} on {record['ranks']} ranks ({record['device']}), "
        f"{args.batch} x {args.length} tokens a rank, γ = {args.active} of {told['layers']} layers, which all change "
        f"every {args.interval} steps, {args.slots} slots, {args.rounds} rounds of {args.interval} steps; "
        f"torch {record['torch']}; load of the machine before: {record['load before']:.1f}"
    )

    def row(name: str, *cells: object) -> None:
        print(f"{name:20}", *(f"{cell:>20}" for cell in cells))

    def ratio(values: list[float]) -> str:
        return "{:.3f} ({:.3f}-{:.3f})".format(*values)

    first = next(iter(told["modes"]))
    row("", "median s", f"over {first}", "goal", "switch over others")
    for name, own in told["modes"].items():
        cells = ratio(own["over none"]["all"]), f"<= {goals[name]}" if name in goals else ""
        row(name, f"{statistics.median(own['seconds']):.3f}", *cells, ratio(own["switch over other steps"]))
    row(f"over {first}, by step", "first of interval", "others", "last, with switch")
    for name, own in told["modes"].items():
        row(name, *(ratio(own["over none"][kind]) for kind in ("first", "others", "switch")))
    row("rank 0, MB and share", "to device a step", "to host a step", "hidden", "states on device", "states on host")
    for name, own in told["modes"].items():
        hidden = "" if own["hidden"] is None else f"{own['hidden']:.1%}"
        hidden += f" (>= {HIDDEN:.0%})" if "stream" in name and not on_cpu else ""
        moved = (f"{own['a step'][key] / 1e6:.1f}" for key in ("to device", "to host"))
        row(name, *moved, hidden, *(f"{own['most state bytes'][key] / 1e6:.1f}" for key in ("device", "host")))
        if not own["same layers as none"]:
            print(f"{name}: other layers than {first}")
    for name, own in record["memory"].items():
        row(name, f"peak {own['peak'] / 1e9:.2f} GB", f"{own['beyond the weights'] / 1e9:.2f} GB beyond the weights")
    if not record["memory"]:
        print("peak device memory: not measured, there is no GPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=4, help="at least 2")
    parser.add_argument("--host-dtype", type=int, metavar="STEPS", help="only compare bfloat16 moments with exact ones")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    world = World.join(datetime.timedelta(minutes=10))
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"
    record: dict[str, Any] = {"arguments": {**vars(args), "json": str(args.json)}, "device": device}
    record |= {"ranks": world.size, "torch": torch.__version__, "load before": load}
    if args.host_dtype:
        record["host_dtype"] = rounded(args, world)
    else:
        record["step times"] = step_times(args, world)
        compare(record["step times"], args.interval)
        record["memory"] = memory(args, world, record["step times"]["layers"])
    if world.is_main:
        if args.host_dtype:
            print(json.dumps(record["host_dtype"], indent=1))
        else:
            show(args, record)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(record, indent=1) + "\n")
    world.leave()


if __name__ == "__main__":
    main()
