"""Prints what `grass-dist plan` found: two tables, what is recommended, and the constants behind the times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

from grass_dist.plan.choose import Choice, Estimate
from grass_dist.plan.cost import LANES
from grass_dist.plan.memory import FRAGMENTATION_SHARE, RUNTIME_BYTES
from grass_dist.plan.scale import NAMES, Point
from grass_dist.plan.shape import ModelShape
from grass_dist.plan.speeds import Speeds
from grass_dist.terminal import console, duration, size, table

ABOUT_MEMORY = (
    f"Allowance: {FRAGMENTATION_SHARE:.0%} of gradients, activations and buffers, for fragmentation. Runtime: "
    f"{size(RUNTIME_BYTES)} for the CUDA context and NCCL."
)


def show(shape: ModelShape, choice: Choice, speeds: Speeds, points: Sequence[Point], assumed: str) -> None:
    """Prints the plan."""
    out = console(170)
    out.print(_memory_table(shape, choice))
    out.print(_time_table(choice))
    if points:
        out.print(_scale_table(points))
        out.print(assumed, markup=False, soft_wrap=True)
    for sentence in (ABOUT_MEMORY, *([] if points else [speeds.sentence]), *choice.sentences):
        out.print(sentence, markup=False, soft_wrap=True)


def _memory_table(shape: ModelShape, choice: Choice) -> Any:
    run = choice.run
    hosts = f"{run.num_hosts} hosts" if run.num_hosts > 1 else "1 host"
    replicas = f" of {run.replicate} replicas" if run.backend == "hsdp" else ""
    title = (
        f"{shape.name}: {shape.numel / 1e9:.3g} billion parameters, {shape.num_layers} layers · {run.gpus} GPUs of "
        f"{size(run.gpu_bytes)} on {hosts} · {run.backend}{replicas} · {run.dtype} · {run.micro_batch} × {run.seq_len} "
        f"tokens a GPU{f' × {run.accumulation}' if run.accumulation > 1 else ''} · offload {run.offload} · "
        f"{'weights on the host · ' if run.weights == 'host' else ''}"
        f"{'logits in chunks · ' if run.logits == 'chunked' else ''}"
        f"{run.named_checkpointing}\nMemory of a GPU at its peak"
    )
    columns = ("", "weights", "gradients", "states", "activations", "buffers", "allowance", "runtime")
    columns = (*columns, "peak", "fits", "pinned a host", "by")
    return table(title, columns, map(_memory_cells, choice.rows), align_right=True)


def _memory_cells(row: Estimate) -> list[str]:
    m = row.memory
    parts = (m.weights, m.gradients, m.states, m.activations, m.buffers, m.allowance, m.runtime, m.total)
    fits = "yes" if row.fits else "no: host" if m.total <= row.run.gpu_bytes else "no"
    by = "simulation" if m.simulated else "closed form"
    return [row.method.label, *map(size, parts), fits, size(row.host_bytes), by]


def _time_table(choice: Choice) -> Any:
    full = next(row for row in choice.rows if row.method.name == "full")
    columns = ("", "compute", "update", "network", "hidden", "PCIe", "hidden", "step", "of full", "tokens/s")
    volumes = ["PCIe a GPU, each way", "within hosts", "across hosts"]
    if rests := choice.run.weights == "host":
        volumes.append("weights to a GPU")
    rows = []
    for row in choice.rows:
        t = row.time
        lanes = (*(getattr(t, name) for name in LANES), t.total)
        cells = [f"{t.total / full.time.total:.2f} ×", f"{t.tokens_per_s:,.0f}"]
        rows.append([row.method.label, *map(duration, lanes), *cells, *map(size, astuple(row.moved)[: 3 + rests])])
    title = "Time of a step, and bytes that it moves (of all ranks, but for PCIe)"
    return table(title, (*columns, *volumes), rows, align_right=True)


def _scale_table(points: Sequence[Point]) -> Any:
    by = {(p.backend, p.gpus): p for p in points}
    rows = []
    for gpus in sorted({p.gpus for p in points}):
        cells = []
        for backend in NAMES:
            p = by.get((backend, gpus))
            fits = "" if p is None or p.fits else " (does not fit)"
            cells.append("" if p is None else f"{duration(p.step_s)}, {p.efficiency:.0%}{fits}")
        rows.append([f"{gpus:,}", *cells])
    return table("Step time and efficiency over the number of GPUs", ("GPUs", *NAMES.values()), rows, align_right=True)
