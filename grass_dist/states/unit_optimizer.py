"""The update rule of one layer: any torch optimizer class, with fp32 masters where the weights are 16-bit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from grass_dist.errors import GrassError
from grass_dist.model.discovery import Unit
from grass_dist.model.sharding import Sharding
from grass_dist.states.fields import Counts, Step, counts_for, kept_for, usual_counts
from grass_dist.states.layer_state import MASTER, LayerState, TargetState, materialize
from grass_dist.states.layout import Field

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


class ParamState(TargetState):
    """The state of one parameter of a unit on this rank, and the way of its gradient and update.

    Args:
        name: of the parameter.
        weights: the parameter of the model.
        group: index of the user's parameter group that it is in.
        sharding: says which part of a parameter this rank holds.
        shards: whether this rank's shard is updated as a plain tensor.
    """

    def __init__(self, name: str, weights: nn.Parameter, group: int, sharding: Sharding, *, shards: bool) -> None:
        super().__init__(name, [])
        self.weights, self.group = weights, group
        self._sharding, self._shards = sharding, shards

    @property
    def view(self) -> torch.Tensor:
        """What a state is kept for, in the memory of the weights and without a graph."""
        detached = self.weights.detach()
        return self._sharding.state_shard(detached) if self._shards else detached

    @property
    def divided(self) -> bool:
        """Whether this rank holds a part of what is updated as a whole."""
        return not self._shards and self._sharding.local(view := self.view) is not view

    def stand_in(self, groups: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], torch.Tensor]:
        """Hyperparameters of the parameter, and a tensor like what is updated for it."""
        view = self.view
        like = view.new_empty((), dtype=torch.float32).expand(view.shape) if view.dtype in LOW else view
        return hyperparameters(groups[self.group]), like

    def ask(self, step: Step, groups: Sequence[Mapping[str, Any]]) -> None:
        """Finds which tensors the state will have: a master, and what the optimizer class keeps.

        Raises:
            Exception: the class cannot say.
        """
        view = self.view
        master = [(MASTER, view.shape, torch.float32)] if view.dtype in LOW else []
        self.foretell(master + kept_for(step, *self.stand_in(groups), elementwise=self._shards))

    def counts(self, step: Step, groups: Sequence[Mapping[str, Any]]) -> Counts:
        """Tensors of one element that the class keeps for the parameter.

        A class that works on whole parameters, of which this rank holds a part, is not tried: it would take the memory
        of whole ones.
        """
        if self.divided:
            return usual_counts(*self.stand_in(groups))
        return counts_for(step, *self.stand_in(groups), elementwise=self._shards)

    def begin(self) -> nn.Parameter:
        """Makes what the optimizer class updates: a master of 16-bit weights, the shard, or the parameter itself."""
        view = self.view
        if view.dtype in LOW:
            home = self.homes.get(MASTER)
            view = self.master = view.float() if home is None else home.copy_(view)
        itself = view.shape == self.weights.shape and type(view) is type(self.weights.detach())
        self.param = target = self.weights if itself and self.master is None else nn.Parameter(view)
        return target

    def forget(self) -> None:
        self.master = self.param = None
        self.state = {}

    def take_gradient(self) -> None:
        """Gives what is updated the gradient of the parameter, or none."""
        grad, target = self.weights.grad, self.target
        if target is self.weights:
            return
        if self.master is None and (view := self.view).data_ptr() != target.data_ptr():
            target.data = view  # the engine has moved the parameter's memory
        if grad is not None:
            grad = (self._sharding.state_shard(grad) if self._shards else grad).to(target.dtype)
        target.grad = grad

    def give_update(self) -> None:
        """Brings an update from the master to the weights."""
        if (target := self.target) is not self.weights:
            target.grad = None
            if self.master is not None:
                self.master = target.detach()  # a class may have given it other memory
                self.view.copy_(self.master)

    def tensors(self) -> list[torch.Tensor]:
        """All tensors of the state, this rank's part of each."""
        return [self._sharding.local(tensor.detach()) for tensor in super().tensors()]


