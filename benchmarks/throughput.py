"""Step time of every method over full fine-tuning under the same wrapper, side by side.

    torchrun --nproc-per-node 2 -m benchmarks.throughput [--rounds 8] [--json FILE]
    torchrun --nproc-per-node 2 -m benchmarks.throughput --backends zero3 --methods full lora --json FILE  # adds
    torchrun --nproc-per-node 1 -m benchmarks.throughput --random-llama 1.5B --batch 4 --length 1024    # on a GPU

Under each wrapper in turn all methods (or ``--together`` of them, where memory is short) and full fine-tuning train
the same model on the same tokens and take turns step by step, in an order that rotates. A step's time is that of the
slowest rank; ratios are formed within a round, and medians are shown with quartiles. Layers switch every ``--interval``
steps, which is in the figures. What a method refuses is shown as it says it. "States on the host" are DeepSpeed's
ZeRO-Offload (CPUAdam) and torchao's CPUOffloadOptimizer.
On GPUs weights are bfloat16; all but the stock AdamW of FSDP2 and DDP then keep float32 masters.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import statistics
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.engines import BACKENDS, METHODS, Trained
from benchmarks.limits import by_layers, with_head
from grass_dist.backends.zero.jit import spare_the_compiler
from grass_dist.job.world import World

WARM_UP = 3
OF_ONE_RUN = ("backends", "methods", "json")
"""Arguments in which runs may differ whose results are put together."""


def tokens(args: argparse.Namespace, world: World, vocabulary: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + world.rank)
    return torch.randint(0, vocabulary, (args.batch, args.length), generator=generator).to(world.device)


def timed(trained: Trained, ids: torch.Tensor, world: World) -> float:
    dist.barrier(group=world.patient)
    began = time.perf_counter()
    trained.step(ids)
    seconds = torch.tensor(time.perf_counter() - began)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=world.patient)
    return seconds.item()


def start(method: str, backend: str, args: argparse.Namespace, world: World) -> Trained | str:
    """It after its first steps, or why it does not train."""
    try:
        trained = world.together(lambda: Trained(method, backend, args, world))
        for step in range(WARM_UP):
            ids = tokens(args, world, trained.vocabulary, step)
            world.together(functools.partial(trained.step, ids))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return trained


def side_by_side(backend: str, args: argparse.Namespace, world: World) -> dict[str, Any]:
    """Of one wrapper: what `turns` tells of all methods, full fine-tuning in every one of its turns."""
    others = [method for method in args.methods if method != "full"]
    told: dict[str, Any] = {key: {} for key in ("seconds", "full", "draws", "limits", "refused")}
    for first in range(0, len(others), args.together):
        for key, found in turns(["full", *others[first : first + args.together]], backend, args, world).items():
            told[key] |= found
    return told


def turns(methods: list[str], backend: str, args: argparse.Namespace, world: World) -> dict[str, dict[str, Any]]:
    """By method: seconds of each round and those of full fine-tuning, which steps drew, limits, or why it refuses."""
    began = {method: start(method, backend, args, world) for method in methods}
    runs = {method: run for method, run in began.items() if isinstance(run, Trained)}
    if "full" not in runs:  # nothing to compare with: as where DeepSpeed is not installed
        for run in runs.values():
            run.free()
        runs = {}
    seconds: dict[str, list[float]] = {method: [] for method in runs}
    draws: dict[str, list[bool]] = {method: [] for method in runs if runs[method].grass is not None}
    limits: dict[str, list[tuple[float, float]]] = {method: [] for method in draws}
    names = list(runs)
    for number in range(args.rounds if names else 0):
        for method in names[number % len(names) :] + names[: number % len(names)]:
            run, active = runs[method], runs[method].active
            took = timed(run, tokens(args, world, run.vocabulary, WARM_UP + number), world)
            seconds[method].append(took)
            if active is not None:
                roles = method != "grass-layers"
                draws[method].append(run.active != active)
                limits[method].append((with_head(run.layers, active, roles), by_layers(run.layers, active, roles)))
    for run in runs.values():
        run.free()
    return {
        "seconds": seconds,
        "full": dict.fromkeys(runs, seconds.get("full")),
        "draws": draws,
        "limits": {
            method: [statistics.mean(each) for each in zip(*found, strict=True)] for method, found in limits.items()
        },
        "refused": {method: said for method, said in began.items() if isinstance(said, str)},
    }


def over_full(told: dict[str, Any], method: str) -> tuple[float, float, float]:
    """Median and quartiles."""
    pairs = zip(told["seconds"][method], told["full"][method], strict=True)
    low, middle, high = statistics.quantiles([own / full for own, full in pairs], n=4)
    return middle, low, high


def table(record: dict[str, Any]) -> Iterator[str]:
    """Markdown."""
    wrappers = record["wrappers"]
    yield "| over full fine-tuning | " + " | ".join(wrappers) + " | limit, layers alone | limit, with head |"
    yield "|---" * (len(wrappers) + 3) + "|"
    for method in METHODS:
        if not any(method in told[key] for told in wrappers.values() for key in ("seconds", "refused")):
            continue
        limits = next((told["limits"][method] for told in wrappers.values() if method in told["limits"]), None)
        shown = [f"{limits[1]:.3f}", f"{limits[0]:.3f}"] if limits else ["", ""]
        cells = []
        for told in wrappers.values():
            if method in told["seconds"]:
                middle, low, high = over_full(told, method)
                cells.append(f"{middle:.3f} ({low:.3f}–{high:.3f})" if method != "full" else "1")
            else:
                cells.append("refused" if method in told["refused"] else "")
        yield "| " + " | ".join([METHODS[method], *cells, *shown]) + " |"
    took = [told["seconds"].get("full") for told in wrappers.values()]
    full = [f"{statistics.median(seconds):.2f} s" if seconds else "" for seconds in took]
    yield "| " + " | ".join(["a step of full fine-tuning", *full, "", ""]) + " |"
    switch = [f"{ratio:.3f}" if (ratio := draw_cost(told)) else "" for told in wrappers.values()]
    yield "| " + " | ".join(["GRASS: steps that draw over others", *switch, "", ""]) + " |"


def draw_cost(told: dict[str, Any]) -> float | None:
    pairs = list(zip(told["seconds"].get("grass", ()), told["draws"].get("grass", ()), strict=True))
    drew, other = ([took for took, draws in pairs if draws == wanted] for wanted in (True, False))
    return statistics.median(drew) / statistics.median(other) if drew and other else None


def wrappers_of(known: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Those of a result that was made on the same device with the same arguments, so that a run can add to it."""

    def compared(of: dict[str, Any]) -> tuple[object, ...]:
        arguments = {key: str(value) for key, value in of["arguments"].items() if key not in OF_ONE_RUN}
        return arguments, of["ranks"], of["device"], of["torch"]

    return known["wrappers"] if compared(known) == compared(record) else {}


