"""DeepSpeed's universal checkpoints: one folder for each parameter, for any number of ranks.

``ds_to_universal`` makes them, and `checkpoint.universal_files`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby, product
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from grass_dist.backends.zero.groups import Group, extents, numel_of, set_weight
from grass_dist.backends.zero.narrow import NarrowZero
from grass_dist.backends.zero.saved_state import (
    GRASS_KEY,
    GROUPS_KEY,
    TOTAL_KEY,
    UPDATED_KEY,
    UPDATED_PARAMS_KEY,
    settings_in,
)
from grass_dist.backends.zero.states import MASTER, Made
from grass_dist.errors import CheckpointError
from grass_dist.ranks import say, together, world

_COMMON = "optimizer_state.pt"
_STATE, _GROUPS = "optimizer_state_dict", "param_groups"


class Universal:
    """The folder of a universal checkpoint, as this engine reads it.

    Args:
        folder: of the tag.
        with_states: whether masters and moments are to be read, or the weights alone.

    Raises:
        CheckpointError: on every rank: it lacks a parameter, or is of another model or run. Nothing has changed.
    """

    def __init__(self, engine: Any, folder: Path, *, with_states: bool) -> None:
        self._zero: NarrowZero = engine.optimizer
        self._module: nn.Module = engine.module
        self._folder, self._with_states = folder / "zero", with_states
        self._names = {param: name for name, param in engine.module.named_parameters()}
        self.common: dict[str, Any] = {}
        together(self._zero.grass.backend.ranks, self._check)
        self.position: dict[str, Any] | None = self.common.get(GRASS_KEY)

    def _check(self) -> None:
        """Reads what is common to all parameters, and looks at each file that will be read."""
        self.common = _read(self._folder / _COMMON, _load)
        if position := self.common.get(GRASS_KEY):
            self._zero.check_position(position)
        for group in self._zero.every:
            keys = ("fp32", *self._moments(group)) if self._with_states else ("fp32",)
            for param, key in product(group.params, keys):
                path = self._file(param, key)
                if not path.exists():
                    why = "is of another model or optimizer class, or it is not complete"
                    raise CheckpointError(f"{path} is missing: the checkpoint {why}.")
                if (there := _read(path, _tensor).numel()) != numel_of(param):
                    own = numel_of(param)
                    raise CheckpointError(f"{path} has {there} entries, and this model {own}: it is of another model.")

    def _moments(self, group: Group) -> dict[str, torch.dtype]:
        """Name and dtype of each moment of a group; none if it has not been updated: GRASS saves zeros there."""
        updated = self.common.get(UPDATED_PARAMS_KEY)
        if updated is not None and not any(self._names[param] in updated for param in group.params):
            return {}
        number = self._number(group)
        if number is not None and not self.common[UPDATED_KEY][number]:
            return {}
        return {key: dtype for key, dtype in self._zero.states.of[group.key].dtypes.items() if key != MASTER}

    def _file(self, param: nn.Parameter, key: str) -> Path:
        return self._folder / self._names[param] / f"{key}.pt"

    def load_weights(self) -> None:
        """Loads the weights that are in the folder, each rank its shards. What trains nowhere may not be in it."""
        for param in self._names:
            if (path := self._file(param, "fp32")).exists():
                set_weight(param, _tensor(path).view(tuple(getattr(param, "ds_shape", param.shape))))

    def load_states(self) -> None:
        """Has DeepSpeed cut each unit, and reads this rank's part of masters and moments; nothing trains then."""
        zero = self._zero
        zero.forget()
        self._take_settings()
        for _, groups in groupby(zero.every, key=lambda group: group.unit.name):
            own = list(groups)
            zero.narrow_frozen(own)
            zero.states.put(own[0].unit.name, [self._read(group) for group in own])
            for group in own:
                zero.states.of[group.key].changed = True
        zero.groups = []

    def position_here(self) -> dict[str, Any] | None:
        """The position of the method. The first rank has what all ranks have measured since the last refresh."""
        if self.position is None:
            return None
        rows = self.position.get(TOTAL_KEY, [])
        if self._zero.grass.backend.ranks.rank:
            rows = [[0.0] * len(row) for row in rows]
        return {**self.position, "measured": {**self.position["measured"], "rows": rows}}

    def _take_settings(self) -> None:
        """Takes the hyperparameters of the parameter groups, and says so where a learning rate is another one."""
        before = [group["lr"] for group in self._zero.param_groups]
        self._take_groups()
        rates = [float(group["lr"]) for group in self._zero.param_groups]
        if rates != [float(rate) for rate in before]:
            shown = ", ".join(dict.fromkeys(f"{rate:.4g}" for rate in rates))
            say(world(), f"The learning rates are those of the checkpoint ({shown}); set others after loading it.")

    def _take_groups(self) -> None:
        zero, saved = self._zero, self.common.get(_GROUPS, [])
        numbers = {tuple(key): i for i, key in enumerate(self.common.get(GROUPS_KEY, []))}
        for group in zero.every:
            number = numbers.get(group.key, group.user_group)
            if number < len(saved):
                zero.param_groups[group.user_group].update(settings_in(saved[number]))
        for name in ("loss_scaler", "dynamic_loss_scale"):
            if name in self.common:
                setattr(zero, name, self.common[name])

    def _read(self, group: Group) -> Made:
        zero = self._zero
        own = zero.states.of[group.key]
        master = None if own.master is None else own.master.detach().to("cpu", copy=True)
        vectors = {} if master is None else {MASTER: master}
        state: dict[str, Any] = {key: torch.zeros(own.numel, dtype=t) for key, t in self._moments(group).items()}
        vectors |= state
        if state and (step := self._step(group)) is not None:
            state["step"] = step
        order = zero.saved_order(group)
        for param, extent in zip(order, extents(order, zero.grass.backend.ranks.rank, own.numel), strict=True):
            for key, vector in vectors.items():
                path = self._file(param, "fp32" if key == MASTER else key)
                whole = _tensor(path).view(-1)
                vector[extent.at : extent.at + extent.length] = whole[extent.start : extent.start + extent.length]
        return own, own.numel, master, state

    def _number(self, group: Group) -> int | None:
        keys = [tuple(key) for key in self.common.get(GROUPS_KEY, [])]
        return keys.index(group.key) if group.key in keys else None

    def _step(self, group: Group) -> Any:
        """The group's own step count, or None if its states have none."""
        if (path := self._file(group.params[0], "step")).exists():
            return _load(path)
        states: Mapping[int, Mapping[str, Any]] = self.common.get(_STATE, {}).get("state", {})
        return states.get(self._number(group) or 0, {}).get("step")


