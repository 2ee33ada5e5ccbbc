"""Folders that `engine.save_checkpoint` of DeepSpeed was given: what their newest checkpoint says of the method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from grass_dist.backends.zero.private import STATES_KEY
from grass_dist.backends.zero.saved_state import GRASS_KEY
from grass_dist.checkpoint.deepspeed_files import read_file
from grass_dist.config import GrassConfig
from grass_dist.errors import CheckpointError, ConfigError
from grass_dist.method.samplers import make_sampler, probe_steps
from grass_dist.method.saved import SETTINGS
from grass_dist.method.schedule import Schedule
from grass_dist.regular_files import open_regular

LATEST = "latest"
"""The file in which DeepSpeed writes the tag of its newest checkpoint."""
_STATES = "*zero_pp_rank_{}_mp_rank_00_optim_states.pt"


class _Position(BaseModel):
    """What is read of the method's state in a rank's file."""

    step: int = Field(ge=0, lt=2**53)
    active_layers: list[int]
    numbers: list[int]
    settings: dict[str, Any]


def engine_checkpoint(folder: Path) -> Path | None:
    """The folder of a tag: the one that ``latest`` names in ``folder``, or ``folder`` itself; None if it is neither.

    Raises:
        CheckpointError: ``latest`` names no folder beside it.
    """
    file = folder / LATEST
    if not file.is_file():
        return folder if any(folder.glob(_STATES.format(0))) else None
    with open_regular(file) as stream:
        tag = stream.read(1024).decode(errors="replace").strip()
    if not tag or tag in (".", "..") or "/" in tag or not (folder / tag).is_dir():
        raise CheckpointError(f"{file} names {tag!r:.80}, and {folder} has no such folder of a checkpoint.")
    return folder / tag


def read_engine_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Where the method is in the newest checkpoint of ``folder``, as `marker.read_marker` says it; None if it has none.

    Nothing in the files is executed. Only rank 0's file is opened.

    Raises:
        CheckpointError: a file is missing, damaged, or of a run without GRASS.
    """
    if (folder / "latest_universal").is_file():
        raise CheckpointError(
            f"{folder} holds a universal checkpoint of DeepSpeed, which this command does not show: load it by "
            'engine.load_checkpoint with "checkpoint": {"load_universal": true}.'
        )
    if (where := engine_checkpoint(folder)) is None:
        return None
    if not (files := sorted(where.glob(_STATES.format(0)))):
        raise CheckpointError(f"{where} has no file {_STATES.format(0)[1:]}: DeepSpeed's ZeRO did not save it.")
    saved = read_file(files[0]).get(STATES_KEY)
    method = saved.get(GRASS_KEY) if isinstance(saved, dict) else None
    if method is None:
        raise CheckpointError(f"{where} was saved without GRASS: it holds weights and DeepSpeed's states alone.")
    try:
        at = _Position(**{**method, "settings": method[SETTINGS]})
        fields = {name: value for name, value in at.settings.items() if name in GrassConfig.model_fields}
        config = GrassConfig(**fields)
        schedule = _schedule(config, len(at.numbers))
        trains = [at.numbers[layer] for layer in at.active_layers] if schedule.phase(at.step) == "train" else []
    except (ConfigError, ValidationError, TypeError, KeyError, IndexError) as error:
        raise CheckpointError(f"{files[0]} holds no state of the method that can be read: {error!r:.200}.") from None
    return {
        "folder": str(where),
        "ranks": len(list(where.glob(_STATES.format("*")))),
        "step": at.step,
        "phase": schedule.phase(at.step),
        "round": schedule.round(at.step),
        "active_layers": trains,
        "config": fields,
    }


def _schedule(config: GrassConfig, layers: int) -> Schedule:
    probing = probe_steps(config, make_sampler(config, layers))
    return Schedule(probing, config.update_interval, config.sampling_interval, config.lead)
