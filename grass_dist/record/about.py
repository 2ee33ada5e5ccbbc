"""The content of run.json: what was trained, on what, and with which settings."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any

import torch

from grass_dist.config import GrassConfig
from grass_dist.events import Started
from grass_dist.method.spoken import about_trained
from grass_dist.model.discovery import Unit
from grass_dist.version import __version__


def what_trains(started: Started) -> dict[str, Any]:
    """Returns the entry ``trains`` of run.json: the facts of the line at the start, and its words."""
    return {**dataclasses.asdict(started), "told": about_trained(started)}


def about_run(
    grass: GrassConfig,
    layers: Sequence[Unit],
    always: Sequence[Unit],
    *,
    params_total: int,
    device: torch.device,
    dtype: torch.dtype,
    versions: dict[str, str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Returns the content of run.json, which does not change during the run.

    Args:
        layers: those of the model, in their order.
        always: the roles that train at every step.
        params_total: number of elements of all parameters.
        dtype: of the weights.
        versions: of other packages.
        more: ``name``, ``model``, ``backend``, ``world_size``, ``hosts``, ``replicate``, ``train``, ``data``, and what
            one program adds.
    """
    return {
        **more,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "num_layers": len(layers),
        "layer_names": [unit.name for unit in layers],
        "layer_numel": [unit.numel for unit in layers],
        "params_total": params_total,
        "params_always_active": sum(unit.numel for unit in always),
        "grass": grass.model_dump(mode="json"),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"torch": torch.__version__, "grass_dist": __version__, **(versions or {})},
    }
