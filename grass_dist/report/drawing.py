"""Holds what the pictures share: their look, axes of steps, and lines that stay readable however long the run is."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from grass_dist.regular_files import replace_file
from grass_dist.report.load import RunRecord

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#8E5C9E"
LIGHT_BLUE, INK, MUTED, PROBE, UNKNOWN = "#a6cce6", "#1f2933", "#66727f", "#e8e4d8", "#dfe3e8"
COLUMNS = 1000  # at most, in a heatmap; also the bins of a long line
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "legend.fontsize": 10,
    "legend.edgecolor": "none",
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ed",
    **dict.fromkeys(["axes.spines.top", "axes.spines.right"], False),
    **dict.fromkeys(["text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"], INK),
    **dict.fromkeys(["axes.edgecolor", "xtick.color", "ytick.color"], MUTED),
}


def byte_unit(largest: float) -> tuple[float, str]:
    """Returns the size and name of a decimal unit for numbers of bytes up to ``largest``."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= scale:
            return scale, unit
    return 1.0, "bytes"


@contextmanager
def picture(path: Path, height: float, rows: int = 1) -> Iterator[list[Axes]]:
    """Gives axes one above the other; what is drawn on them becomes the file ``path``, in the format of its suffix."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, height), layout="constrained")
        yield list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=150, format=path.suffix.removeprefix(".").lower())
        replace_file(path, drawn.getvalue())


def as_floats(values: Sequence[float | None]) -> np.ndarray:
    """Returns an array of floats, with NaN for None."""
    return np.array(values, dtype=float)


def whole_numbers(axis: Axis, bins: int = 10) -> None:
    axis.set_major_locator(MaxNLocator(nbins=bins, steps=[1, 2, 5, 10], integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def step_axis(ax: Axes, steps: Sequence[int] | np.ndarray) -> None:
    ax.set(xlabel="optimizer step", xlim=(min(steps) - 0.5, max(steps) + 0.5))
    whole_numbers(ax.xaxis)


def shade_probe(ax: Axes, run: RunRecord) -> list[Patch]:
    """Shades the steps of the probe and returns their entry in the legend, if there are any."""
    steps = [s.step for s in run.probe_steps]
    if not steps:
        return []
    ax.axvspan(steps[0] - 0.5, steps[-1] + 0.5, color=PROBE, lw=0, zorder=0)
    return [Patch(color=PROBE, label="probe: measures every layer, trains none")]


def rolling_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values in a centred window, which is shorter at the two ends; NaN where there is none."""
    known, kernel = np.isfinite(values), np.ones(window)
    counts = np.convolve(known, kernel, mode="same")
    return np.convolve(np.where(known, values, 0), kernel, mode="same") / np.where(counts > 0, counts, np.nan)


def envelope(x: np.ndarray, y: np.ndarray, bins: int = COLUMNS) -> tuple[np.ndarray, np.ndarray]:
    """Returns the line, or the lowest and highest value in each of ``bins`` bins where it has many more points."""
    if len(x) <= 2 * bins:
        return x, y
    edges = np.linspace(0, len(x), bins + 1).astype(int)[:-1]
    low, high = np.fmin.reduceat(y, edges), np.fmax.reduceat(y, edges)
    return np.repeat(x[edges], 2), np.stack([low, high], axis=1).reshape(-1)