def begin_from_universal(engine: Any, folder: Path, *, optimizer_states: bool) -> None:
    """Goes on from a universal checkpoint, after DeepSpeed has loaded its counters and its scheduler.

    Raises:
        CheckpointError: as `Universal`.
    """
    zero: NarrowZero = engine.optimizer
    found = Universal(engine, folder, with_states=optimizer_states)
    current = list(zero.groups)
    found.load_weights()
    if not optimizer_states:
        zero.forget()
        zero.resume(current)
        say(world(), "Took over the weights of the checkpoint: masters and moments start again, and the draws go on.")
        return
    found.load_states()
    if position := found.position_here():
        zero.grass.load_state_dict(position)
    else:
        zero.resume(current)
        say(world(), "Took over the states of all layers from a checkpoint of full fine-tuning; the draws go on.")


T = TypeVar("T")


def _read(path: Path, how: Callable[[Path], T]) -> T:
    """
    Raises:
        CheckpointError: the file is missing, or damaged.
    """
    try:
        return how(path)
    except Exception as error:  # whatever unpickling makes of a file
        raise CheckpointError(f"{path} cannot be read ({' '.join(str(error).split())[:150]}).") from None


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False, mmap=True)


def _tensor(path: Path) -> torch.Tensor:
    """What the file of a parameter holds: a tensor with others beside it, or at ZeRO-3 a flat one alone."""
    found = _load(path)
    return found["param"] if isinstance(found, Mapping) else found
