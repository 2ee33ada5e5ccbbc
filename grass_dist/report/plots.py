"""Draws the pictures of a run, by one function each, which returns None where the record has nothing to draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from grass_dist.regular_files import make_folder
from grass_dist.report.costs import plot_cost, plot_moves
from grass_dist.report.drawing import (
    BLUE,
    COLUMNS,
    INK,
    ORANGE,
    UNKNOWN,
    as_floats,
    envelope,
    picture,
    rolling_mean,
    shade_probe,
    step_axis,
    whole_numbers,
)
from grass_dist.report.load import RunRecord, relative


def plot_loss(run: RunRecord, folder: Path) -> Path | None:
    """Draws the training loss, raw and smoothed, and the held-out loss."""
    steps, loss, which, of = _training_loss(run)
    evals = [e for e in run.evals if e.loss is not None]
    if not np.isfinite(loss).any() and not evals:
        return None
    with picture(folder / "loss.png", 4.6) as (ax,):
        probe = shade_probe(ax, run)
        if len(steps) >= 10:
            ax.plot(*envelope(steps, loss), color=BLUE, alpha=0.3, lw=0.9, label=f"training loss, {which}")
            window = max(3, len(steps) // 15)
            smooth = rolling_mean(loss, window)
            ax.plot(*envelope(steps, smooth), color=BLUE, lw=2, label=f"training loss, mean of {window:,} {of}")
        elif len(steps):
            ax.plot(steps, loss, color=BLUE, lw=1.5, marker="o", ms=4, label=f"training loss, {which}")
        if evals:
            size = 6.5 if len(evals) <= 60 else 3
            marker: dict[str, Any] = {"marker": "D", "ms": size, "mec": "white", "mew": 0.8, "clip_on": False}
            held_out = as_floats([e.loss for e in evals])
            ax.plot([e.step for e in evals], held_out, color=ORANGE, lw=1.2, label="held-out loss", zorder=4, **marker)
        ax.set(title="Training and held-out loss", ylabel="loss" if run.info.recorded_by else "loss (nats a token)")
        step_axis(ax, [*(s.step for s in run.steps), *(e.step for e in evals)])
        ax.legend(handles=[*ax.get_legend_handles_labels()[0], *probe], ncols=2)
    return folder / "loss.png"


def _training_loss(run: RunRecord) -> tuple[np.ndarray, np.ndarray, str, str]:
    """Returns steps, their losses, and words for the legend.

    Where a loss was logged now and then, the steps without one are left out: a line between two of them shows nothing.
    """
    steps, loss = np.array([s.step for s in run.steps]), as_floats([s.loss for s in run.steps])
    if sum(s.loss is not None for s in run.train_steps) >= 0.9 * len(run.train_steps):
        begins = int(np.isfinite(loss).argmax()) if len(loss) else 0  # a probe may have none
        return steps[begins:], loss[begins:], "each step", "steps"
    known = np.isfinite(loss)
    return steps[known], loss[known], "where it was logged", "of these"


def plot_importance(run: RunRecord, folder: Path) -> Path | None:
    """Draws a heatmap of the importances over their mean, by layer and step."""
    if all(value is None for event in run.refreshes for value in relative(event.importances)):
        return None
    columns = _columns(run, run.refreshes[-1].step)
    grid = _held(run.refreshes, columns, lambda event: relative(event.importances), run.info.num_layers)
    with picture(folder / "importance.png", _height(run)) as (ax,):
        _heatmap(ax, grid, columns, "viridis", "importance / mean over the layers")
        ax.set_title("Importance of each layer")
        _unknown_legend(ax, grid, [], "not measured yet")
    return folder / "importance.png"


def plot_probability(run: RunRecord, folder: Path) -> Path | None:
    """Draws a heatmap of the sampling probabilities, by layer and step, with the trained layers marked."""
    events = [e for e in run.probability_events() if any(p is not None for p in e.probabilities)]
    if not events:
        return None
    columns = _columns(run, events[-1].step)
    grid = _held(events, columns, lambda event: event.probabilities, run.info.num_layers)
    with picture(folder / "probability.png", _height(run)) as (ax,):
        _heatmap(ax, grid, columns, "cividis", "probability that a draw picks the layer")
        ax.set_title("Sampling probability of each layer")
        _unknown_legend(ax, grid, _mark_trained(ax, run), "no probabilities yet")
    return folder / "probability.png"


def plot_counts(run: RunRecord, folder: Path) -> Path | None:
    """Draws the number of steps that trained each layer, as bars."""
    counts = run.times_trained()
    if not any(counts):
        return None
    mean = sum(counts) / len(counts)
    with picture(folder / "counts.png", 3.8) as (ax,):
        ax.bar(range(len(counts)), counts, color=BLUE, width=0.8)
        ax.axhline(mean, color=ORANGE, ls="--", lw=1.6, label=f"mean over the layers: {mean:,.4g} steps")
        ax.set(title="Steps that trained each layer", xlabel="layer", ylabel="training steps")
        ax.set(xlim=(-0.6, len(counts) - 0.4), ylim=(0, max(counts) * 1.18))
        whole_numbers(ax.xaxis, bins=16)
        whole_numbers(ax.yaxis, bins=7)
        ax.grid(axis="x", visible=False)
        ax.legend(loc="upper right")
    return folder / "counts.png"


PLOTS = {
    plot.__name__[5:]: plot
    for plot in (plot_loss, plot_importance, plot_probability, plot_counts, plot_cost, plot_moves)
}


def plot_all(run: RunRecord, folder: Path) -> dict[str, Path | None]:
    """Draws every picture into ``folder``; one that the record has nothing for is None, and has no file."""
    make_folder(folder)
    for name in PLOTS:
        (folder / f"{name}.png").unlink(missing_ok=True)
    return {name: plot(run, folder) for name, plot in PLOTS.items()}


def _height(run: RunRecord) -> float:
    return float(np.clip(2.4 + 0.085 * run.info.num_layers, 3.2, 7.5))


def _columns(run: RunRecord, last_event: int) -> np.ndarray:
    """Returns the step that each column of a heatmap shows: every step of the run, or `COLUMNS` of them."""
    first = run.steps[0].step if run.steps else 1
    last = max(run.steps[-1].step if run.steps else 1, last_event + 1)
    total = last - first + 1
    return first + ((np.arange(min(total, COLUMNS)) + 0.5) * total / min(total, COLUMNS)).astype(int)


def _held(events: Sequence[Any], columns: np.ndarray, values: Callable[[Any], Any], num_layers: int) -> np.ndarray:
    """Returns, by layer and column, the values of the last event before the column's step.

    An event comes after its own step.
    """
    latest = np.searchsorted([event.step for event in events], columns, side="left") - 1
    rows = {i: as_floats(values(events[i])) for i in set(latest.tolist()) if i >= 0}
    unknown = np.full(num_layers, np.nan)
    return np.stack([rows.get(i, unknown) for i in latest.tolist()], axis=1)


def _norm(grid: np.ndarray) -> Normalize:
    """Chooses a log scale of colours where the values span more than a factor of 8, else a linear one from 0."""
    seen = grid[np.isfinite(grid) & (grid > 0)]
    low, high = (float(seen.min()), float(seen.max())) if seen.size else (1.0, 1.0)
    if high > 8 * low:
        return LogNorm(max(low, high / 1000), high, clip=True)
    return Normalize(0, high if high > 1.01 * low else 2 * high)


def _heatmap(ax: Axes, grid: np.ndarray, columns: np.ndarray, colors: str, label: str) -> None:
    half = 0.5 * (columns[-1] - columns[0]) / max(len(columns) - 1, 1) or 0.5
    extent = (columns[0] - half, columns[-1] + half, -0.5, len(grid) - 0.5)
    look: dict[str, Any] = {"cmap": matplotlib.colormaps[colors].with_extremes(bad=UNKNOWN), "norm": _norm(grid)}
    known = np.ma.masked_invalid(grid)
    image = ax.imshow(known, origin="lower", aspect="auto", interpolation="nearest", extent=extent, **look)
    ax.grid(visible=False)
    ax.set(xlabel="optimizer step", ylabel="layer")
    whole_numbers(ax.xaxis)
    whole_numbers(ax.yaxis)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.015, aspect=30)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    log = isinstance(look["norm"], LogNorm)
    bar.set_label(label + (" (log scale)" if log else ""))
    if log:
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())


def _mark_trained(ax: Axes, run: RunRecord) -> list[Any]:
    """Outlines the trained layers of each interval, or dots them where there are many, and returns the legend."""
    intervals = run.intervals()
    if not intervals:
        return []
    halo = [withStroke(linewidth=3, foreground=INK)]
    if len(intervals) <= 40 and run.info.num_layers <= 64:
        box: dict[str, Any] = {"fill": False, "ec": "white", "lw": 1.4, "path_effects": halo}
        for part in intervals:
            for layer in part.layers:
                corner = (part.first - 0.5, layer - 0.5)
                ax.add_patch(Rectangle(corner, part.last - part.first + 1, 1, **box, clip_on=False, zorder=3))
        return [Rectangle((0, 0), 1, 1, **box, label="trained")]
    stride = -(-len(intervals) // 150)
    points = [((p.first + p.last) / 2, layer) for p in intervals[::stride] for layer in p.layers]
    size = 3.4 if run.info.num_layers <= 64 else 2.4
    look: dict[str, Any] = {"marker": "o", "ms": size, "mfc": "white", "mec": INK, "mew": 0.5, "ls": ""}
    ax.plot([x for x, _ in points], [y for _, y in points], **look, zorder=3)
    label = "trained" if stride == 1 else f"trained (one draw in {stride} is shown)"
    return [Line2D([], [], **look, label=label)]


def _unknown_legend(ax: Axes, grid: np.ndarray, handles: list[Any], label: str) -> None:
    unknown = [Patch(color=UNKNOWN, label=label)] if np.isnan(grid).any() else []
    if handles := [*handles, *unknown]:
        ax.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.3, ncols=2)
