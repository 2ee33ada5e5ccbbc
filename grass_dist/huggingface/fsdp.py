"""Optimizer states under FSDP2: what Accelerate and Trainer save of a `GrassOptimizer`, and load again.

Accelerate saves and loads an optimizer under FSDP2 by torch's `get_optimizer_state_dict` and
`set_optimizer_state_dict`, which a `GrassOptimizer` answers (`grass_dist.checkpoint.torch_states`). What is left to do
here is to say in one sentence why a folder cannot be loaded, and to take the weights alone of another run.

For a model that transformers has sharded at load (`DistributedConfig`), Trainer saves no states: it takes
``save_only_model`` alone. So `StatesBeside` puts into the folder what Trainer looks for when it goes on, with the
states in a folder of their own, by the same functions of torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grass_dist.checkpoint.marker import read_marker
from grass_dist.checkpoint.states_folder import load_states, names_in, save_states, states_of
from grass_dist.checkpoint.torch_states import METHOD
from grass_dist.errors import CheckpointError, ConfigError
from grass_dist.optimizer import GrassOptimizer
from grass_dist.ranks import Ranks, together, world

WEIGHTS = {"FULL_STATE_DICT": "pytorch_model_fsdp.bin", "SHARDED_STATE_DICT": "pytorch_model_fsdp_0"}
"""What Accelerate writes the weights of the first model to, by the plugin's ``state_dict_type``."""

STATES = "optimizer_0"
"""The folder of the states of the first optimizer, where they are saved in shards."""

_NOTE = "states of a model sharded at load"


class FsdpStates:
    """State dicts of the optimizer that Accelerate has prepared, for torch's functions.

    Args:
        load: takes a state dict over, also that of an ordinary run.
        folder: the checkpoint that the next state dict is loaded from; None where none is.
    """

    def __init__(
        self, grass: GrassOptimizer, load: Callable[[dict[str, Any]], None], folder: Path | None = None
    ) -> None:
        self._grass, self._load, self.folder = grass, load, folder

    def state_dict(self) -> dict[str, Any]:
        """The complete state dict; while a folder is loaded, the one that is filled from it.

        Raises:
            CheckpointError: the folder's states are those of another optimizer class, or of fewer parameters.
        """
        saved, folder, ranks = self._grass.state_dict(), self.folder, self._grass.grass.backend.ranks
        if folder is None:
            return saved
        ordinary, sharded = together(
            ranks,
            lambda: (read_marker(folder) is None, (folder / STATES).is_dir()),
            lambda found: {"files of the checkpoint": found},
        )
        if ordinary:  # its learning rates alone
            groups = [{k: v for k, v in group.items() if k != METHOD} for group in saved["param_groups"]]
            return {"state": {} if sharded else saved["state"], "param_groups": groups}
        if sharded:
            check_keys(folder, saved["state"], ranks)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._load(state_dict)
        self.folder = None


def step_past_scaler(accelerated: Any, closure: Callable[[], float] | None = None) -> Any:
    """`AcceleratedOptimizer.step`; where torch has states made by a step over zeros, past a `GradScaler`, which would
    count that step, and which has no scale yet in a run that is being continued.
    """
    grass: GrassOptimizer = accelerated.optimizer
    return grass.step(closure) if grass._dicts.asked else type(accelerated).step(accelerated, closure)  # type: ignore[arg-type]


def check_keys(folder: Path, states: Mapping[Any, Mapping[str, Any]], ranks: Ranks) -> None:
    """Compares the names of states with those that a folder has, which torch would name one by one.

    Raises:
        CheckpointError: the folder lacks some.
    """
    together(ranks, lambda: _compare_keys(folder, states), raise_as=CheckpointError)


def _compare_keys(folder: Path, states: Mapping[Any, Mapping[str, Any]]) -> None:
    there = names_in(folder / STATES)
    kinds = {name.rsplit(".", 1)[1] for name in there}
    if lacking := sorted({key for state in states.values() for key in state} - kinds):
        raise CheckpointError(
            f"{folder} has no optimizer states of the name {', '.join(lacking)} but {', '.join(sorted(kinds))}; give "
            "the optimizer class and the dtype of the weights that it was saved with."
        )
    params = {name.rsplit(".", 1)[0] for name in there}
    if len(params) < sum(map(bool, states.values())):
        raise CheckpointError(
            f"{folder} has states of {len(params)} parameters, and {len(states)} train here; freeze the parameters "
            "that were frozen when it was saved, and give the same always_active."
        )


