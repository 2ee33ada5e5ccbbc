#!/usr/bin/env python
"""How much of the states' way to and from the device is hidden, read from a trace of torch's profiler.

    torchrun --nproc-per-node 2 benchmarks/trace_overlap.py [--mode stream] [--in-backward] [--folder DIR] [--png FILE]

Trains in one mode (see offload.py) until all layers have a state, traces some steps on rank 0, writes the Chrome trace
to the folder (for https://ui.perfetto.dev), and counts in that file. The times of copies:

- on a GPU, "Memcpy HtoD" and "DtoH" on streams that run no kernel, which are the copies' own;
- on the CPU, the ranges "GRASS::h2d (layer)" and "GRASS::d2h (layer)" of the threads that copy.

A moment of a copy is hidden if at that moment the device computes or communicates:

- on a GPU, if a kernel runs on another stream; those of NCCL are communication;
- on the CPU, if a thread that neither copies nor communicates (the main one, which also runs the backward) is in an
  operator of ATen and not in a range "GRASS::wait", or if gloo is in a collective. Autograd's own ranges do not count:
  hooks run, and wait, within them. Python between two operators does not count either, so the share is a lower bound.

Copies in both directions at once count twice, as two copies. The last step that is traced is there for the copies of
the one before to run beside, and its own are not counted.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Interval = tuple[float, float]
"""(begin, end) in microseconds."""
Event = dict[str, Any]
"""Of a Chrome trace."""
STEP = "GRASS step "


@dataclass(frozen=True, slots=True)
class Lanes:
    """What a trace says of who was busy when; sorted intervals without overlap."""

    to_device: list[list[Interval]]
    """For each thread or stream."""
    to_host: list[list[Interval]]
    compute: list[Interval]
    communication: list[Interval]
    updates: list[Interval]
    """Ranges in which layers and roles are updated; on a GPU, in which the updates are queued."""
    steps: list[Interval]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        elif end > begin:
            merged.append((begin, end))
    return merged


def common(ours: Sequence[Interval], theirs: Sequence[Interval]) -> list[Interval]:
    """The intersection of two unions."""
    found, i, j = [], 0, 0
    while i < len(ours) and j < len(theirs):
        begin, end = max(ours[i][0], theirs[j][0]), min(ours[i][1], theirs[j][1])
        if begin < end:
            found.append((begin, end))
        if ours[i][1] < theirs[j][1]:
            i += 1
        else:
            j += 1
    return found


def without(ours: Sequence[Interval], theirs: Sequence[Interval]) -> list[Interval]:
    """What of one union is not in the other."""
    edges = [float("-inf"), *(edge for interval in theirs for edge in interval), float("inf")]
    return common(ours, list(zip(edges[::2], edges[1::2], strict=True)))


def total(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)


def read_lanes(events: Iterable[Event]) -> Lanes:
    """Sorts the events of a trace; see above for what counts as what."""
    events = [event for event in events if event.get("ph") == "X" and "dur" in event]
    on_gpu = any(event.get("cat") in ("kernel", "gpu_memcpy") for event in events)

    def of(wanted: Iterable[Event]) -> list[Interval]:
        return union((event["ts"], event["ts"] + event["dur"]) for event in wanted)

    def by_thread(wanted: Iterable[Event]) -> list[list[Interval]]:
        threads: dict[Any, list[Event]] = defaultdict(list)
        for event in wanted:
            threads[thread_of(event)].append(event)
        return [of(own) for own in threads.values()]

    def named(start: str) -> list[Event]:
        return [e for e in events if e["name"].startswith(start) and e.get("cat") != "gpu_user_annotation"]

    if on_gpu:
        kernels = [event for event in events if event.get("cat") == "kernel"]
        computing = {thread_of(event) for event in kernels}
        copies = [e for e in events if e.get("cat") == "gpu_memcpy" and thread_of(e) not in computing]
        to_device, to_host = ([e for e in copies if f"Memcpy {way}" in e["name"]] for way in ("HtoD", "DtoH"))
        communication = [event for event in kernels if "nccl" in event["name"].lower()]
        compute = of(event for event in kernels if "nccl" not in event["name"].lower())
    else:
        to_device, to_host, communication = named("GRASS::h2d"), named("GRASS::d2h"), named("gloo:")
        others = {thread_of(event) for event in (*to_device, *to_host, *communication)}
        operators = (e for e in events if e.get("cat") == "cpu_op" and e["name"].startswith("aten::"))
        compute = without(of(e for e in operators if thread_of(e) not in others), of(named("GRASS::wait")))
    updates, steps = of(named("GRASS::update (")), sorted(i for e in named(STEP) for i in of([e]))
    return Lanes(by_thread(to_device), by_thread(to_host), compute, of(communication), updates, steps)


def thread_of(event: Event) -> Any:
    """Or stream."""
    return event.get("pid"), event.get("tid")


def overlap(events: Iterable[Event], window: Interval | None = None) -> dict[str, dict[str, float]]:
    """Of the copies in each direction and of both: their seconds, and the shares that are hidden and under compute.

    Args:
        events: "traceEvents" of a Chrome trace.
        window: microseconds that count; all, if left out.
    """
    lanes = read_lanes(events)
    busy = union([*lanes.compute, *lanes.communication])
    told = {}
    for name, threads in (
        ("to device", lanes.to_device),
        ("to host", lanes.to_host),
        ("both", lanes.to_device + lanes.to_host),
    ):
        counted = [common(copies, [window] if window else copies) for copies in threads]
        copying = sum(map(total, counted))
        hidden = sum(total(common(copies, busy)) for copies in counted)
        computing = sum(total(common(copies, lanes.compute)) for copies in counted)
        told[name] = {
            "seconds": copying / 1e6,
            "hidden": hidden / copying if copying else 1.0,
            "under compute": computing / copying if copying else 1.0,
        }
    return told


def draw(lanes: Lanes, step: int, path: Path) -> None:
    """A step, and below it the part in which layers are updated."""
    from matplotlib.figure import Figure

    begin, end = lanes.steps[step]
    rows = {
        "compute": (lanes.compute, "#7aa5d8"),
        "communication": (lanes.communication, "#b9a3d6"),
        "update": (lanes.updates, "#f2a541"),
        "host → device": (union(i for own in lanes.to_device for i in own), "#3d9a50"),
        "device → host": (union(i for own in lanes.to_host for i in own), "#c8483f"),
    }
    copies = union(i for own in lanes.to_device + lanes.to_host for i in own)
    updating = common(lanes.updates, [(begin, end)])
    first, last = updating[0][0], updating[-1][1]
    if last - first > 0.2 * (end - begin):  # within the backward: the first, and the copies that it sets off
        first, last = updating[0]
        last = max([last, *(b for a, b in copies if first < a < updating[min(1, len(updating) - 1)][0])])
    margin = 0.1 * (last - first)
    part = first - margin, last + margin
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    whole, near = figure.subplots(2, 1)
    for axes, (left, right) in ((whole, (begin, end)), (near, part)):
        for at, (intervals, colour) in enumerate(rows.values()):
            boxes = [((a - begin) / 1e3, (b - a) / 1e3) for a, b in common(intervals, [(left, right)])]
            thin = axes is whole and at > 1  # or a copy of a step of seconds could not be seen
            axes.broken_barh(boxes, (at - 0.38, 0.76), color=colour, linewidth=0.8 if thin else 0)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim((left - begin) / 1e3, (right - begin) / 1e3)
        axes.grid(axis="x", color="#e6e9ed")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    whole.axvspan(
        *((edge - begin) / 1e3 for edge in part), facecolor="#f3f0e6", edgecolor="#c9b26b", linewidth=0.8, zorder=0
    )
    whole.set_title("one step of rank 0; the shaded part is drawn larger below", loc="left")
    near.set_xlabel("milliseconds since the step began")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def trace(args: argparse.Namespace, file: Path) -> bool:
    """Trains, and writes the trace; whether this is rank 0."""
    import torch
    from offload_runs import Run, give_all_layers_a_state, random_ids
    from torch.profiler import ProfilerActivity, profile, record_function

    from grass_dist.job.world import World

    world = World.join(datetime.timedelta(minutes=10))
    offload: dict[str, Any] = {"mode": args.mode, "update_in_backward": args.in_backward}
    run = Run(args, world, {**offload, "slots": args.slots} if args.mode == "stream" else offload)
    at = give_all_layers_a_state([run])
    run.train(random_ids(run, at, args.batch, args.length))
    activities = [ProfilerActivity.CPU]
    if world.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    # Private, since there is no public way to trace threads that began before the profiler. Checked on torch 2.13.
    every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with profile(activities=activities, experimental_config=every_thread) as profiler:
        for step in range(at + 1, at + 2 + args.steps):
            with record_function(f"{STEP}{step}"):
                run.train(random_ids(run, step, args.batch, args.length))
        run.grass.states.settle()
    if world.is_main:
        file.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(file))
    main = world.is_main
    world.leave()
    return main


def main() -> None:
    from offload_runs import add_arguments

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--mode", choices=("interval", "stream"), default="stream")
    parser.add_argument("--in-backward", action="store_true", help="update_in_backward")
    parser.add_argument("--steps", type=int, default=4, help="that are counted")
    parser.add_argument("--folder", type=Path, default=Path("runs/trace"))
    parser.add_argument("--png", type=Path, help="a picture of one of the steps")
    parser.add_argument(
        "--json", type=Path, help="where to add the shares to those of other modes and numbers of ranks"
    )
    args = parser.parse_args()
    file = args.folder / "rank0.json.gz"
    if not trace(args, file):
        return
    with gzip.open(file, "rt") as opened:
        events = json.load(opened)["traceEvents"]
    lanes = read_lanes(events)
    told = overlap(events, (lanes.steps[0][0], lanes.steps[-1][0]))
    name = f"{args.mode}{', in backward' * args.in_backward}"
    print(f"{name}, {args.backend}, {args.steps} steps; {file}")
    for way, own in told.items():
        shares = f"hidden {own['hidden']:.1%}, under compute {own['under compute']:.1%}"
        print(f"{way:10} {own['seconds'] / args.steps * 1e3:8.2f} ms a step of copies, {shares}")
    if args.json:
        known = json.loads(args.json.read_text()) if args.json.exists() else {}
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        known[f"{name}, {ranks} rank{'s' * (ranks > 1)}"] = told
        args.json.write_text(json.dumps(known, indent=1) + "\n")
    if args.png:
        draw(lanes, len(lanes.steps) // 2 - 1, args.png)


if __name__ == "__main__":
    main()
