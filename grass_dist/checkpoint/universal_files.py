"""Converts a checkpoint into DeepSpeed's universal form, in one process on the CPU: a folder for each parameter.

`engine.load_checkpoint` of a GRASS engine reads it with any number of ranks and at any stage, where its ds_config has
``"checkpoint": {"load_universal": true}``. A stock engine does not read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from grass_dist.backends.zero.saved_state import GRASS_KEY, TOTAL_KEY, UPDATED_PARAMS_KEY
from grass_dist.checkpoint import disk, files
from grass_dist.checkpoint.convert import new_folder
from grass_dist.checkpoint.dcp import TensorReader
from grass_dist.checkpoint.folders import folder_name
from grass_dist.checkpoint.loading import Checkpoint, open_checkpoint
from grass_dist.checkpoint.per_rank import measured_of
from grass_dist.checkpoint.pieces import decode, state_key
from grass_dist.errors import CheckpointError
from grass_dist.method.saved import CLASS, SETTINGS
from grass_dist.ranks import Ranks
from grass_dist.states.layer_state import MASTER
from grass_dist.states.update_rule import HOW

LATEST = "latest_universal"
"""The file that names the folder which DeepSpeed loads if it is told none."""

_MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
"""Where DeepSpeed looks for counters: at stages 1 and 2, and at stage 3."""


def to_universal(source: Path, out: Path) -> Path:
    """Writes the weights, states and position of ``source``, of either kind, below ``out``; returns the new folder.

    It is then the one that DeepSpeed loads from ``out``, also where later steps are there.
    It takes memory for the largest tensor. Buffers are left out: DeepSpeed loads none of this form. So are the states
    of generators and the schedule of learning rates.

    Raises:
        CheckpointError: the source is damaged, its optimizer keeps something that has no place in this form, there is
            such a folder already, or writing fails; then nothing is left.
    """
    with open_checkpoint(source) as checkpoint, new_folder(out, checkpoint.step) as writing:
        states = dict(_states_of(checkpoint))
        (writing / "zero").mkdir()
        reader = checkpoint.tensors()
        for name, entry in checkpoint.manifest.weights.items():
            if (dtype := getattr(torch, entry.dtype, None)) is not None and dtype.is_floating_point:
                _write_param(writing / "zero" / _plain(name), reader, name, entry.shape, dtype, states.get(name))
        torch.save(_common(checkpoint, reader, states), writing / "zero" / "optimizer_state.pt")
        for name in _MODEL_FILES:
            torch.save(_counters(checkpoint), writing / name)
        disk.sync_tree(writing)
        final = writing.rename(out / folder_name(checkpoint.step))
        _point_at(final)
        return final


def _point_at(final: Path) -> None:
    latest = final.with_name(LATEST)
    new = latest.with_name(f".{LATEST}.writing")
    new.write_text(final.name)
    new.replace(latest)


def _states_of(checkpoint: Checkpoint) -> Iterator[tuple[str, dict[str, Any]]]:
    """The states of each parameter that has any: of a vector its dtype, and the step count."""
    for entries in checkpoint.state.units.values():
        for name, state in entries.items():
            if name not in checkpoint.manifest.weights:
                raise CheckpointError(f"{checkpoint.folder / files.STATE} is damaged: there is no weight {name!r:.80}.")
            made = {_plain(key): decode(entry) for key, entry in state.items()}
            if odd := [k for k, v in made.items() if k != "step" and not isinstance(v, torch.dtype)]:
                raise CheckpointError(
                    f"{checkpoint.folder}: the optimizer keeps {odd[0]!r:.60} of {name:.80}, which is no vector and "
                    "has no place in a universal checkpoint; load it with grass_dist.load_checkpoint."
                )
            yield name, made


def _plain(name: str) -> str:
    """``name``, which becomes that of a file or folder.

    Raises:
        CheckpointError: it would lead elsewhere.
    """
    if not name or name.startswith(".") or "/" in name or "\\" in name or not name.isprintable() or len(name) > 250:
        raise CheckpointError(f"{files.printable(name)!r:.80} cannot be the name of a folder.")
    return name


def _write_param(
    folder: Path, reader: TensorReader, name: str, shape: Any, dtype: torch.dtype, state: Mapping[str, Any] | None
) -> None:
    """Writes the fp32 weight (the master where there is one) and the moments of a parameter, in its shape."""
    folder.mkdir()
    numel = torch.Size(shape).numel()

    def whole(key: str, dtype: torch.dtype) -> torch.Tensor:
        value = torch.empty(numel, dtype=dtype)
        return (reader.read(key, 0, value) if numel else value).view(tuple(shape))

    state = dict(state or {})
    has_master = isinstance(state.get(MASTER), torch.dtype)
    weight = whole(state_key(name, MASTER), state.pop(MASTER)) if has_master else whole(name, dtype)
    torch.save({"param": weight.float()}, folder / "fp32.pt")
    for key, value in state.items():
        if isinstance(value, torch.dtype):
            torch.save({"param": whole(state_key(name, key), value)}, folder / f"{key}.pt")
        else:
            torch.save(value, folder / f"{key}.pt")


def _common(checkpoint: Checkpoint, reader: TensorReader, states: Mapping[str, Any]) -> dict[str, Any]:
    """What is no parameter's: the position of the method, and the settings of the user's parameter groups."""
    engine, saved_by = checkpoint.state.engine, checkpoint.manifest.world_size
    measured = measured_of(engine.measured.layers, saved_by, Ranks(), reader.read)
    position = {**engine.model_dump(), "measured": measured, TOTAL_KEY: measured["rows"]}
    position[SETTINGS] = {name: value for name, value in engine.settings.items() if name != CLASS}
    groups = [
        {key: tuple(value) if isinstance(value, list) else value for key, value in group.items() if key not in HOW}
        for group in checkpoint.state.groups
    ]
    return {GRASS_KEY: position, UPDATED_PARAMS_KEY: sorted(states), "param_groups": groups}


def _counters(checkpoint: Checkpoint) -> dict[str, Any]:
    """What an engine reads of the steps, and the ``extra`` of the save, which it returns as its client state."""
    counters = {"global_steps": checkpoint.step, "skipped_steps": 0, "dp_world_size": 1, "mp_world_size": 1}
    return {**counters, "extra": checkpoint.state.run}
