"""Tables in Markdown, from the results as the scripts write them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from scipy import stats

from benchmarks import throughput
from benchmarks.peers import __main__ as peers
from benchmarks.peers.methods import METHODS

Rows = Iterator[str]


def rows(head: Iterable[str], body: Iterable[Iterable[object]]) -> Rows:
    head = list(head)
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    for cells in body:
        yield "| " + " | ".join(map(str, cells)) + " |"


def quartiles(over: list[float], under: list[float]) -> tuple[float, float, float]:
    """Low, median and high of the ratios within a round."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(over, under, strict=True)], n=4)
    return low, middle, high


def middle(values: list[float]) -> str:
    """Of a result's [median, low, high]."""
    return "{:.3f} ({:.3f}–{:.3f})".format(*values)


def step_time(record: dict[str, Any]) -> Rows:
    seconds = record["seconds"]

    def body() -> Iterator[list[str]]:
        for name, took in seconds.items():
            low, half, high = quartiles(took, seconds["full fine-tuning"])
            ratio = ["1", ""] if name == "full fine-tuning" else [f"{half:.3f}", f"{low:.3f}–{high:.3f}"]
            yield [name, f"{statistics.median(took):.2f}", *ratio]

    return rows(["", "median s", "over full fine-tuning", "quartiles"], body())


def over_bare_loop(record: dict[str, Any], kind: str) -> str:
    low, half, high = quartiles(record["seconds"][f"GRASS, {kind}"], record["seconds"][f"bare loop, {kind}"])
    return f"{half:.3f} ({low:.3f}–{high:.3f})"


def offload(record: dict[str, Any]) -> Rows:
    def body() -> Iterator[list[str]]:
        for name, own in record["step times"]["modes"].items():
            seconds = f"{statistics.median(own['seconds']):.2f}"
            kinds = [middle(own["over none"][kind]) if name != "none" else "1" for kind in ("all", "first", "switch")]
            yield [name, seconds, *kinds, middle(own["switch over other steps"])]

    head = [
        "",
        "median s",
        "over none",
        "first step of an interval",
        "last, with the switch",
        "switch over other steps",
    ]
    return rows(head, body())


def moved(record: dict[str, Any]) -> Rows:
    def body() -> Iterator[list[str]]:
        for name, own in record["step times"]["modes"].items():
            step, most = own["a step"], own["most state bytes"]
            hidden = "" if own["hidden"] is None else f"{own['hidden']:.1%}"
            times = [f"{step[key] * 1e3:.1f}" for key in ("copies", "waited")]
            held = [f"{most[key] / 1e6:.1f}" for key in ("device", "host")]
            yield [name, f"{step['to device'] / 1e6:.1f}", *times, hidden, *held]

    head = ["", "MB a step, each way", "ms a step of copies", "of which waited for", "hidden"]
    return rows([*head, "MB of states on the device", "in host memory"], body())


def trace_overlap(record: dict[str, Any]) -> Rows:
    keys = ("both", "to device", "to host")
    body = ([name, *(f"{own[key]['hidden']:.1%}" for key in keys)] for name, own in record.items())
    return rows(["", "both directions", "host to device", "device to host"], body)


def checkpoint(record: dict[str, Any]) -> Rows:
    def body() -> Iterator[list[str]]:
        for name, own in record["costs"]["saves"].items():
            low, half, high = own["whole cost in steps"]
            stall = [f"{own['stall seconds']:.3f} s", f"{own['stall over step']:.3f}"]
            yield [name, *stall, f"{own['writing seconds']:.1f} s", f"{half:.2f} ({low:.2f}–{high:.2f})"]

    return rows(["", "training waits", "over a step", "written in", "costs in all, in steps"], body())


