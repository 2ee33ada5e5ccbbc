"""Draws what a run costs: time, communication and memory, and the optimizer states that move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from grass_dist.report.drawing import (
    BLUE,
    GREEN,
    INK,
    LIGHT_BLUE,
    MUTED,
    ORANGE,
    PURPLE,
    as_floats,
    byte_unit,
    envelope,
    picture,
    rolling_mean,
    shade_probe,
    step_axis,
)
from grass_dist.report.load import RunRecord

BARS = 400
"""Largest number of bars in a picture."""


def plot_cost(run: RunRecord, folder: Path) -> Path | None:
    """Draws time, reduced bytes and bytes of optimizer state of each step."""
    if not run.steps:
        return None
    steps = np.array([s.step for s in run.steps])
    seconds = as_floats([s.seconds for s in run.steps])
    line: dict[str, Any] = {"lw": 1.6, "drawstyle": "steps-mid", "marker": "o" if len(steps) < 10 else "", "ms": 4}
    with picture(folder / "cost.png", 7.2, rows=3) as (top, middle, bottom):
        probe = [shade_probe(ax, run) for ax in (top, middle, bottom)][-1]
        if probe:
            top.legend(handles=probe, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
        if len(steps) < 200:
            top.plot(steps, seconds, color=BLUE, **line)
        else:
            top.plot(*envelope(steps, seconds), color=BLUE, alpha=0.3, lw=0.9)
            top.plot(*envelope(steps, rolling_mean(seconds, len(steps) // 50)), color=BLUE, lw=2)
        top.set(title="Step time", ylabel="seconds")
        _usual_seconds(top, seconds)
        reduced, state, host = np.array(
            [[s.bytes_reduced, s.state_bytes, s.host_state_bytes] for s in run.steps], float
        ).T
        held = [(state, PURPLE, "on the device"), (host, ORANGE, "in host memory")]
        for ax, series in ((middle, [(reduced, GREEN, "")]), (bottom, held if host.any() else held[:1])):
            largest = max(values.max() for values, *_ in series)
            scale, unit = byte_unit(largest)
            for values, color, label in series:
                ax.plot(*envelope(steps, values / scale), color=color, label=label, clip_on=False, zorder=3, **line)
            ax.set(ylabel=unit, ylim=(0, largest / scale * 1.12 or 1))
            ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
        if host.any():
            bottom.legend(loc="lower right", ncols=2, bbox_to_anchor=(1, 1), borderaxespad=0)
        middle.set_title("Gradient bytes this rank reduced")
        bottom.set_title("Optimizer state on this rank")
        step_axis(bottom, steps)
    return folder / "cost.png"


def plot_moves(run: RunRecord, folder: Path) -> Path | None:
    """Draws the bytes of optimizer states and of weights that moved in each step, and the time that it took."""
    steps = np.array([s.step for s in run.steps])
    states = np.array([[s.bytes_to_device, s.bytes_to_host] for s in run.steps], float)
    weights = np.array([[s.weight_bytes_to_device, s.weight_bytes_to_host] for s in run.steps], float)
    copying, waiting = np.array([[s.transfer_seconds, s.wait_seconds] for s in run.steps], float).reshape(-1, 2).T
    moved = [(what, b) for what, b in (("States that moved", states), ("Weights that moved", weights)) if b.any()]
    if not moved:
        return None
    with picture(folder / "moves.png", 2.6 * (len(moved) + 1), rows=len(moved) + 1) as (*panels, bottom):
        probe = [shade_probe(ax, run) for ax in (*panels, bottom)][-1]
        for ax, (title, moves) in zip(panels, moved, strict=True):
            _both_ways(ax, title, steps, moves)
        second, name = (1.0, "seconds") if max(copying.max(), waiting.max()) >= 1 else (1e-3, "milliseconds")
        bottom.set(title="Time of the copies", ylabel=name)
        bottom.bar(*_bars(steps, copying / second), color=LIGHT_BLUE, label="copies ran, both ways added up", lw=0)
        bottom.bar(*_bars(steps, waiting / second), color=INK, label="training waited for them", lw=0)
        bottom.set_ylim(0, max(copying.max(), waiting.max()) / second * 1.12 or 1)
        for number, ax in enumerate((*panels, bottom)):
            handles = [*(probe if not number else []), *ax.get_legend_handles_labels()[0]]
            ax.legend(handles=handles, loc="lower right", ncols=3, bbox_to_anchor=(1, 1), borderaxespad=0)
            ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
            ax.grid(axis="x", visible=False)
        step_axis(bottom, steps)
        if (size := _bin(steps)) > 1:
            bottom.set_xlabel(f"optimizer step; a bar is as long as the longest of {size} steps")
    return folder / "moves.png"


def _both_ways(ax: Axes, title: str, steps: np.ndarray, moves: np.ndarray) -> None:
    """Draws bytes to the device above zero, and those to host memory below it.

    Args:
        moves: (steps, 2).
    """
    scale, unit = byte_unit(moves.max())
    ax.set(title=title, ylabel=unit)
    ax.bar(*_bars(steps, moves[:, 0] / scale), color=PURPLE, label="to the device", lw=0)
    ax.bar(*_bars(steps, -moves[:, 1] / scale), color=ORANGE, label="to host memory", lw=0)
    reach = moves.max() / scale * 1.12
    ax.axhline(0, color=MUTED, lw=0.8)
    ax.set_ylim(-reach, reach)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):g}"))


def _bin(steps: np.ndarray) -> int:
    """Number of steps that a bar stands for: one, unless there are too many."""
    return -(-len(steps) // BARS)


def _bars(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns places, heights and widths of the bars; one that stands for several steps is as long as their longest.

    ``values`` have one sign.
    """
    starts = np.arange(0, len(steps), _bin(steps))
    first, last = steps[starts], steps[np.append(starts[1:], len(steps)) - 1]
    longest = np.maximum.reduceat(np.abs(values), starts)
    gap = 0.1 if len(steps) <= 100 else 0
    return (first + last) / 2, longest if values.min() >= 0 else -longest, last - first + 1 - gap


def _usual_seconds(ax: Axes, seconds: np.ndarray) -> None:
    """Limits y to the usual times; the few steps that took far longer (e.g. the first) are told in the panel."""
    known = seconds[np.isfinite(seconds)]
    usual = known[known <= 5 * np.median(known)] if known.size else np.ones(1)
    outside = known.size - usual.size
    if outside > max(1, known.size // 50):
        usual = known
    elif outside > 0:
        text = f"{outside:,} {'step' if outside == 1 else 'steps'} off the scale, up to {known.max():,.3g} s"
        ax.text(0.99, 0.95, text, transform=ax.transAxes, ha="right", va="top", color=MUTED, fontsize=9.5)
    ax.set_ylim(0, usual.max() * 1.35 or 1)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
