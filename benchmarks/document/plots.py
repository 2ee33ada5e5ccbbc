"""Plots of the page."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks import throughput
from benchmarks.engines import METHODS
from benchmarks.peers import __main__ as peers
from benchmarks.peers.methods import METHODS as LEARNERS

COLOURS = ("#2f6db3", "#d2792b", "#3d9a50", "#8a63b5")
OURS = "#c8483f"


def _save(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": file.stem}):  # the same results give the same file
        figure.savefig(file, metadata={"Date": None})
    file.write_text("\n".join(line.rstrip() for line in file.read_text().splitlines()) + "\n")


def draw_throughput(record: dict[str, Any], file: Path) -> None:
    """Bars with quartiles, grouped by method."""
    wrappers = record["wrappers"]
    shown = [m for m in METHODS if m != "full" and any(m in told["seconds"] for told in wrappers.values())]
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    axes = figure.subplots()
    wide = 0.8 / len(wrappers)
    for number, (backend, told) in enumerate(wrappers.items()):
        for place, method in enumerate(shown):
            if method not in told["seconds"]:
                continue
            half, low, high = throughput.over_full(told, method)
            at = place + (number - (len(wrappers) - 1) / 2) * wide
            axes.bar(at, half, wide * 0.92, color=COLOURS[number], label=backend if place == len(shown) - 1 else None)
            axes.plot([at, at], [low, high], color="#333333", linewidth=1)
    limits = next(told["limits"] for told in wrappers.values())
    for place, method in enumerate(shown):
        if method in limits:
            axes.plot([place - 0.45, place + 0.45], [limits[method][0]] * 2, color="black", linestyle="--", linewidth=1)
    axes.plot([], [], color="black", linestyle="--", linewidth=1, label="limit by FLOPs, with head")
    axes.axhline(1, color="#999999", linewidth=1)
    names = [METHODS[method].replace(", ", ",\n") for method in shown]
    axes.set_xticks(range(len(shown)), names, fontsize=8)
    axes.set_ylabel("step time over full fine-tuning\nunder the same wrapper")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, ncols=5, loc="upper center", bbox_to_anchor=(0.5, 1.14), frameon=False)
    _save(figure, file)


def draw_peers(trainings: list[dict[str, Any]], file: Path) -> None:
    """Held-out loss over what a method holds on the device: each seed, and their mean."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    named: list[tuple[float, float, Any]] = []
    for method in LEARNERS:
        at = peers.at_best(trainings, method)
        if not at:
            continue
        losses, held = [r["held_out_loss"] for r in at], at[0]["device_bytes"] / 1e6
        colour = OURS if method.startswith("grass") else COLOURS[0]
        axes.plot([held] * len(at), losses, ".", color=colour, alpha=0.35)
        axes.plot(held, statistics.mean(losses), "o", color=colour)
        mean = statistics.mean(losses)
        near = next((text for x, y, text in named if abs(x - held) < 20 and abs(y - mean) < 0.003), None)
        if near is not None:
            near.set_text(f"{near.get_text()}, {method}")
            continue
        text = axes.annotate(method, (held, mean), xytext=(7, -3), textcoords="offset points", fontsize=8)
        named.append((held, mean, text))
    axes.set_xlabel("weights, gradients and states on the device at most, MB")
    axes.set_ylabel("held-out loss")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, file)
