"""Finds which method fits, which settings to take, and what would make it fit where nothing does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from grass_dist.config import GrassConfig
from grass_dist.errors import ConfigError
from grass_dist.plan.cost import StepBytes, StepTime, step_bytes, step_time
from grass_dist.plan.memory import Memory, host_bytes, memory_of, weights_of
from grass_dist.plan.runs import Method, PlannedRun, methods_of
from grass_dist.plan.shape import ModelShape
from grass_dist.plan.speeds import Speeds
from grass_dist.terminal import size

USUAL_GAMMA = GrassConfig().active_layers
"""Layers that train at a time where more would fit."""
MOST_GPUS = 4096
SHORTEST = 128
"""Tokens below which no shorter sequence is advised."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Holds what one method takes in one planned run."""

    run: PlannedRun
    method: Method
    memory: Memory
    host_bytes: float
    """Pinned memory of a host."""
    moved: StepBytes
    time: StepTime
    host_limit: float | None = None

    @property
    def fits(self) -> bool:
        host_fits = self.host_limit is None or self.host_bytes <= self.host_limit
        return self.memory.total <= self.run.gpu_bytes and host_fits


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen settings, every method under them, and the one that is recommended."""

    run: PlannedRun
    rows: tuple[Estimate, ...]
    recommended: Estimate | None
    """None where no γ fits."""
    sentences: tuple[str, ...]


def estimate(
    shape: ModelShape, run: PlannedRun, method: Method, speeds: Speeds, memory: Memory | None = None
) -> Estimate:
    """Computes what a method takes.

    Args:
        memory: as it was simulated; None takes the closed form.
    """
    return Estimate(
        run,
        method,
        memory or memory_of(shape, run, method),
        host_bytes(shape, run, method),
        step_bytes(shape, run, method),
        step_time(shape, run, method, speeds),
        speeds.pinnable_bytes,
    )


def check_weights(shape: ModelShape, run: PlannedRun) -> None:
    """Refuses a run whose weights cannot fit.

    Raises:
        ConfigError: the weights alone are more than a GPU has.
    """
    if (weights := weights_of(shape, run, Method("grass", 1, run.roles))) < run.gpu_bytes:
        return
    whole = shape.numel * run.weight_bytes
    needed = int(whole // run.gpu_bytes) + 1
    if run.backend in ("ddp", "single", "zero1", "zero2") and needed <= run.gpus:
        fix = f"use fsdp2 or zero3, which divide them, {size(whole / run.gpus)} to each GPU"
    else:
        fix = f"use at least {max(needed, 2)} GPUs under fsdp2 or zero3, or GPUs of more than {size(weights)}"
    if run.backend in ("single", "ddp") and run.weights == "resident":
        fix += ", or --weights host"
    problem = f"the weights alone take {size(weights)} on each of {run.gpus} GPUs under {run.backend}"
    raise ConfigError("--gpu-memory", size(run.gpu_bytes), problem, fix)


def candidates(run: PlannedRun, *, offload: bool, checkpointing: bool) -> list[PlannedRun]:
    """Returns the run with each setting that the user left open; those that cost least time come first."""
    modes = ("interval", "stream") if offload else (run.offload,)
    recompute = (False, True) if checkpointing else (run.checkpointing,)
    found = [replace(run, offload=mode, checkpointing=again) for again in recompute for mode in modes]
    if offload and run.weights == "resident":  # without host memory, if that is what is short
        found += [replace(run, offload="none", checkpointing=again) for again in recompute]
    return found


def choose(shape: ModelShape, runs: Sequence[PlannedRun], speeds: Speeds) -> tuple[PlannedRun, Method | None]:
    """Returns the first run in which GRASS fits with the usual γ, else the one in which most layers fit, if any do.

    Args:
        runs: as `candidates` gives them.
    """
    best: tuple[int, PlannedRun] | None = None
    wanted = min(USUAL_GAMMA, shape.num_layers)
    for run in runs:
        methods = [method for method in methods_of(shape, run) if method.name == "grass"]
        fit = [method.active_layers for method in methods if estimate(shape, run, method, speeds).fits]
        if (most := max(fit, default=0)) >= wanted:
            return run, _grass(shape, run, wanted)
        if most and (best is None or most > best[0]):
            best = most, run
    return (best[1], _grass(shape, best[1], best[0])) if best else (runs[0], None)


def nearest_to_fitting(shape: ModelShape, runs: Sequence[PlannedRun], speeds: Speeds) -> Estimate:
    """Returns the run that lacks least memory, of all settings that the user left open."""
    rows = [estimate(shape, run, _grass(shape, run, 1), speeds) for run in runs]
    return min(rows, key=lambda row: (row.host_limit is not None and row.host_bytes > row.host_limit, row.memory.total))


def remedies(shape: ModelShape, near: Estimate, speeds: Speeds) -> list[str]:
    """Says what would make the nearest one fit: each change alone, else as many together as it takes."""
    run, names = near.run, list[str]()
    changes = _changes(run, causal=shape.causal)

    def fitting(options: Iterable[tuple[str, PlannedRun]]) -> list[str]:
        """Says what GRASS with one layer takes under the first option under which it fits."""
        for name, changed in options:
            row = estimate(shape, changed, _grass(shape, changed, 1), speeds)
            if row.fits:
                return [f"{' and '.join((*names, name))} ({size(row.memory.total)} a GPU)"]
        return []

    alone = [[(name, replace(run, **values))] for name, values in changes.items()]
    if told := [text for options in (*alone, _shorter(run), _more_gpus(run)) for text in fitting(options)]:
        return [f"It would fit with {', or '.join(told)}."]
    for name, values in changes.items():
        run = replace(run, **values)
        if told := fitting([(name, run)]):
            return [f"It would fit with {told[0]}."]
        names.append(name)
    for options in (_shorter(run), _more_gpus(run)):
        if told := fitting(options):
            return [f"It would fit with {told[0]}."]
    least = estimate(shape, replace(run, seq_len=min(run.seq_len, SHORTEST)), _grass(shape, run, 1), speeds)
    tried = f"Nothing that was tried, up to {MOST_GPUS} GPUs, would make it fit"
    return [f"{tried}; the least was {size(least.memory.total)} a GPU."]


def _changes(run: PlannedRun, *, causal: bool) -> dict[str, dict[str, Any]]:
    """Returns the fields of each change of options that may save memory and is not made yet, by its options."""
    changes: list[tuple[bool, str, dict[str, Any]]] = [
        (run.backend in ("ddp", "single") and run.gpus > 1, "--backend fsdp2", {"backend": "fsdp2"}),
        (run.backend in ("zero1", "zero2") and run.gpus > 1, "--backend zero3", {"backend": "zero3"}),
        (run.backend in ("single", "ddp", "zero3") and run.weights == "resident", "--weights host", _REST),
        (run.backend == "hsdp", "--backend fsdp2", {"backend": "fsdp2", "replicate": 1}),
        (run.offload != "stream", "--offload stream", {"offload": "stream"}),
        (not run.checkpointing, "--checkpointing", {"checkpointing": True}),
        (run.logits == "whole" and causal, "--logits chunked", {"logits": "chunked"}),
        (run.micro_batch > 1, "--micro-batch 1", {"micro_batch": 1}),
        (run.accumulation > 1, "--accumulation 1", {"accumulation": 1}),
        ("embeddings" in run.roles, "--always-active none", {"roles": ()}),
    ]
    return {name: values for saves, name, values in changes if saves}


_REST: dict[str, Any] = {"weights": "host"}


def _shorter(run: PlannedRun) -> Iterator[tuple[str, PlannedRun]]:
    """Gives the half, the quarter and so on of the sequence."""
    seq_len = run.seq_len // 2
    while seq_len >= SHORTEST:
        yield f"--seq-len {seq_len}", replace(run, seq_len=seq_len)
        seq_len //= 2


def _more_gpus(run: PlannedRun) -> Iterator[tuple[str, PlannedRun]]:
    if run.backend == "single":
        run = replace(run, backend="fsdp2")
    gpus = run.gpus
    while gpus < MOST_GPUS:
        gpus *= 2
        yield f"--gpus {gpus} --backend {run.backend}", run.on(gpus)


def _grass(shape: ModelShape, run: PlannedRun, gamma: int) -> Method:
    return Method("grass", min(gamma, shape.num_layers), run.roles)
