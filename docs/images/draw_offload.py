"""Draws the pictures of docs/offload.md beside this file: python docs/images/draw_offload.py [folder for PNGs].

A schedule of one rank is made by the rules of `grass_dist.states.moving` from durations that are made up: they show
what waits for what, and measure nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch, Rectangle

HERE = Path(__file__).parent
LAYERS = 6
FORWARD, BACKWARD, ACTIVE_BACKWARD, NORM, UPDATE, GATHER, REDUCE, COPY = 1.0, 1.0, 2.0, 1.3, 0.9, 0.8, 0.9, 1.7

LANES = ["all-gather", "compute", "reduce-scatter", "host → device", "device → host"]
COLOURS = {
    "forward": "#dbe7f5",
    "backward": "#b5cce9",
    "active": "#7aa5d8",
    "norm": "#d9d9d9",
    "update": "#f2a541",
    "gather": "#e3dbef",
    "reduce": "#b9a3d6",
    "in": "#8fcb9b",
    "out": "#e79a94",
    "wait": "#ffffff",
}
LEGEND = {
    "forward": "forward",
    "backward": "backward, frozen layer",
    "active": "backward, active layer",
    "norm": "norm and clipping",
    "update": "update",
    "gather": "all-gather of weights",
    "reduce": "reduce-scatter",
    "in": "state to the device",
    "out": "state to the host",
    "wait": "waits for a state",
}
STATE = {"there": "#fbdfb3", "in": "#d3ebd7", "out": "#f6d5d2", "empty": "#ffffff"}
DARK = "#333333"


@dataclass(eq=False)
class Box:
    """A job on a lane."""

    lane: str
    start: float
    end: float
    label: str
    kind: str


def moment(time: float) -> Box:
    """Something that has ended at ``time``."""
    return Box("", time, time, "", "")


@dataclass
class Slot:
    """A slot and what has been in it: (start, end, label, kind)."""

    name: str
    layer: int | None = None
    since: float = 0.0
    out: Box | None = None
    spans: list[tuple[float, float, str, str]] = field(default_factory=list)


class Rank:
    """Queues of one rank: a job begins when its lane is free and what it waits for has ended."""

    def __init__(self, slots: int) -> None:
        self.free = dict.fromkeys(LANES, 0.0)
        self.boxes: list[Box] = []
        self.arrows: list[tuple[Box, Box]] = []
        self.slots = [Slot(f"slot {chr(ord('A') + i)}") for i in range(slots)]
        self.arrived: dict[int, Box] = {}
        self.left: dict[int, Box] = {}
        self.ends: list[float] = []

    def put(self, lane: str, length: float, label: str, kind: str, after: Sequence[Box | None] = ()) -> Box:
        ready = max([self.free[lane], *(box.end for box in after if box is not None)])
        state = max((box.end for box in after if box is not None and box.kind == "in"), default=0.0)
        if state > self.free[lane] + 1e-9:
            self.boxes.append(Box(lane, self.free[lane], state, "", "wait"))
        box = Box(lane, ready, ready + length, label, kind)
        self.boxes.append(box)
        self.free[lane] = box.end
        return box

    # --- states

    def slot_of(self, layer: int) -> Slot:
        return next(slot for slot in self.slots if slot.layer == layer)

    def has(self, layer: int) -> bool:
        return any(slot.layer == layer for slot in self.slots)

    def empty(self) -> Slot | None:
        found = [slot for slot in self.slots if slot.layer is None]
        return min(found, key=lambda slot: slot.out.end if slot.out else 0.0) if found else None

    def bring(self, layer: int, slot: Slot, after: Sequence[Box | None] = (), *, length: float = COPY) -> None:
        box = self.put(LANES[3], length, str(layer), "in", [slot.out, self.left.get(layer), *after])
        if length:
            if slot.out is not None:
                self.arrows.append((slot.out, box))
            slot.spans.append((box.start, box.end, "in", "in"))
        slot.layer, slot.since, self.arrived[layer] = layer, box.end, box

    def take(self, layer: int, update: Box) -> None:
        slot = self.slot_of(layer)
        box = self.put(LANES[4], COPY, str(layer), "out", [update])
        self.arrows.append((update, box))
        slot.spans += [(slot.since, box.start, str(layer), "there"), (box.start, box.end, "out", "out")]
        slot.layer, slot.out = None, box
        self.left[layer] = box

    def update(self, layer: int, lane: str = "compute", after: Sequence[Box | None] = ()) -> Box:
        came = self.arrived[layer]
        box = self.put(lane, UPDATE, str(layer), "update", [came, *after])
        if came.end - came.start > 0 and not any(a is came for a, _ in self.arrows):
            self.arrows.append((came, box))
        return box

    # --- a step

    def forward(self) -> None:
        after: list[Box | None] = [None]
        for layer in range(LAYERS):
            gathered = self.put("all-gather", GATHER, str(layer), "gather", after[-2:-1])
            after.append(self.put("compute", FORWARD, str(layer), "forward", [gathered]))

    def backward(self, active: Sequence[int]) -> Iterator[tuple[int, Box]]:
        """Gives each active layer with the box of its reduction."""
        gathered = self.put("all-gather", GATHER, str(LAYERS - 1), "gather", [moment(self.free["compute"])])
        for layer in reversed(range(LAYERS)):
            kind = "active" if layer in active else "backward"
            length = ACTIVE_BACKWARD if layer in active else BACKWARD
            box = self.put("compute", length, str(layer), kind, [gathered])
            if layer:
                gathered = self.put("all-gather", GATHER, str(layer - 1), "gather", [moment(box.start)])
            if layer in active:
                yield layer, self.put("reduce-scatter", REDUCE, str(layer), "reduce", [box])

    def end_step(self) -> None:
        end = max(self.free["compute"], self.free["reduce-scatter"])
        self.free.update({"compute": end, "all-gather": end})
        self.ends.append(end)

    def close(self, end: float) -> None:
        for slot in self.slots:
            if slot.layer is not None:
                slot.spans.append((slot.since, max(end, slot.since), str(slot.layer), "there"))


def interval() -> tuple[Rank, list[str]]:
    """The last two steps of layers 5, 3, 2 and the first of 4, 3, 1."""
    rank, old, new = Rank(3), (5, 3, 2), (4, 3, 1)
    landing = Slot("landing slot")
    for layer, slot in zip(old, rank.slots, strict=True):
        rank.bring(layer, slot, length=0.0)
    rank.slots.append(landing)
    for step in range(3):
        active = new if step == 2 else old
        if step == 1:  # one step before the switch
            landing.spans.append((0.0, rank.ends[-1], "empty", "empty"))
            rank.bring(4, landing, [moment(rank.ends[-1])])
        rank.forward()
        last = [reduced for _, reduced in rank.backward(active)][-1]
        for layer in active:
            last = rank.update(layer, after=[last])
            if step == 1 and layer not in new:
                rank.take(layer, last)
                if slot := (rank.empty() if not rank.has(1) else None):
                    rank.bring(1, slot)
        rank.end_step()
    left = rank.slots[2]  # the landing slot of the next switch
    assert left.out is not None
    left.spans.append((left.out.end, rank.ends[2] + 0.4, "empty", "empty"))
    return rank, ["step n − 1", "step n: the last before the switch", "step n + 1: the first after it"]


def stream(in_backward: bool) -> tuple[Rank, list[str]]:
    """Four active layers in two slots."""
    rank, active = Rank(2), (5, 4, 3, 2)
    for layer, slot in zip(active, rank.slots, strict=False):
        rank.bring(layer, slot, length=0.0)
    for _ in range(3):
        rank.forward()
        to_come = [layer for layer in active if not rank.has(layer)]

        def updated(layer: int, box: Box, to_come: list[int] = to_come) -> None:
            rank.take(layer, box)
            if to_come and (slot := rank.empty()):
                rank.bring(to_come.pop(0), slot)
            if layer == active[-1]:
                for following in active[:2]:
                    slot = rank.empty()
                    assert slot is not None
                    rank.bring(following, slot)

        last = None
        for layer, last in rank.backward(active):
            if in_backward:
                updated(layer, rank.update(layer, "reduce-scatter", [last]))
        if not in_backward:
            last = rank.put("compute", NORM, "‖g‖", "norm", [last])
            for layer in active:
                last = rank.update(layer, after=[last])
                updated(layer, last)
        rank.end_step()
    return rank, ["step n − 1", "step n", "step n + 1"]


class Picture:
    """A rank's lanes and slots between two moments."""

    def __init__(self, rank: Rank, begin: float, end: float) -> None:
        rank.close(end)
        self.rank, self.begin, self.end = rank, begin, end
        self.at: dict[str, float] = {}
        height = 0.0
        for row in [*LANES, "", *(slot.name for slot in rank.slots)]:
            self.at[row] = height
            height += 1.0 if row else 0.45
        inches = 0.31 * height + 1.32
        self.figure, self.axes = plt.subplots(figsize=(9, inches))
        self.figure.subplots_adjust(left=0.118, right=0.992, top=1 - 0.55 / inches, bottom=0.62 / inches)
        self.axes.set(xlim=(begin, end), ylim=(height + 0.05, -0.05))
        self.axes.axis("off")
        for row, top in self.at.items():
            if row:
                self.axes.text(begin - 0.3, top + 0.5, row, ha="right", va="center", fontsize=8, color=DARK)
                self.axes.plot([begin, end], [top + 1] * 2, color="#eeeeee", linewidth=0.8, zorder=0)

    def box(self, row: str, start: float, end: float, text: str, size: float = 7.5, **style: Any) -> None:
        start, end = max(start, self.begin), min(end, self.end)
        if end - start < 1e-6:
            return
        top = self.at[row]
        self.axes.add_patch(Rectangle((start, top + 0.12), end - start, 0.76, linewidth=0.5, zorder=2, **style))
        if end - start > 0.7:
            x = (start + end) / 2
            self.axes.text(x, top + 0.51, text, ha="center", va="center", fontsize=size, zorder=3)

    def jobs(self) -> None:
        for box in self.rank.boxes:
            self.box(box.lane, box.start, box.end, box.label, 6.5 if len(box.label) > 1 else 7.5, **look(box.kind))

    def slots(self) -> None:
        for slot in self.rank.slots:
            for start, end, label, kind in slot.spans:
                wide = min(end, self.end) - max(start, self.begin) > 5
                text = f"state of layer {label}" if kind == "there" and wide else label
                self.box(slot.name, start, end, text, 7, facecolor=STATE[kind], edgecolor="#8a8f98")

    def arrows(self) -> None:
        for source, target in self.rank.arrows:
            if source.end < self.begin or max(source.end, target.start) > self.end:
                continue
            far = target.start - source.end > 4
            down = self.at[target.lane] > self.at[source.lane]
            tail = (source.end - 0.08, self.at[source.lane] + (0.88 if down else 0.12))
            head = (target.start + 0.08, self.at[target.lane] + (0.12 if down else 0.95 if far else 0.88))
            line = {"arrowstyle": "-|>,head_length=0.35,head_width=0.18", "color": "#222222", "linewidth": 0.8}
            behind = 1.5 if far else 4  # a long one passes behind the boxes
            self.axes.annotate("", head, tail, zorder=behind, arrowprops={**line, "shrinkA": 0, "shrinkB": 0})

    def steps(self, names: Sequence[str]) -> None:
        bottom = self.axes.get_ylim()[0] - 0.05
        starts = [0.0, *self.rank.ends]
        for start in starts:
            if self.begin < start < self.end:
                self.axes.plot([start] * 2, [-0.05, bottom], color=DARK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        for name, start, end in zip(names, starts, self.rank.ends, strict=False):
            middle = (max(start, self.begin) + min(end, self.end)) / 2
            self.axes.text(middle, -0.18, name, ha="center", va="bottom", fontsize=8, color=DARK)

    def legend(self) -> None:
        shown = {box.kind for box in self.rank.boxes}
        handles: list[Any] = [Patch(label=LEGEND[k], linewidth=0.5, **look(k)) for k in LEGEND if k in shown]
        line = {"color": "#222222", "linewidth": 0.8, "marker": ">", "markersize": 4}
        handles.append(plt.Line2D([], [], label="is waited for (an event)", **line))
        place = {"loc": "lower left", "bbox_to_anchor": (0.006, 0.0), "ncols": 5, "columnspacing": 1.4}
        self.figure.legend(handles=handles, fontsize=7.2, frameon=False, handlelength=1.6, **place)


def look(kind: str) -> dict[str, Any]:
    edge = {"hatch": "////", "edgecolor": "#c0392b"} if kind == "wait" else {"edgecolor": "#5b6675"}
    return {"facecolor": COLOURS[kind], **edge}


def draw(rank: Rank, names: list[str], title: str, begin: float, end: float) -> Any:
    picture = Picture(rank, begin, end)
    picture.jobs()
    picture.slots()
    picture.arrows()
    picture.steps(names)
    picture.legend()
    picture.figure.text(0.012, 0.985, title, ha="left", va="top", fontsize=9.5, fontweight="bold")
    return picture.figure


def main() -> None:
    plt.rcParams.update({"font.family": "DejaVu Sans", "svg.hashsalt": "grass_dist", "hatch.linewidth": 0.5})
    rank, names = interval()
    figures = {"interval": draw(rank, names, "interval, γ = 3, prefetch_steps = 1", 0.0, rank.ends[2] + 0.4)}
    for name, in_backward in (("stream", False), ("backward", True)):
        rank, names = stream(in_backward)
        title = f"stream, γ = 4, slots = 2, {'updates in the backward' if in_backward else 'clipping'}"
        figures[name] = draw(rank, names, title, rank.ends[0] - 8, rank.ends[1] + 17.6)
    for name, figure in figures.items():
        path = HERE / f"offload_{name}.svg"
        figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor="white")
        if len(sys.argv) > 1:
            figure.savefig(Path(sys.argv[1]) / f"{path.stem}.png", dpi=150, facecolor="white")


if __name__ == "__main__":
    main()
