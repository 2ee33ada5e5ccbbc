"""Keeps the record of a run: run.json, config.yaml, metrics.jsonl and TensorBoard files in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from grass_dist.checkpoint.saving import Saved
from grass_dist.events import Event, Observer
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.data.loading import Data
from grass_dist.job.guard import Guard
from grass_dist.job.world import World
from grass_dist.model.always import always_active_roles
from grass_dist.model.discovery import LayerMap
from grass_dist.record.about import about_run
from grass_dist.record.log import EventLog
from grass_dist.record.writers import JsonLines, TensorBoard


def describe_run(
    config: RunConfig, world: World, backend: str, layers: LayerMap, data: Data, model: nn.Module
) -> dict[str, Any]:
    """Returns the content of run.json, which does not change during the run."""
    return about_run(
        config.grass,
        layers.layers,
        always_active_roles(model, layers, config.grass),
        params_total=layers.numel,
        device=world.device,
        dtype=next(model.parameters()).dtype,
        name=config.name,
        model=config.model.name,
        backend=backend,
        world_size=world.size,
        hosts=world.peers.hosts,
        replicate=config.parallel.mesh.replicate,
        train=config.train.model_dump(mode="json"),
        data={
            "name": config.data.name,
            "train_examples": None if config.data.streaming else len(data.train),  # type: ignore[arg-type]
            "eval_examples": len(data.held_out),
        },
    )


class MetricsLog(EventLog):
    """Hands each event to its writers, metrics.jsonl and TensorBoard, under one guard, on the main rank only.

    Args:
        keep: number of bytes of an earlier record that stay; what came after the checkpoint happens again.
        step: the step with which the run begins.
        guard: tells an error of a writer, which costs the run nothing.
    """

    def __init__(
        self, folder: Path, about: dict[str, Any], *, keep: int = 0, step: int = 0, guard: Guard | None = None
    ) -> None:
        self.folder = folder
        (folder / "run.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        self._lines = JsonLines(folder / "metrics.jsonl", keep)
        super().__init__({str(folder / "metrics.jsonl"): self._lines}, guard or Guard())
        with self._guarded("TensorBoard"):
            self._writers["TensorBoard"] = TensorBoard(folder / "tensorboard", step)

    @property
    def nbytes(self) -> int:
        """Returns the bytes of metrics.jsonl up to now, which are on the disk then."""
        return self._lines.nbytes

    def saved(self, saved: Saved) -> None:
        """Writes how a checkpoint went."""
        error = str(saved.error) if saved.error else None
        costs = {"stall_seconds": saved.stall_seconds, "seconds": saved.seconds, "bytes": saved.nbytes}
        self.write("checkpoint", saved.step, error=error, **costs)


class Later:
    """An observer of the method that keeps its events until the record is begun, after the run is made."""

    def __init__(self) -> None:
        self._kept: list[Event] = []
        self._observers: Sequence[Observer] | None = None

    def __call__(self, event: Event) -> None:
        if self._observers is None:
            self._kept.append(event)
        for observer in self._observers or ():
            observer(event)

    def begin(self, observers: Sequence[Observer], *, going_on: bool) -> None:
        """Tells ``observers`` from now on, and first what it has kept, unless the run goes on from a later step."""
        self._observers = observers
        for event in () if going_on else self._kept:
            self(event)
        self._kept = []