def slow_link(record: dict[str, Any]) -> Rows:
    names = {"fsdp2": "FSDP2", "hsdp": "HSDP, a replica on each host", "zero2": "ZeRO-2"}

    def body() -> Iterator[list[str]]:
        for key, name in names.items():
            full, grass = record["runs"][f"{key} full"], record["runs"][f"{key} grass"]
            shares = [f"{grass[k] / full[k]:.3f}" for k in ("seconds", "sent_in_step", "sent")]
            yield [name, f"{full['sent'] / 1e6:.1f}", f"{full['seconds']:.2f} s", f"{grass['seconds']:.2f} s", *shares]

    head = ["", "full: MB of gradients a step", "full", "GRASS", "time over full"]
    return rows([*head, "bytes of a step over full", "bytes of gradients over full"], body())


def versus(trainings: list[dict[str, Any]], one: str, other: str) -> str:
    """Difference of the held-out losses, seed by seed, with its interval of 95 % by Student's t."""
    losses = [{r["seed"]: r["held_out_loss"] for r in peers.at_best(trainings, method)} for method in (one, other)]
    return difference([losses[0][seed] - losses[1][seed] for seed in sorted(losses[0].keys() & losses[1].keys())])


def difference(apart: list[float]) -> str:
    """Mean with its interval of 95 % by Student's t."""
    if len(apart) < 2:
        return "not known yet"
    half = float(stats.t.ppf(0.975, len(apart) - 1)) * statistics.stdev(apart) / len(apart) ** 0.5
    mean = statistics.mean(apart)
    return f"{mean:+.4f} ± {half:.4f} ({len(apart)} seeds; {'within' if abs(mean) < half else 'beyond'} chance)"


def tried(others: list[dict[str, Any]], trainings: list[dict[str, Any]]) -> Rows:
    """Settings other than those of the comparison's GRASS, over the same seeds."""
    own = {r["seed"]: r for r in peers.at_best(trainings, "grass")}
    grouped: dict[str, list[dict[str, Any]]] = {}
    for run in others:
        known = own[run["seed"]]["settings"]
        changed = [f"{k} = {v}" for k, v in run["settings"].items() if k in known and known[k] != v]
        grouped.setdefault(", ".join(changed), []).append(run)

    def body() -> Iterator[list[str]]:
        for changed, runs in grouped.items():
            mean = statistics.mean(r["held_out_loss"] for r in runs)
            apart = difference([r["held_out_loss"] - own[r["seed"]]["held_out_loss"] for r in runs])
            yield [changed, f"{mean:.4f}", apart]

    return rows(["", "held-out loss", "minus that of GRASS with the same seeds"], body())


def on_two_ranks(others: list[dict[str, Any]], trainings: list[dict[str, Any]]) -> Rows:
    """The same training on two ranks beside that on one."""

    def body() -> Iterator[list[str]]:
        for run in sorted(others, key=lambda run: list(METHODS).index(run["method"])):
            alone = next(r for r in trainings if all(r[k] == run[k] for k in ("method", "lr", "seed")))
            apart = [abs(a - b) for a, b in zip(run["losses"], alone["losses"], strict=True)]
            losses = [f"{r['held_out_loss']:.4f}" for r in (alone, run)]
            yield [run["method"], *losses, f"{max(apart[:5]):.4f}", f"{max(apart):.4f}"]

    head = ["", "held-out loss, 1 rank", "2 ranks", "the first 5 losses differ by at most", "all"]
    return rows(head, body())


OF_PART: dict[str, Callable[[dict[str, Any]], Rows]] = {
    "throughput": throughput.table,
    "step_time": step_time,
    "offload": offload,
    "trace_overlap": trace_overlap,
    "checkpoint": checkpoint,
}
"""Those that may have been run on a GPU."""


def machine(told: dict[str, Any]) -> str:
    """A clause: what it ran on."""
    hardware = ", ".join(told["gpus"]) or f"{told['cores']} cores of {told['cpu']}"
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    return f"{told['date']}, {hardware}, {told['memory_gb']} GB; Python {told['python']}, {versions}"


def machines(known: dict[str, Any]) -> Rows:
    grouped: dict[str, list[str]] = {}
    for part, told in known.items():
        grouped.setdefault(machine(told), []).append(part)
    return rows(["results", "made on"], ([", ".join(names), where] for where, names in grouped.items()))