def check_folder(accelerator: Any, folder: Path) -> None:
    """Checks that a folder has weights which Accelerate can load under FSDP2, before it fails for a missing file.

    Raises:
        ConfigError: it has none.
    """
    kind = accelerator.state.fsdp_plugin.state_dict_type.name
    if kind not in WEIGHTS or (folder / WEIGHTS[kind]).exists():
        return
    for other, name in WEIGHTS.items():
        if (folder / name).exists():
            raise ConfigError("fsdp state_dict_type", kind, f"{folder} was saved with {other}", f"set it to {other}")
    raise ConfigError(
        "resume_from_checkpoint",
        str(folder),
        f"it has no {WEIGHTS[kind]}: it was saved by save_only_model, or without FSDP2",
        "start from its weights, by from_pretrained(folder), and do not resume",
    )


def checking_load(load_state: Callable[..., Any], accelerator: Any, states: FsdpStates) -> Callable[..., Any]:
    """`Accelerator.load_state`, which first checks the folder and tells ``states`` of it."""

    @functools.wraps(load_state)
    def wrapper(input_dir: Any = None, *args: Any, **kwargs: Any) -> Any:
        folder = Path(input_dir).expanduser() if input_dir is not None else newest_state(accelerator)
        if folder is not None and folder.is_dir():
            together(world(), functools.partial(check_folder, accelerator, folder))
            states.folder = folder
        try:
            return load_state(input_dir, *args, **kwargs)
        finally:
            states.folder = None

    return wrapper


def newest_state(accelerator: Any) -> Path | None:
    """The folder that `Accelerator.load_state` takes without an argument, where it names checkpoints itself."""
    if not accelerator.project_configuration.automatic_checkpoint_naming:
        return None
    folders = Path(accelerator.project_dir, "checkpoints").glob("checkpoint_*")
    return max(folders, key=lambda folder: int(folder.name.rpartition("_")[2]), default=None)


def check_no_note(state_dict: Mapping[str, Any]) -> None:
    """
    Raises:
        CheckpointError: the file says that the states are beside it, which only a model sharded at load can take.
    """
    if state_dict.get(METHOD) == _NOTE:
        raise CheckpointError(
            "The checkpoint is of a model that was sharded at load; load this one with a DistributedConfig too, or "
            "start from its weights, by from_pretrained(folder), and do not resume."
        )


def sharded_at_load(trainer: Any) -> bool:
    """Whether transformers has sharded a trainer's model in ``from_pretrained(distributed_config=...)``."""
    return bool(getattr(trainer, "is_distributed_loading_by_transformers", False))


class StatesBeside:
    """The states of a model that was sharded at load.

    Args:
        folder: the checkpoint that Trainer goes on from; None where it begins.
    """

    def __init__(self, model: nn.Module, grass: GrassOptimizer, folder: Path | None) -> None:
        self._model, self._grass, self._folder = model, grass, folder

    def state_dict(self) -> dict[str, Any]:
        """What is in Trainer's own file, which one rank writes: a note."""
        return {METHOD: _NOTE}

    def save(self, folder: Path, scheduler: Any) -> None:
        """Saves the states, and a learning-rate schedule under Trainer's name. Call it on every rank.

        Over the wire: what `torch.distributed.checkpoint.save` sends, names and sizes.
        """
        save_states(self._model, self._grass, folder / STATES)
        if self._grass.grass.backend.ranks.rank == 0:
            torch.save(scheduler.state_dict(), folder / "scheduler.pt")
            torch.save(self.state_dict(), folder / "optimizer.pt")  # after which Trainer takes the states for complete

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Trainer calls it on every rank, with what `state_dict` gave.

        Raises:
            CheckpointError: the folder has no such states, or those of another optimizer class.
        """
        if state_dict.get(METHOD) != _NOTE or self._folder is None or not (self._folder / STATES).is_dir():
            raise CheckpointError(
                f"{self._folder} has no {STATES} with the states of a GRASS run on a model that was sharded at load; "
                "start from its weights, by from_pretrained(folder), and do not resume."
            )
        states = states_of(self._model, self._grass)
        check_keys(self._folder, states["state"], self._grass.grass.backend.ranks)
        try:
            load_states(self._model, self._grass, states, self._folder / STATES)
        except ValueError as error:
            raise CheckpointError(str(error)) from error


def states_beside(trainer: Any) -> StatesBeside | None:
    """Those of a trainer's optimizer; None where Trainer or Accelerate saves its states itself."""
    return owner if isinstance(owner := _owner(trainer), StatesBeside) else None


def end_loading(trainer: Any) -> None:
    """What is asked for from now on is saved; Trainer may have found nothing to load in a folder."""
    if isinstance(owner := _owner(trainer), FsdpStates):
        owner.folder = None


def _owner(trainer: Any) -> Any:
    """What gives the state dicts of a trainer's optimizer."""
    return getattr(getattr(trainer.optimizer, "state_dict", None), "__self__", None)