def with_methods(known: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """What is known of a wrapper, with what a run tells of some methods in place of it."""
    new = {method for found in told.values() for method in found}
    return {
        key: {method: it for method, it in known.get(key, {}).items() if method not in new} | found
        for key, found in told.items()
    }


def refusals(record: dict[str, Any]) -> Iterator[str]:
    for backend, told in record["wrappers"].items():
        for method, said in told["refused"].items():
            yield f"{METHODS[method]} under {backend}: {said}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="packaged:smollm2-135m")
    parser.add_argument("--random-llama", metavar="SIZE", help="a Llama of this size instead, e.g. 1.5B")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--together", type=int, default=len(METHODS), help="methods in memory beside full fine-tuning")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--active", type=int, default=4, help="γ")
    parser.add_argument("--interval", type=int, default=4, help="steps between two switches")
    parser.add_argument("--batch", type=int, default=1, help="sequences a rank")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if "full" not in args.methods:
        parser.error("--methods must have full, which all others are measured against")
    world = World.join(datetime.timedelta(minutes=2))
    if any(backend.startswith("zero") for backend in args.backends) and find_spec("deepspeed") is not None:
        spare_the_compiler({})  # without DeepSpeed each of its wrappers says so for itself
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
    record: dict[str, Any] = {"arguments": {**vars(args), "json": str(args.json)}, "ranks": world.size}
    record |= {"device": device, "torch": torch.__version__, "wrappers": {}}
    if args.json and args.json.exists():
        record["wrappers"] |= wrappers_of(json.loads(args.json.read_text()), record)
    for backend in args.backends:
        told = side_by_side(backend, args, world)
        record["wrappers"][backend] = with_methods(record["wrappers"].get(backend, {}), told)
        if world.is_main:
            print(f"{backend}: done", flush=True)
            if args.json:
                args.json.write_text(json.dumps(record, indent=1) + "\n")
    if world.is_main:
        print(f"{args.random_llama or args.model}, {world.size} ranks ({device}), {args.batch} x {args.length} tokens "
              f"a rank, γ = {args.active}, {args.rounds} rounds; torch {torch.__version__}")  # fmt: skip
        print("\n".join([*refusals(record), *table(record)]))
    world.leave()


if __name__ == "__main__":
    main()
