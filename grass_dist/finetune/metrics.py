"""Keeps the record of a run: run.json, config.yaml, metrics.jsonl and TensorBoard files in the run's folder."""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grass_dist.checkpoint.saving import Saved
from grass_dist.events import Event, Observer, Refreshed
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.data.loading import Data
from grass_dist.finetune.parallel import Run
from grass_dist.finetune.writers import JsonLines, TensorBoard, Writer
from grass_dist.job.guard import Guard
from grass_dist.job.world import World
from grass_dist.method.importance import entropy
from grass_dist.model.discovery import LayerMap
from grass_dist.model.units import always_active_roles
from grass_dist.version import __version__


def describe_run(
    config: RunConfig, world: World, backend: str, layers: LayerMap, data: Data, model: nn.Module
) -> dict[str, Any]:
    """Returns the content of run.json, which does not change during the run."""
    always = always_active_roles(layers, config.grass)
    kind = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
    return {
        "name": config.name,
        "model": config.model.name,
        "backend": backend,
        "world_size": world.size,
        "hosts": world.peers.hosts,
        "replicate": config.parallel.mesh.replicate,
        "device": kind,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "num_layers": len(layers.layers),
        "layer_names": [unit.name for unit in layers.layers],
        "layer_numel": [unit.numel for unit in layers.layers],
        "params_total": layers.numel,
        "params_always_active": sum(unit.numel for unit in always),
        "grass": config.grass.model_dump(mode="json"),
        "train": config.train.model_dump(mode="json"),
        "data": {
            "name": config.data.name,
            "train_examples": None if config.data.streaming else len(data.train),  # type: ignore[arg-type]
            "eval_examples": len(data.held_out),
        },
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"torch": torch.__version__, "grass_dist": __version__},
    }


class MetricsLog:
    """Hands each event to its writers, metrics.jsonl and TensorBoard, under one guard, on the main rank only.

    Args:
        keep: number of bytes of an earlier record that stay; what came after the checkpoint happens again.
        step: the step with which the run begins.
        guard: tells an error of a writer, which costs the run nothing.
    """

    def __init__(
        self, folder: Path, about: dict[str, Any], *, keep: int = 0, step: int = 0, guard: Guard | None = None
    ) -> None:
        self.folder, self._guard = folder, guard or Guard()
        (folder / "run.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        self._lines = JsonLines(folder / "metrics.jsonl", keep)
        self._writers: dict[str, Writer] = {str(folder / "metrics.jsonl"): self._lines}
        with self._guarded("TensorBoard"):
            self._writers["TensorBoard"] = TensorBoard(folder / "tensorboard", step)

    @property
    def nbytes(self) -> int:
        """Returns the bytes of metrics.jsonl up to now, which are on the disk then."""
        return self._lines.nbytes

    def write(self, event: str, step: int, **values: Any) -> None:
        """Writes one event."""
        for name, writer in self._writers.items():
            with self._guarded(name, step):
                writer.write(event, step, values)

    def observe(self, event: Event) -> None:
        """Writes refreshes, and draws as they begin to train, as an observer of the method."""
        if isinstance(event, Refreshed):
            p = event.probabilities
            self.write(
                "refresh",
                event.step,
                importances=event.importances,
                probabilities=p,
                dropped=event.dropped,
                entropy=entropy(p),
            )
        else:
            self.write(
                "sample",
                event.step,
                round=event.round,
                drawn_at=event.drawn_at,
                active_layers=event.active_layers,
                probabilities=event.probabilities,
            )

    def saved(self, saved: Saved) -> None:
        """Writes how a checkpoint went."""
        error = str(saved.error) if saved.error else None
        costs = {"stall_seconds": saved.stall_seconds, "seconds": saved.seconds, "bytes": saved.nbytes}
        self.write("checkpoint", saved.step, error=error, **costs)

    def close(self) -> None:
        for name, writer in self._writers.items():
            with self._guarded(name):
                writer.close()

    def _guarded(self, name: str, step: int = 0) -> contextlib.AbstractContextManager[None]:
        return self._guard.around(name, f"the run goes on, and not all of it is recorded there from step {step} on")


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


@contextlib.contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Gives a function that returns how many seconds the block has taken."""
    began, ended = time.perf_counter(), None
    try:
        yield lambda: (ended or time.perf_counter()) - began
    finally:
        ended = time.perf_counter()


class StepCosts:
    """Counts what each step costs this rank in communication and optimizer states, from sums since the start.

    Ask it after every step on every rank: it also frees what has been measured.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._before = self._sums()

    def of_step(self) -> dict[str, Any]:
        """Returns what came since it was last asked; a copy's time counts in the step in which its end is noticed."""
        now, before = self._sums(), self._before
        self._before = now
        spent = {name: now[name] - before[name] for name in now}
        return {**spent, "state_bytes": self._run.state_bytes, "host_state_bytes": self._run.host_state_bytes}

    def _sums(self) -> dict[str, Any]:
        grass = self._run.grass
        traffic = grass.traffic
        return {
            "bytes_reduced": grass.bytes_reduced,
            "bytes_to_device": traffic.bytes_to_device,
            "bytes_to_host": traffic.bytes_to_host,
            "transfer_seconds": traffic.seconds,
            "wait_seconds": traffic.waited,
        }
