"""Shows step time and efficiency over the number of GPUs, by the same cost model, as a table and a picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from grass_dist.errors import ConfigError
from grass_dist.plan.cost import step_time
from grass_dist.plan.memory import memory_of
from grass_dist.plan.runs import Method, PlannedBackend, PlannedRun, with_adapters
from grass_dist.plan.shape import ModelShape
from grass_dist.plan.speeds import Speeds

MOST = 2**16
NAMES: dict[PlannedBackend, str] = {"fsdp2": "FSDP2", "hsdp": "HSDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}


@dataclass(frozen=True, slots=True)
class Point:
    """One backend on one number of GPUs."""

    backend: str
    gpus: int
    step_s: float
    efficiency: float
    """Compute over the whole step: 1 where only the model's own computation takes time."""
    fits: bool
    """True if the closed form fits into the GPU."""


def parse_scale(text: str) -> list[int]:
    """Reads a range of GPUs, e.g. 8..4096, as numbers that double from the first on.

    Raises:
        ConfigError: it is no such range.
    """
    found = re.fullmatch(r"\s*(\d{1,6})\s*\.\.\s*(\d{1,6})\s*", text, re.ASCII)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= first < last <= MOST:
        raise ConfigError("--scale", text, f"it is no range of GPUs up to {MOST}", "write e.g. 8..4096")
    counts = [first]
    while counts[-1] * 2 <= last:
        counts.append(counts[-1] * 2)
    return counts


def scale(shape: ModelShape, run: PlannedRun, method: Method, speeds: Speeds, counts: Sequence[int]) -> list[Point]:
    """Plans FSDP2, HSDP (a replica on each host), ZeRO-2 and ZeRO-3 on each number of GPUs, the batch of a GPU held."""
    points, shape = [], with_adapters(shape, run, method)
    for backend in NAMES:
        for gpus in counts:
            hosts = -(-gpus // run.gpus_per_host)
            if backend == "hsdp" and (hosts < 2 or gpus % hosts):
                continue  # on one host it is FSDP2
            at = replace(run, gpus=gpus, backend=backend, replicate=hosts if backend == "hsdp" else 1)
            time = step_time(shape, at, method, speeds)
            fits = memory_of(shape, at, method).total <= at.gpu_bytes
            points.append(Point(backend, gpus, time.total, time.compute / time.total, fits))
    return points


def assumptions(shape: ModelShape, run: PlannedRun, method: Method, speeds: Speeds) -> str:
    """Writes what the points assume, in three lines for the picture and below the table."""
    more = f" and micro-batch, {run.accumulation} of them" if run.accumulation > 1 else ""
    return (
        f"{shape.name}, {method.label}, {run.dtype}, {run.micro_batch} × {run.seq_len} tokens a GPU{more} "
        f"at every size; {run.gpus_per_host} GPUs a host\n{speeds.sentence}\n"
        "rings over all ranks, overlapped as each backend does it; no stragglers, no loading; HSDP: a replica a host"
    )


def draw_scale(points: Sequence[Point], text: str, path: Path) -> None:
    """Writes the picture as PNG or SVG, by the name of the file.

    Raises:
        ConfigError: the file has another suffix, or cannot be written.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise ConfigError("--plot", str(path), "it is neither .png nor .svg", "name e.g. scale.png")
    from matplotlib.ticker import FuncFormatter, NullLocator

    from grass_dist.report.drawing import BLUE, GREEN, MUTED, ORANGE, PURPLE, picture

    colors = dict(zip(NAMES, (BLUE, GREEN, ORANGE, PURPLE), strict=True))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with picture(path, 7.4, rows=2) as (top, bottom):
            for backend, name in NAMES.items():
                mine = [p for p in points if p.backend == backend]
                x = [p.gpus for p in mine]
                for ax, values in ((top, [p.step_s for p in mine]), (bottom, [p.efficiency * 100 for p in mine])):
                    ax.plot(x, values, color=colors[backend], label=name, lw=1.8)
                    faces = [colors[backend] if p.fits else "white" for p in mine]
                    ax.scatter(x, values, s=28, color=colors[backend], fc=faces, zorder=3)
            counts = sorted({p.gpus for p in points})
            top.set(title="Step time (hollow: does not fit)", ylabel="seconds", ylim=(0, None))
            top.legend(loc="lower right", ncols=4, bbox_to_anchor=(1, 1), borderaxespad=0)
            bottom.set(title="Efficiency: compute over step time", ylabel="%", ylim=(0, 102), xscale="log")
            bottom.set_xticks(counts)
            bottom.xaxis.set_minor_locator(NullLocator())
            bottom.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            bottom.set_xlabel(f"GPUs\n\n{text}", color=MUTED, fontsize=9)
    except OSError as error:
        problem = f"it cannot be written ({error.strerror})"
        raise ConfigError("--plot", str(path), problem, "name a file in a folder of yours") from None
