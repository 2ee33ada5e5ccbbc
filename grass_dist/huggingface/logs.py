"""What the logs of a Trainer say of the method: rows for people, and histograms over the layers for trackers."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from grass_dist.method.controller import GrassController


def log_numbers(stock: Callable[..., Any], trainer: Any, logs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """`transformers.Trainer.log` while GRASS is enabled: training rows get the layers of the step to come."""
    grass = controller_of(trainer)
    if grass is not None and "loss" in logs:
        logs["grass/round"] = grass.round
        if grass.phase == "train":
            logs["grass/layers"] = " ".join(str(grass.numbers[layer]) for layer in grass.active_layers)
    return stock(trainer, logs, *args, **kwargs)


def controller_of(trainer: Any) -> GrassController | None:
    """The controller of what the trainer's wrappers of an optimizer hold."""
    holder = holder_of(getattr(trainer, "optimizer", None))
    return None if holder is None else holder.grass


def holder_of(optimizer: Any) -> Any:
    """What trains by GRASS among an optimizer and what it wraps: ours for ZeRO, or a `GrassOptimizer`; else None."""
    seen: list[Any] = []
    while optimizer is not None and all(optimizer is not s for s in seen):
        if isinstance(getattr(optimizer, "grass", None), GrassController):
            return optimizer
        seen.append(optimizer)
        optimizer = getattr(optimizer, "optimizer", None)
    return None


class LayerLog:
    """Sends importances and probabilities to the trackers of a trainer, each time they are new.

    Args:
        callbacks: those of the trainer; what its TensorBoard, Weights & Biases and trackio callbacks log to is used.
    """

    def __init__(self, grass: GrassController, callbacks: Sequence[Any]) -> None:
        self._grass, self._callbacks = grass, callbacks
        self._sent = ""  # as text: NaN is not equal to itself

    def send(self, step: int) -> None:
        """
        Args:
            step: `TrainerState.global_step`.
        """
        values = {"grass/importances": self._grass.importances, "grass/probabilities": self._grass.probabilities}
        if self._sent == repr(values):
            return
        self._sent = repr(values)
        for callback in self._callbacks:
            _send_to(callback, {name: _over_layers(self._grass.numbers, of) for name, of in values.items()}, step)


_Histogram = tuple[np.ndarray, np.ndarray]
"""(value of each layer of the model, edges of its bin), fp64 [L] and [L + 1]; 0 for a layer that has none."""


def _over_layers(numbers: Sequence[int], values: Sequence[float]) -> _Histogram:
    heights = np.zeros(max(numbers) + 1)
    heights[list(numbers)] = [0.0 if math.isnan(value) else value for value in values]
    return heights, np.arange(len(heights) + 1) - 0.5


def _send_to(callback: Any, histograms: dict[str, _Histogram], step: int) -> None:
    from transformers import integrations

    if isinstance(callback, integrations.TensorBoardCallback):
        if callback.tb_writer is not None:
            for name, histogram in histograms.items():
                _send_to_tensorboard(callback.tb_writer, name, histogram, step)
        return
    for kind, module in (("WandbCallback", "wandb"), ("TrackioCallback", "trackio")):
        if isinstance(callback, getattr(integrations, kind, ())):
            tracker = importlib.import_module(module)
            made = {f"train/{name}": tracker.Histogram(np_histogram=of) for name, of in histograms.items()}
            tracker.log({**made, "train/global_step": step})


def _send_to_tensorboard(writer: Any, name: str, histogram: _Histogram, step: int) -> None:
    heights, edges = histogram
    layers = np.arange(len(heights))
    writer.add_histogram_raw(
        f"train/{name}",
        min=edges[0],
        max=edges[-1],
        num=heights.sum(),
        sum=(heights * layers).sum(),
        sum_squares=(heights * layers**2).sum(),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=heights.tolist(),
        global_step=step,
    )
