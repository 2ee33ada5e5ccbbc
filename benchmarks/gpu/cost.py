"""Tokens a second and memory of a 1.5B Llama under FSDP2: full fine-tuning and GRASS in turns, and a trace."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.gpu import training
from benchmarks.gpu.told import Told
from benchmarks.trace_overlap import common, overlap, total, union

INTERVAL = 4
ROUNDS = {1: 3, 8: 2}
"""By sequences a step."""
A_VARIANT = 12
"""Seconds without which none is begun."""
TRACED = ("interval", "stream")
SHAPE = {"layers": 24, "width": 2048, "inner": 5632, "vocabulary": 32000, "attention": "sdpa"}
"""1.36 billion parameters."""
ACTIVE = 4


class Full:
    """Full fine-tuning: torch's fused AdamW over the bf16 weights, without masters."""

    def __init__(self, told: Told) -> None:
        self.told, self.model = told, training.shard(told, training.llama(told, **SHAPE))
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.clip: Callable[[], object] | None = lambda: nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def step(self, ids: torch.Tensor) -> None:
        training.loss(self.model, ids).backward()
        self.update()

    def update(self) -> None:
        if self.clip:
            self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Grass(Full):
    """GRASS with fp32 masters: 4 of 24 layers, switched every 4 steps, and all roles or none."""

    def __init__(self, told: Told, mode: str, roles: bool) -> None:
        self.told, self.model = told, training.shard(told, training.llama(told, **SHAPE))
        active: dict[str, Any] = {"active_layers": 2 if told.tiny else ACTIVE}
        if not roles:
            active["always_active"] = []
        self.optimizer = training.grass(self.model, training.MODES[mode], {"lr": 1e-5, "fused": True}, **active)
        backward = training.MODES[mode].get("update_in_backward")
        self.clip = None if backward else lambda: self.optimizer.clip_grad_norm_(1.0)


def variants(told: Told) -> dict[str, Callable[[], Full]]:
    """The most decisive first; the last ones are left out where the time is over."""
    layers_only = "interval, layers only"
    order = ["none", "interval", layers_only, "stream", "stream, in backward"]

    def of(name: str) -> Callable[[], Full]:
        return lambda: Grass(told, name.removesuffix(", layers only"), roles=name != layers_only)

    return {name: of(name) for name in order}


def show(told: Told) -> None:
    training.join_alone(told)
    full = Full(told)
    ratios: dict[str, dict[str, float]] = {}
    warm(full)
    for name, make in variants(told).items():
        if told.seconds_left() < A_VARIANT:
            told.left_out(name, "there was no time left")
            continue
        told.attempt(name, lambda name=name, make=make: side_by_side(told, name, make(), full, ratios))
        training.free(told)
    none = ratios.get("none", {})
    for name, own in ratios.items():
        if name != "none":
            told.figure(f"{name} over none", {rows: round(own[rows] / none[rows], 4) for rows in own if rows in none})


def warm(run: Full) -> None:
    """Every layer has had a state, so that nothing is made while it is timed."""
    cycle = 1 if not isinstance(run, Grass) else len(run.model.model.layers) // run.optimizer.grass.config.active_layers
    for step in range(cycle * INTERVAL + 1):
        run.step(training.batch(run.told, run.model, step, rows=1, length=64))


def side_by_side(told: Told, name: str, run: Full, full: Full, ratios: dict[str, dict[str, float]]) -> None:
    """Takes turns with full fine-tuning, an interval at a time, and traces an interval of its own."""
    warm(run)
    reset_peak(told)
    figures: dict[str, Any] = {}
    for rows, rounds in ROUNDS.items():
        seconds: dict[str, list[float]] = {"own": [], "full": []}
        for number in range(rounds + 1):
            for key, turn in (("own", run), ("full", full)):
                took = interval(turn, rows, number)
                if number:  # the first has its kernels chosen
                    seconds[key].append(took)
        tokens = INTERVAL * rows * (12 if told.tiny else 1024)
        ratio = statistics.median(a / b for a, b in zip(seconds["full"], seconds["own"], strict=True))
        ratios.setdefault(name, {})[f"batch {rows}"] = ratio
        figures[f"batch {rows}"] = {
            "tokens a second": round(tokens / statistics.median(seconds["own"])),
            "of full fine-tuning": round(tokens / statistics.median(seconds["full"])),
            "over full fine-tuning": round(ratio, 4),
        }
    if not told.tiny:
        reset_peak(told)
        resting = torch.cuda.memory_allocated()
        interval(run, 1, 0)
        figures["GB beside what rests, batch 1"] = round((torch.cuda.max_memory_allocated() - resting) / 1e9, 2)
    figures["GB of states on the device"] = round(run.optimizer.state_bytes / 1e9, 3)
    figures["GB of states on the host"] = round(run.optimizer.host_state_bytes / 1e9, 3)
    figures["hidden, as the optimizer counts it"] = round(run.optimizer.grass.traffic.hidden, 4)
    told.figure(name, figures)
    if name in TRACED:
        told.figure(name, figures | traced(told, run))
    run.optimizer.detach()


def reset_peak(told: Told) -> None:
    if not told.tiny:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def interval(run: Full, rows: int, number: int) -> float:
    """Seconds of an interval, with its switch."""
    batches = [
        training.batch(run.told, run.model, INTERVAL * number + step, rows=rows, length=1024)
        for step in range(INTERVAL)
    ]
    training.synchronize(run.told)
    began = time.perf_counter()
    for ids in batches:
        run.step(ids)
    training.synchronize(run.told)
    return time.perf_counter() - began


def traced(told: Told, run: Full) -> dict[str, Any]:
    """Copies beside the compute, launches a step, and how long the GPU is idle in one clipping and update."""
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU, *([] if told.tiny else [ProfilerActivity.CUDA])]
    ids = training.batch(told, run.model, 0, rows=1, length=1024)
    with profile(activities=activities) as profiler:
        for _ in range(INTERVAL):
            run.step(ids)
        training.synchronize(told)
        training.loss(run.model, ids).backward()
        training.synchronize(told)
        with record_function("GRASS last update"):
            run.update()
            training.synchronize(told)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    return of_trace(events)


def of_trace(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What a trace says; kernels and launches are of a GPU only."""
    ranges = [e for e in events if e.get("ph") == "X" and "dur" in e]
    last = next(e for e in ranges if e["name"] == "GRASS last update" and e.get("cat") != "gpu_user_annotation")
    window = (last["ts"], last["ts"] + last["dur"])
    kernels = [e for e in ranges if e.get("cat") == "kernel"]
    busy = union((e["ts"], e["ts"] + e["dur"]) for e in kernels)
    copies = overlap(events, (float("-inf"), window[0]))["both"]
    told: dict[str, Any] = {"share of copies under kernels": round(copies["under compute"], 4)}
    if kernels:
        idle = 1 - total(common(busy, [window])) / (window[1] - window[0])
        before = sum(e["ts"] < window[0] for e in kernels)
        told |= {"GPU idle in an update": round(idle, 4), "kernels a step": round(before / (INTERVAL + 1))}
    return told