class UnitOptimizer:
    """Optimizer of one unit (a layer, or an always-active role), with a state and step counts of its own.

    The state is made at the first `step`: with 16-bit weights an fp32 master copy made from them, and whatever the
    optimizer class keeps. It holds this rank's shard only, as plain tensors, when the class is one of torch's that
    work entry by entry; any other class is given the DTensors, as it would be without GRASS.

    Args:
        unit: the parameters that train together.
        group_of: index of the user's parameter group for each parameter of ``unit``.
        optimizer_class: a `torch.optim.Optimizer` class with per-parameter state.
        kwargs: its arguments.
        sharding: says which part of a parameter this rank holds.

    Attributes:
        state: of the unit, with a target for each parameter.
        inner: the optimizer of the class; None until there is a state.
        shards: whether it updates this rank's shards as plain tensors.
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
        self._class, self._kwargs, self._sharding = optimizer_class, dict(kwargs), sharding
        self.shards = optimizer_class in ELEMENTWISE
        self.targets = [
            ParamState(name, param, group, sharding, shards=self.shards)
            for (name, param), group in zip(unit.params, group_of, strict=True)
        ]
        self.state = LayerState(unit.name, self.targets)
        self.inner: torch.optim.Optimizer | None = None

    @property
    def has_state(self) -> bool:
        return self.inner is not None

    def shard_of(self, param: nn.Parameter) -> torch.Tensor:
        """What it keeps a state for, of a parameter of the unit: plain, and without a graph."""
        return self._sharding.state_shard(param.detach()) if self.shards else self._sharding.local(param.detach())

    def fields(self, groups: Sequence[Mapping[str, Any]]) -> list[Field]:
        """The tensors of its state as they will be, for each parameter its master and what the class keeps.

        Raises:
            GrassError: the class cannot say, or works on whole parameters of which this rank holds a part.
        """
        for own in self.targets:
            if own.divided:
                raise GrassError(f"{self._class.__name__} does not work entry by entry, and its state is of DTensors")
            try:
                own.ask(self._step_once, groups)
            except Exception as error:
                raise GrassError(f"{self._class.__name__} does not say what it keeps: {error}") from error
        return [field for own in self.targets for field in own.fields]

    def fresh(self, groups: list[dict[str, Any]], **changed: Any) -> torch.optim.Optimizer:
        """Another optimizer of the class over ``groups``, with the same arguments but those that are ``changed``."""
        return self._class(groups, **{**self._kwargs, **changed})

    def _step_once(self, groups: list[dict[str, Any]]) -> Mapping[Any, Mapping[str, Any]]:
        optimizer = self.fresh(groups)
        optimizer.step()
        return optimizer.state

    def step(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """One update with the hyperparameters of the user's ``groups``; parameters without a gradient are left out."""
        if self.inner is None:
            self.create(groups)
        assert self.inner is not None
        for group in self.inner.param_groups:
            user = groups[group["user_group"]]
            group.update({k: v for k, v in user.items() if k not in ("params", "user_group", "initial_lr")})
        for own in self.targets:
            own.take_gradient()
        with materialize(self.targets, self.inner.state):
            self.inner.step()
        for own in self.targets:
            own.state = self.inner.state[own.target]
            own.give_update()

    def create(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Makes the masters and the optimizer; the class makes its own state when it first steps."""
        updated: dict[int, dict[str, Any]] = {}
        for own in self.targets:
            user = hyperparameters(groups[own.group])
            updated.setdefault(own.group, {**user, "user_group": own.group, "params": []})["params"].append(own.begin())
        made: dict[Any, dict[str, Any]] = defaultdict(dict)
        with materialize(self.targets, made):
            self.inner = self._class(list(updated.values()), **self._kwargs)
            made.update(self.inner.state)
        for own in self.targets:
            own.state = self.inner.state[own.target]

    @property
    def nbytes(self) -> int:
        return self.state.nbytes

    def state_of(self, position: int) -> dict[str, Any]:
        """State of the parameter at ``position`` in the unit, with its fp32 ``master`` where it has one."""
        if self.inner is None:
            return {}
        own = self.targets[position]
        master = {} if own.master is None else {MASTER: own.master}
        state = {key: own.exact(key, value) for key, value in own.state.items()} | master
        return {**state, "part": self._sharding.part} if state and self._sharding.part != WHOLE else state

    def load_state(self, states: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> None:
        """Takes over what `state_of` gave for each position, after `check_parts`; all empty leaves it without one."""
        if not any(states):
            self.inner = None
            for own in self.targets:
                own.forget()
            return
        self.create(groups)
        assert self.inner is not None
        with torch.no_grad():
            for own, state in zip(self.targets, states, strict=True):
                if MASTER in state:
                    own.target.copy_(state[MASTER])
                kept = {key: value for key, value in state.items() if key not in (MASTER, "part")}
                if kept:
                    self.inner.state[own.target] = own.state = {}
                    own.fill(kept, own.counts(self._step_once, groups))

    def check_parts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Checks a loaded state before anything is changed.

        Raises:
            ValueError: it is of another part of the parameters than this rank's.
        """
        for own, state in zip(self.targets, states, strict=True):
            if not state:
                continue
            saved, mine = tuple(state.get("part", WHOLE)), self._sharding.part
            if saved != mine:
                raise ValueError(
                    f"The saved state of {own.name} is {_named(saved)}, and this rank keeps {_named(mine)}: each rank "
                    "loads what it has saved itself, with as many ranks and the same shard_states."
                )
            shape = own.view.shape
            of_shard = {k: v for k, v in state.items() if k == MASTER or (self.shards and torch.is_tensor(v))}
            for key, value in of_shard.items():
                if value.ndim and value.shape != shape:
                    raise ValueError(
                        f"The saved {key} of {own.name} is of shape {tuple(value.shape)}, and this rank keeps one of "
                        f"shape {tuple(shape)}: load it with the model, the wrapper and the ranks that it was saved "
                        "with."
                    )


def hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a user's parameter group that an update needs."""
    return {k: v for k, v in group.items() if k not in ("params", "initial_lr")}


def _named(part: tuple[int, ...]) -> str:
    return "of the whole" if part == WHOLE else f"of part {part[0]} of {part[1]}"
