"""Prints what `grass-dist plan` found: two tables, what is recommended, and the constants behind the times."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from grass_dist.plan.choose import Choice, Row, gb
from grass_dist.plan.scale import NAMES, Point
from grass_dist.plan.shape import ModelShape
from grass_dist.plan.speeds import Speeds

WIDTH = 170
"""Number of columns where the output is no terminal."""


def show(shape: ModelShape, choice: Choice, speeds: Speeds, points: Sequence[Point], assumed: str) -> None:
    """Prints the plan."""
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    console.print(_memory_table(shape, choice))
    console.print(_time_table(choice))
    if points:
        console.print(_scale_table(points))
        console.print(assumed, markup=False, soft_wrap=True)
    for sentence in (*_about_memory(choice), about_speeds(speeds), *choice.sentences):
        console.print(sentence, markup=False, soft_wrap=True)


def seconds(value: float) -> str:
    """Writes seconds with a unit, e.g. 1.23 s, 45.6 ms, 7.8 µs or 0 s."""
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return "0 s" if value == 0 else f"{value * 1e6:.2g} µs"


def about_speeds(speeds: Speeds) -> str:
    """Says in a sentence with which constants the times were computed."""
    measured = f" Measured by the doctor: {', '.join(speeds.measured)}." if speeds.measured else ""
    return (
        f"Times are of a model of costs: {speeds.flop_share:.0%} of {speeds.flop_per_s / 1e12:.4g} TFLOP/s a GPU, "
        f"{speeds.pcie_bytes_per_s / 1e9:.3g} GB/s of PCIe each way, {speeds.within_bytes_per_s / 1e9:.3g} GB/s within "
        f"and {speeds.across_bytes_per_s / 1e9:.3g} GB/s across hosts.{measured}"
    )


def _memory_table(shape: ModelShape, choice: Choice) -> Any:
    run = choice.run
    hosts = f"{run.num_hosts} hosts" if run.num_hosts > 1 else "1 host"
    replicas = f" of {run.replicate} replicas" if run.backend == "hsdp" else ""
    title = (
        f"{shape.name}: {shape.numel / 1e9:.3g} billion parameters, {shape.num_layers} layers · {run.gpus} GPUs of "
        f"{gb(run.gpu_bytes)} on {hosts} · {run.backend}{replicas} · {run.dtype} · {run.micro_batch} × {run.seq_len} "
        f"tokens a GPU{f' × {run.accumulation}' if run.accumulation > 1 else ''} · offload {run.offload} · activation "
        f"checkpointing {'on' if run.checkpointing else 'off'}\nMemory of a GPU at its peak"
    )
    columns = ("", "weights", "gradients", "states", "activations", "buffers", "allowance", "runtime")
    return _table(title, (*columns, "peak", "fits", "pinned a host", "by"), map(_memory_cells, choice.rows))


def _memory_cells(row: Row) -> list[str]:
    m = row.memory
    parts = (m.weights, m.gradients, m.states, m.activations, m.buffers, m.allowance, m.runtime, m.total)
    fits = "yes" if row.fits else "no: host" if m.total <= row.run.gpu_bytes else "no"
    return [row.method.label, *map(gb, parts), fits, gb(row.host_bytes), "simulation" if m.simulated else "closed form"]


def _time_table(choice: Choice) -> Any:
    full = next(row for row in choice.rows if row.method.name == "full")
    columns = ("", "compute", "update", "network", "hidden", "PCIe", "hidden", "step", "of full", "tokens/s")
    volumes = ("PCIe a GPU, each way", "within hosts", "across hosts")
    rows = []
    for row in choice.rows:
        t = row.time
        lanes = (t.compute, t.update, t.network, t.network_hidden, t.pcie, t.pcie_hidden, t.total)
        cells = [f"{t.total / full.time.total:.2f} ×", f"{t.tokens_per_s:,.0f}"]
        rows.append([row.method.label, *map(seconds, lanes), *cells, *map(gb, _volumes(row))])
    return _table("Time of a step, and bytes that it moves (of all ranks, but for PCIe)", (*columns, *volumes), rows)


def _volumes(row: Row) -> tuple[float, float, float]:
    return row.moved.pcie, row.moved.within, row.moved.across


def _scale_table(points: Sequence[Point]) -> Any:
    by = {(p.backend, p.gpus): p for p in points}
    rows = []
    for gpus in sorted({p.gpus for p in points}):
        cells = []
        for backend in NAMES:
            p = by.get((backend, gpus))
            fits = "" if p is None or p.fits else " (does not fit)"
            cells.append("" if p is None else f"{seconds(p.step_s)}, {p.efficiency:.0%}{fits}")
        rows.append([f"{gpus:,}", *cells])
    return _table("Step time and efficiency over the number of GPUs", ("GPUs", *NAMES.values()), rows)


def _about_memory(choice: Choice) -> Iterable[str]:
    from grass_dist.plan.memory import FRAGMENTATION_SHARE, RUNTIME_BYTES

    yield (
        f"Allowance: {FRAGMENTATION_SHARE:.0%} of gradients, activations and buffers, for fragmentation. Runtime: "
        f"{gb(RUNTIME_BYTES)} for the CUDA context and NCCL."
    )


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in title)))
    table.title_justify = "left"
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
