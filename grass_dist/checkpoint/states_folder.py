"""A folder with the states of an optimizer alone, written by torch's distributed checkpoint as Accelerate writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

_KEY = "optimizer"
_PREFIX = f"{_KEY}.state."


def states_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns the states by the names of the parameters. Call it on every rank."""
    return dict(get_optimizer_state_dict(model, optimizer))


def save_states(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Writes the folder. Call it on every rank."""
    dcp.save({_KEY: states_of(model, optimizer)}, checkpoint_id=folder)


def names_in(folder: Path) -> list[str]:
    """Returns the names of the states in a folder, such as ``layers.0.weight.exp_avg``."""
    names = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return [name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX)]


def load_states(model: nn.Module, optimizer: torch.optim.Optimizer, states: dict[str, Any], folder: Path) -> None:
    """Reads the folder into ``states``, which `states_of` gave, and has the optimizer take them. Call it on every rank.

    Raises:
        ValueError: the optimizer cannot go on from them.
    """
    dcp.load({_KEY: states}, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, states)
