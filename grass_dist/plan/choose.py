"""Finds which method fits, which settings to take, and what would make it fit where nothing does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from grass_dist.config import GrassConfig
from grass_dist.errors import ConfigError
from grass_dist.plan.cost import StepBytes, StepTime, step_bytes, step_time
from grass_dist.plan.memory import Memory, host_bytes, memory_of, weights_of
from grass_dist.plan.runs import Method, PlannedRun, methods_of
from grass_dist.plan.shape import ModelShape
from grass_dist.plan.speeds import Speeds

USUAL_GAMMA = GrassConfig().active_layers
"""Layers that train at a time where more would fit."""
MOST_GPUS = 4096
SHORTEST = 128
"""Tokens below which no shorter sequence is advised."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one method takes in one planned run."""

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
    rows: tuple[Row, ...]
    recommended: Row | None
    """None where no γ fits."""
    sentences: tuple[str, ...]


def row_of(shape: ModelShape, run: PlannedRun, method: Method, speeds: Speeds, memory: Memory | None = None) -> Row:
    """Computes what a method takes.

    Args:
        memory: as it was simulated; None takes the closed form.
    """
    return Row(
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
    if (weights := weights_of(shape, run)) < run.gpu_bytes:
        return
    whole = shape.numel * run.weight_bytes
    needed = int(whole // run.gpu_bytes) + 1
    if run.backend in ("ddp", "single", "zero1", "zero2") and needed <= run.gpus:
        fix = f"use fsdp2 or zero3, which divide them, {gb(whole / run.gpus)} to each GPU"
    else:
        fix = f"use at least {max(needed, 2)} GPUs under fsdp2 or zero3, or GPUs of more than {gb(weights)}"
    problem = f"the weights alone take {gb(weights)} on each of {run.gpus} GPUs under {run.backend}"
    raise ConfigError("--gpu-memory", gb(run.gpu_bytes), problem, fix)


def candidates(run: PlannedRun, *, offload: bool, checkpointing: bool) -> list[PlannedRun]:
    """Returns the run with each setting that the user left open; those that cost least time come first."""
    modes = ("interval", "stream") if offload else (run.offload,)
    recompute = (False, True) if checkpointing else (run.checkpointing,)
    found = [replace(run, offload=mode, checkpointing=again) for again in recompute for mode in modes]
    if offload:  # without host memory, if that is what is short
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
        fit = [r.method.active_layers for r in grass_rows(shape, run, speeds) if r.fits]
        if (most := max(fit, default=0)) >= wanted:
            return run, _grass(shape, run, wanted)
        if most and (best is None or most > best[0]):
            best = most, run
    return (best[1], _grass(shape, best[1], best[0])) if best else (runs[0], None)


def grass_rows(shape: ModelShape, run: PlannedRun, speeds: Speeds) -> list[Row]:
    """Returns what GRASS takes with each γ."""
    return [row_of(shape, run, method, speeds) for method in methods_of(shape, run) if method.name == "grass"]


def nearest_to_fitting(shape: ModelShape, runs: Sequence[PlannedRun], speeds: Speeds) -> Row:
    """Returns the run that lacks least memory, of all settings that the user left open."""
    rows = [row_of(shape, run, _grass(shape, run, 1), speeds) for run in runs]
    return min(rows, key=lambda row: (row.host_limit is not None and row.host_bytes > row.host_limit, row.memory.total))


def remedies(shape: ModelShape, near: Row, speeds: Speeds) -> list[str]:
    """Says what would make the nearest one fit: each change alone, else as many together as it takes."""
    changes = list(_changes(near.run))
    alone = [_told(shape, name, change(near.run), speeds) for name, change in changes]
    shorter = _shorter(shape, near.run, speeds)
    if told := [sentence for sentence in (*alone, shorter, _more_gpus(shape, near.run, speeds)) if sentence]:
        return [f"It would fit with {', or '.join(told)}."]
    run, names = near.run, []
    for name, change in changes:
        run, names = change(run), [*names, name]
        if together := _told(shape, " and ".join(names), run, speeds):
            return [f"It would fit with {together}."]
    for more in (_shorter, _more_gpus):
        if together := more(shape, run, speeds):
            return [f"It would fit with {' and '.join((*names, together))}."]
    least = row_of(shape, replace(run, seq_len=min(run.seq_len, SHORTEST)), _grass(shape, run, 1), speeds)
    tried = f"Nothing that was tried, up to {MOST_GPUS} GPUs, would make it fit"
    return [f"{tried}; the least was {gb(least.memory.total)} a GPU."]


def gb(nbytes: float) -> str:
    """Writes bytes in decimal units, e.g. 13.5 GB."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}" if nbytes < 999.5 * size or unit == "TB" else f"{nbytes / size:.0f} GB"
    return f"{nbytes:.0f} B"


def _changes(run: PlannedRun) -> Iterator[tuple[str, Callable[[PlannedRun], PlannedRun]]]:
    if run.backend in ("ddp", "single") and run.gpus > 1:
        yield "--backend fsdp2", lambda j: replace(j, backend="fsdp2")
    if run.backend in ("zero1", "zero2") and run.gpus > 1:
        yield "--backend zero3", lambda j: replace(j, backend="zero3")
    if run.backend == "hsdp":
        yield "--backend fsdp2", lambda j: replace(j, backend="fsdp2", replicate=1)
    if run.offload != "stream":
        yield "--offload stream", lambda j: replace(j, offload="stream")
    if not run.checkpointing:
        yield "--checkpointing", lambda j: replace(j, checkpointing=True)
    if run.micro_batch > 1:
        yield "--micro-batch 1", lambda j: replace(j, micro_batch=1)
    if run.accumulation > 1:
        yield "--accumulation 1", lambda j: replace(j, accumulation=1)
    if "embeddings" in run.roles:
        yield "--always-active none", lambda j: replace(j, roles=())


def _told(shape: ModelShape, name: str, run: PlannedRun, speeds: Speeds) -> str:
    """Says what GRASS with one layer takes in ``run``, or nothing where it does not fit."""
    row = row_of(shape, run, _grass(shape, run, 1), speeds)
    return f"{name} ({gb(row.memory.total)} a GPU)" if row.fits else ""


def _shorter(shape: ModelShape, run: PlannedRun, speeds: Speeds) -> str:
    """Says which is the longest half, quarter and so on of the sequence that fits."""
    seq = run.seq_len // 2
    while seq >= SHORTEST:
        if told := _told(shape, f"--seq-len {seq}", replace(run, seq_len=seq), speeds):
            return told
        seq //= 2
    return ""


def _more_gpus(shape: ModelShape, run: PlannedRun, speeds: Speeds) -> str:
    if run.backend == "single":
        run = replace(run, backend="fsdp2")
    gpus = run.gpus
    while gpus < MOST_GPUS:
        gpus *= 2
        if told := _told(shape, f"--gpus {gpus} --backend {run.backend}", run.on(gpus), speeds):
            return told
    return ""


def _grass(shape: ModelShape, run: PlannedRun, gamma: int) -> Method:
    return Method("grass", min(gamma, shape.num_layers), run.roles)
