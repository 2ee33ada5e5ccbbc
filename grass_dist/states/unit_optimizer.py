"""The update rule of one layer: any torch optimizer class, with fp32 masters where the weights are 16-bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from grass_dist.errors import GrassError
from grass_dist.model.discovery import Unit
from grass_dist.model.sharding import Sharding
from grass_dist.states.fields import (
    Counts,
    Home,
    born_in,
    counts_for,
    field,
    kept_for,
    move_home,
    placed_count,
    usual_counts,
)
from grass_dist.states.layout import Field, Layout

ELEMENTWISE = frozenset(
    getattr(torch.optim, name)
    for name in ["Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]
)
"""Update rules that treat each entry by itself, and so give the same on a shard as on the whole."""

HOW = frozenset(("capturable", "differentiable", "foreach", "fused"))
"""Entries of a parameter group that say how an optimizer computes, not what: a run keeps its own."""

WHOLE = (0, 1)
"""Part of a parameter: see `Sharding.part`."""

LOW = (torch.bfloat16, torch.float16)
"""Dtypes of weights that are updated through an fp32 master."""


def step_over(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], state: Any) -> None:
    """A step of ``optimizer`` over other parameter groups and states than its own; no groups make it update nothing.

    Schedulers, which want a step before their own, and hooks on the optimizer see it as any other.
    """
    own = optimizer.param_groups, optimizer.state
    optimizer.param_groups, optimizer.state = groups, state
    try:
        optimizer.step()
    finally:
        optimizer.param_groups, optimizer.state = own


class UnitOptimizer:
    """Optimizer of one unit (a layer, or an always-active role), with a state and step counts of its own.

    The state is born at the first `step`: with 16-bit weights an fp32 master copy made from them, and whatever the
    optimizer class keeps. It holds this rank's shard only, as plain tensors, when the class is one of torch's that
    work entry by entry; any other class is given the DTensors, as it would be without GRASS.

    Args:
        unit: the parameters that train together.
        group_of: index of the user's parameter group for each parameter of ``unit``.
        optimizer_class: a `torch.optim.Optimizer` class with per-parameter state.
        kwargs: its arguments.
        sharding: says which part of a parameter this rank holds.
    """

    def __init__(
        self,
        unit: Unit,
        group_of: Sequence[int],
        optimizer_class: type[torch.optim.Optimizer],
        kwargs: Mapping[str, Any],
        sharding: Sharding,
    ) -> None:
        self.unit, self.name = unit, unit.name
        self.layout = Layout([])
        self._group_of = list(group_of)
        self._class, self._kwargs, self._sharding = optimizer_class, dict(kwargs), sharding
        self._shards = optimizer_class in ELEMENTWISE
        self._kept: dict[tuple[int, str], torch.dtype] = {}  # what `fields` foretells, by position and key
        self._views: dict[tuple[int, str], torch.Tensor] = {}  # where the state is, by position and key; if it moves
        self.inner: torch.optim.Optimizer | None = None
        self.updated: list[nn.Parameter] = []
        """What the optimizer class updates, in the order of ``unit.params``: the parameters' own shards, or masters."""

    @property
    def born(self) -> bool:
        return self.inner is not None

    @property
    def shards(self) -> bool:
        """Whether it updates this rank's shards as plain tensors."""
        return self._shards

    def shard_of(self, param: nn.Parameter) -> torch.Tensor:
        """What it keeps a state for, of a parameter of the unit: plain, and without a graph."""
        return self._sharding.local(self._view(param))

    def fields(self, groups: Sequence[Mapping[str, Any]]) -> list[Field]:
        """The tensors of its state as they will be, for each parameter its master and what the class keeps.

        Raises:
            GrassError: the class cannot say, or works on whole parameters of which this rank holds a part.
        """
        fields, self._kept = [], {}
        for position, (name, param) in enumerate(self.unit.params):
            view = self._view(param)
            if not self._shards and self._sharding.local(view) is not view:
                raise GrassError(f"{self._class.__name__} does not work entry by entry, and its state is of DTensors")
            entries = [("master", view.shape, torch.float32)] if view.dtype in LOW else []
            try:
                entries += kept_for(self._step_once, *self._stand_in(position, groups), elementwise=self._shards)
            except Exception as error:
                raise GrassError(f"{self._class.__name__} does not say what it keeps: {error}") from error
            fields += [field(name, *entry) for entry in entries]
            self._kept |= {(position, key): dtype for key, _, dtype in entries}
        return fields

    def _stand_in(self, position: int, groups: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], torch.Tensor]:
        """Hyperparameters of the parameter at ``position``, and a tensor like what is updated for it."""
        view = self._view(self.unit.params[position][1])
        like = view.new_empty((), dtype=torch.float32).expand(view.shape) if view.dtype in LOW else view
        return hyperparameters(groups[self._group_of[position]]), like

    def fresh(self, groups: list[dict[str, Any]], **changed: Any) -> torch.optim.Optimizer:
        """Another optimizer of the class over ``groups``, with the same arguments but those that are ``changed``."""
        return self._class(groups, **{**self._kwargs, **changed})

    def _step_once(self, groups: list[dict[str, Any]]) -> Mapping[Any, Mapping[str, Any]]:
        optimizer = self.fresh(groups)
        optimizer.step()
        return optimizer.state

    def bind(self, views: Sequence[torch.Tensor], *, resident: bool) -> None:
        """Makes ``views``, one for each of `fields`, the state; before its birth, what it is born in."""
        self._views = dict(zip(self._kept, views, strict=True))
        if self.inner is None:
            return
        for (position, key), view in self._views.items():
            target = self.updated[position]
            if key == "master":
                target.data = view
            elif key in self.inner.state.get(target, ()):
                self.inner.state[target][key] = view

    def step(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """One update with the hyperparameters of the user's ``groups``; parameters without a gradient are left out."""
        if self.inner is None:
            self.create(groups)
        assert self.inner is not None
        for group in self.inner.param_groups:
            user = groups[group["user_group"]]
            group.update({k: v for k, v in user.items() if k not in ("params", "user_group", "initial_lr")})
        for (_, param), target in zip(self.unit.params, self.updated, strict=True):
            self._follow(param, target)
            grad = param.grad
            if grad is None:
                target.grad = None
            elif target is not param:
                grad = self._sharding.state_shard(grad) if self._shards else grad
                target.grad = grad.to(target.dtype)
        homes = self._homes()
        with born_in(homes, self.inner.state):
            self.inner.step()
        move_home(homes, self.inner.state)
        for (_, param), target in zip(self.unit.params, self.updated, strict=True):
            if target is not param:
                target.grad = None
                if _is_master(param, target):
                    self._view(param).copy_(target)

    def create(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Makes the masters and the optimizer; the class makes its own state when it first steps."""
        self.updated = [self._target(i, param) for i, (_, param) in enumerate(self.unit.params)]
        own: dict[int, dict[str, Any]] = {}
        for index, target in zip(self._group_of, self.updated, strict=True):
            user = hyperparameters(groups[index])
            own.setdefault(index, {**user, "user_group": index, "params": []})["params"].append(target)
        homes = self._homes()
        with born_in(homes, {}):
            self.inner = self._class(list(own.values()), **self._kwargs)
        move_home(homes, self.inner.state)

    def tensors(self) -> list[torch.Tensor]:
        """All state tensors on this rank: masters, and those of the optimizer class."""
        if self.inner is None:
            return []
        masters = [t for (_, p), t in zip(self.unit.params, self.updated, strict=True) if _is_master(p, t)]
        states = [v for t in self.updated for v in self.inner.state[t].values() if torch.is_tensor(v)]
        return [self._sharding.local(t.detach()) for t in [*masters, *states]]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors())

    def state_of(self, position: int) -> dict[str, Any]:
        """State of the parameter at ``position`` in the unit, with its fp32 ``master`` where it has one."""
        if self.inner is None:
            return {}
        (_, param), target = self.unit.params[position], self.updated[position]
        master = {"master": target.detach()} if _is_master(param, target) else {}
        state = {k: self._exact(position, k, v) for k, v in self.inner.state[target].items()} | master
        return {**state, "part": self._sharding.part} if state and self._sharding.part != WHOLE else state

    def load_state(self, states: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> None:
        """Takes over what `state_of` gave for each position, after `check_parts`; all empty leaves the unit unborn."""
        if not any(states):
            self.inner, self.updated = None, []
            return
        self.create(groups)
        assert self.inner is not None
        with torch.no_grad():
            for position, (target, state) in enumerate(zip(self.updated, states, strict=True)):
                if "master" in state:
                    target.copy_(state["master"])
                own = {k: v for k, v in state.items() if k not in ("master", "part")}
                if own:
                    made = self._counts(position, groups)
                    self.inner.state[target] = {k: self._placed(position, k, v, made) for k, v in own.items()}

    def _counts(self, position: int, groups: Sequence[Mapping[str, Any]]) -> Counts:
        """Tensors of one element that the class keeps for the parameter at ``position``.

        A class that works on whole parameters, of which this rank holds a part, is not tried: it would take the memory
        of whole ones.
        """
        group, like = self._stand_in(position, groups)
        view = self._view(self.unit.params[position][1])
        if not self._shards and self._sharding.local(view) is not view:
            return usual_counts(group, like)
        return counts_for(self._step_once, group, like, elementwise=self._shards)

    def check_parts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Checks a loaded state before anything is changed.

        Raises:
            ValueError: it is of another part of the parameters than this rank's.
        """
        for (name, param), state in zip(self.unit.params, states, strict=True):
            if not state:
                continue
            saved, mine = tuple(state.get("part", WHOLE)), self._sharding.part
            if saved != mine:
                raise ValueError(
                    f"The saved state of {name} is {_named(saved)}, and this rank keeps {_named(mine)}: each rank "
                    "loads what it has saved itself, with as many ranks and the same shard_states."
                )
            shape = self._view(param).shape
            of_shard = {k: v for k, v in state.items() if k == "master" or (self._shards and torch.is_tensor(v))}
            for key, value in of_shard.items():
                if value.ndim and value.shape != shape:
                    raise ValueError(
                        f"The saved {key} of {name} is of shape {tuple(value.shape)}, and this rank keeps one of shape "
                        f"{tuple(shape)}: load it with the model, the wrapper and the ranks that it was saved with."
                    )

    def _view(self, param: torch.Tensor) -> torch.Tensor:
        detached = param.detach()
        return self._sharding.state_shard(detached) if self._shards else detached

    def _target(self, position: int, param: nn.Parameter) -> nn.Parameter:
        view = self._view(param)
        if view.dtype in LOW:
            home = self._views.get((position, "master"))
            return nn.Parameter(view.float() if home is None else home.copy_(view))
        return param if view.shape == param.shape and type(view) is type(param.detach()) else nn.Parameter(view)

    def _homes(self) -> list[Home]:
        return [(self.updated[i], key, view) for (i, key), view in self._views.items() if key != "master"]

    def _exact(self, position: int, key: str, value: Any) -> Any:
        """A moment in the dtype in which it is updated: host memory may round it (`offload.host_dtype`)."""
        dtype = self._kept.get((position, key))
        return value.to(dtype) if torch.is_tensor(value) and dtype is not None else value

    def _placed(self, position: int, key: str, value: Any, made: Counts) -> Any:
        """A copy of a loaded state entry, where it belongs; ``made`` is what `counts_for` gives."""
        if not torch.is_tensor(value):
            return value
        if (home := self._views.get((position, key))) is not None:
            return home.copy_(value)
        if key in made:
            return placed_count(value, key, made)
        return value.to(self.updated[position].device, copy=True)

    def _follow(self, param: nn.Parameter, target: nn.Parameter) -> None:
        """Keeps a shard's target on the memory of its parameter, should the engine have moved that."""
        if target is param or _is_master(param, target):
            return
        view = self._view(param)
        if view.data_ptr() != target.data_ptr():
            target.data = view


def hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a group of the user's that an update needs."""
    return {k: v for k, v in group.items() if k not in ("params", "initial_lr")}


def _named(part: tuple[int, ...]) -> str:
    return "of the whole" if part == WHOLE else f"of part {part[0]} of {part[1]}"


def _is_master(param: torch.Tensor, target: torch.Tensor) -> bool:
    return target is not param and target.dtype != param.dtype
