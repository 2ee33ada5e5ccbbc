"""The update rule of one layer: any torch optimizer class, with fp32 masters where the weights are 16-bit."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from grass_dist.errors import GrassError
from grass_dist.model.discovery import Unit
from grass_dist.model.groups import hyperparameters
from grass_dist.model.sharding import Sharding
from grass_dist.states.exceptions import take_exceptions
from grass_dist.states.fields import Counts, Step, counts_for, kept_for, stepped, usual_counts
from grass_dist.states.layer_state import MASTER, LayerState, TargetState, materialize
from grass_dist.states.layout import Field
from grass_dist.states.update_rule import (
    LOW,
    UpdateRule,
    keeps_subclasses,
    known_rule,
    refuse_own_rate,
    same,
    set_training,
    step_unseen,
)

GROUP = "group/"
"""Begins the keys under which a parameter's state holds what its optimizer class keeps in the parameter group."""


def step_over(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], state: Any) -> None:
    """A step of ``optimizer`` over other parameter groups and states than its own; no groups make it update nothing.

    Schedulers, which want a step before their own, and hooks on the optimizer see it as any other. Adagrad gets the
    states that its constructor makes, of what has none yet.
    """
    if type(optimizer) is torch.optim.Adagrad and (new := [p for g in groups for p in g["params"] if not state.get(p)]):
        for param, made in torch.optim.Adagrad(new, **optimizer.defaults).state.items():
            state[param].update(made)
    with stepping_over(optimizer, groups, state):
        optimizer.step()


@contextmanager
def stepping_over(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], state: Any) -> Iterator[None]:
    """While it lasts, ``optimizer`` has other parameter groups and states than its own."""
    own = optimizer.param_groups, optimizer.state
    optimizer.param_groups, optimizer.state = groups, state
    try:
        yield
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
        elementwise: whether each entry of it is updated by itself.
        in_layer: whether the parameter is in a layer.
    """

    def __init__(
        self,
        name: str,
        weights: nn.Parameter,
        group: int,
        sharding: Sharding,
        *,
        shards: bool,
        elementwise: bool,
        in_layer: bool,
    ) -> None:
        super().__init__(name, [])
        self.weights, self.group = weights, group
        self._sharding, self._shards, self._elementwise = sharding, shards, elementwise
        self._in_layer = in_layer

    @property
    def view(self) -> torch.Tensor:
        """What a state is kept for, in the memory of the weights and without a graph."""
        detached = self.weights.detach()
        return self._sharding.state_shard(detached) if self._shards else detached

    @property
    def divided(self) -> bool:
        """Whether this rank holds a part of what is updated as a whole."""
        return not self._shards and self._sharding.local(view := self.view) is not view

    @property
    def plain(self) -> bool:
        """Whether what is updated is a plain tensor."""
        return self._shards or self._sharding.local(self.target) is self.target

    def stand_in(self, groups: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], torch.Tensor]:
        """Hyperparameters of the parameter, and a tensor like what is updated for it."""
        view = self.view
        like, device = view, self._sharding.weights_come_to
        if view.dtype in LOW or device is not None:
            dtype = torch.float32 if view.dtype in LOW else view.dtype
            like = view.new_empty((), dtype=dtype, device=device or view.device).expand(view.shape)
        group = hyperparameters(groups[self.group])
        return group | ({"muon": False} if "muon" in group and not self._in_layer else {}), like

    def ask(self, step: Step, groups: Sequence[Mapping[str, Any]]) -> None:
        """Finds which tensors the state will have: a master, and what the optimizer class keeps.

        Raises:
            Exception: the class cannot say.
        """
        view = self.view
        master = [(MASTER, view.shape, torch.float32)] if view.dtype in LOW else []
        kept = kept_for(step, *self.stand_in(groups), elementwise=self._elementwise)
        self.foretell(master + kept)

    def counts(self, step: Step, groups: Sequence[Mapping[str, Any]]) -> Counts:
        """Tensors of one element that the class keeps for the parameter.

        A class that works on whole parameters, of which this rank holds a part, is not tried: it would take the memory
        of whole ones.
        """
        if self.divided:
            return usual_counts(*self.stand_in(groups))
        return counts_for(step, *self.stand_in(groups), elementwise=self._elementwise)

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
        if (target := self.target) is not self.weights:
            self.follow_weights()
            grad = self.gradient()
            target.grad = None if grad is None else grad.to(target.dtype)

    def gradient(self) -> torch.Tensor | None:
        """The gradient of what is updated, in the dtype of the parameter."""
        grad = self.weights.grad
        return self._sharding.state_shard(grad) if grad is not None and self._shards else grad

    def follow_weights(self) -> None:
        """Takes over where the weights lie, if whoever shards them has moved them."""
        target = self.target
        if target is not self.weights and self.master is None and (view := self.view).data_ptr() != target.data_ptr():
            target.data = view

    def give_update(self) -> None:
        """Brings an update from the master to the weights."""
        self.end_update()
        if self.master is not None:
            self.view.copy_(self.master)

    def end_update(self) -> None:
        """Drops the gradient of what was updated, if that is not the parameter's."""
        if (target := self.target) is not self.weights:
            target.grad = None
            if self.master is not None:
                self.master = target.detach()  # a class may have given it other memory

    def tensors(self) -> list[torch.Tensor]:
        """All tensors of the state, this rank's part of each."""
        return [self._sharding.local(tensor.detach()) for tensor in super().tensors()]


class UnitOptimizer:
    """Optimizer of one unit (a layer, or an always-active role), with a state and step counts of its own.

    The state is made at the first `step`: with 16-bit weights an fp32 master copy made from them, and whatever the
    optimizer class keeps. It holds this rank's shard only, as plain tensors, when the class works entry by entry; any
    other class is given the DTensors, as it would be without GRASS.

    Most hyperparameters are the user's, and are taken from the user's groups before each update. Those that the class
    writes itself (`UpdateRule.kept`) are the unit's own. After an update the user's group shows them.

    Args:
        unit: the parameters that train together.
        group_of: index of the user's parameter group for each parameter of ``unit``.
        optimizer_class: a `torch.optim.Optimizer` class with per-parameter state.
        kwargs: its arguments.
        sharding: says which part of a parameter this rank holds.
        rule: what has been found out about the class; None is what is known of torch's classes.

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
        rule: UpdateRule | None = None,
    ) -> None:
        rule = rule or known_rule(optimizer_class)
        self.unit, self.name = unit, unit.name
        self._class, self._kwargs, self._sharding = optimizer_class, dict(kwargs), sharding
        self.shards, self._kept, self._initial = rule.elementwise or rule.blockwise, rule.kept, rule.initial
        self._elementwise, self._training = rule.elementwise, False
        self.targets = [
            ParamState(
                name,
                param,
                group,
                sharding,
                shards=self.shards,
                elementwise=rule.elementwise,
                in_layer=unit.index is not None,
            )
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
        if self.is_paged(groups):
            raise GrassError(f"{self._class.__name__} pages them itself")
        if keeps_subclasses(self._class):
            raise GrassError(f"those of {self._class.__name__} are subclasses of tensors")
        for own in self.targets:
            if own.divided:
                raise GrassError(f"{self._class.__name__} does not work entry by entry, and its state is of DTensors")
            try:
                own.ask(self._step_like(own), groups)
            except Exception as error:
                raise GrassError(f"{self._class.__name__} does not say what it keeps: {error}") from error
        return [field for own in self.targets for field in own.fields]

    def fresh(self, groups: list[dict[str, Any]], **changed: Any) -> torch.optim.Optimizer:
        """Another optimizer of the class over ``groups``, with the same arguments but those that are ``changed``."""
        return self._class(groups, **{**self._kwargs, **changed})

    def is_paged(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the class moves its states between device and host itself, as the paged ones of bitsandbytes do."""
        stand_in = nn.Parameter(torch.zeros(1, 1))
        return bool(getattr(self.fresh([{**hyperparameters(groups[0]), "params": [stand_in]}]), "is_paged", False))

    def _step_like(self, own: ParamState) -> Step:
        """A step on a stand-in of a parameter."""

        def step(groups: list[dict[str, Any]]) -> Mapping[Any, Mapping[str, Any]]:
            optimizer = self.fresh(groups)
            take_exceptions(optimizer, [(own.weights, groups[0]["params"][0])])
            set_training(optimizer, training=True)
            step_unseen(optimizer)
            return optimizer.state

        return step

    def step(self, groups: Sequence[dict[str, Any]]) -> None:
        """One update with the hyperparameters of the user's ``groups``; parameters without a gradient are left out."""
        if self.inner is None:
            self.create(groups)
        assert self.inner is not None
        self.follow_groups(groups)
        for own in self.targets:
            own.take_gradient()
        before = [dict(group) for group in self.inner.param_groups]
        with materialize(self.targets, self.inner.state):
            step_unseen(self.inner)
        self._show_kept(before, groups)
        for own in self.targets:
            own.state = self.inner.state[own.target]
            own.give_update()

    def follow_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Takes over the hyperparameters of the user's ``groups``, where there is a state."""
        for group in self.inner.param_groups if self.inner is not None else ():
            group.update(self._given(groups[group["user_group"]]))

    def _given(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The hyperparameters of a group that are the user's, and not what the class keeps there."""
        given = {k: v for k, v in hyperparameters(group).items() if k not in self._kept and k != "user_group"}
        if "muon" in given and self.unit.index is None:
            given["muon"] = False  # `MuonAdamW` has AdamW update matrices outside of layers
        return given

    def _show_kept(self, before: Sequence[Mapping[str, Any]], groups: Sequence[dict[str, Any]]) -> None:
        """Notes what the step has written into the groups of the optimizer, and copies it into the user's."""
        assert self.inner is not None
        for group, old in zip(self.inner.param_groups, before, strict=True):
            self._kept.update(k for k, v in group.items() if k != "params" and (k not in old or not same(v, old[k])))
            refuse_own_rate(self._class, self._kept)
            groups[group["user_group"]].update({k: copy.deepcopy(group[k]) for k in self._kept if k in group})

    def create(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Makes the masters and the optimizer; the class makes its own state when it first steps."""
        updated: dict[int, dict[str, Any]] = {}
        for own in self.targets:
            if own.group not in updated:
                first = self._initial[own.group] if self._initial else {}
                first = {k: copy.deepcopy(v) for k, v in first.items() if k in self._kept}
                updated[own.group] = {**self._given(groups[own.group]), **first, "user_group": own.group, "params": []}
            updated[own.group]["params"].append(own.begin())
        made: dict[Any, dict[str, Any]] = defaultdict(dict)
        with materialize(self.targets, made):
            self.inner = self._class(list(updated.values()), **self._kwargs)
            made.update(self.inner.state)
        take_exceptions(self.inner, [(own.weights, own.target) for own in self.targets])
        if self._training:
            set_training(self.inner, training=True)
        for own in self.targets:
            own.state = self.inner.state[own.target]

    @torch.no_grad()
    def set_training(self, *, training: bool) -> None:
        """Has a class that keeps other weights for training than for evaluation change to the one or the other."""
        self._training = training
        if self.inner is not None:
            for own in self.targets:
                own.follow_weights()
            set_training(self.inner, training=training)
            for own in self.targets:
                own.give_update()

    @property
    def nbytes(self) -> int:
        return self.state.nbytes

    def state_of(self, position: int) -> dict[str, Any]:
        """State of the parameter at ``position`` in the unit, this rank's part, with its fp32 ``master`` if it has one.

        Empty, if there is none.
        """
        if self.inner is None:
            return {}
        own = self.targets[position]
        master = {} if own.master is None else {MASTER: own.master}
        return {key: own.exact(key, value) for key, value in own.state.items()} | master | self.kept_of(own)

    def kept_of(self, own: ParamState) -> dict[str, Any]:
        """What the class keeps in the parameter group of ``own``, by keys that begin with `GROUP`."""
        if self.inner is None:
            return {}
        group = next(group for group in self.inner.param_groups if group["user_group"] == own.group)
        return {GROUP + key: copy.deepcopy(group[key]) for key in sorted(self._kept) if key in group}

    def keys(self, position: int, groups: Sequence[Mapping[str, Any]]) -> list[str]:
        """The keys that `state_of` will give for a parameter that has a state.

        Raises:
            GrassError: the class cannot say what it keeps.
        """
        own = self.targets[position]
        master = [MASTER] if own.view.dtype in LOW else []
        return [*self._tried(own, groups), *master, *(GROUP + k for k in sorted(self._kept) if k in groups[own.group])]

    def blank(self, position: int, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A state as `state_of` will give it, with zeros in its large tensors.

        Raises:
            GrassError: the class cannot say what it keeps.
        """
        own, group = self.targets[position], groups[self.targets[position].group]
        made = dict(self._tried(own, groups))
        for key, value in made.items():
            if torch.is_tensor(value) and value.numel() > 1:
                shape = own.view.shape if self._elementwise else value.shape
                made[key] = torch.zeros(shape, dtype=value.dtype, device=value.device)
        if own.view.dtype in LOW:
            made[MASTER] = torch.zeros_like(own.view, dtype=torch.float32)
        return made | {GROUP + key: copy.deepcopy(group[key]) for key in sorted(self._kept) if key in group}

    def _tried(self, own: ParamState, groups: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        if own.divided:
            raise GrassError(f"{self._class.__name__} does not work entry by entry, and its state is of DTensors")
        try:
            return stepped(self._step_like(own), *own.stand_in(groups), self._elementwise)
        except Exception as error:
            raise GrassError(f"{self._class.__name__} does not say what it keeps: {error}") from error

    def as_dtensors(self, position: int, state: Mapping[str, Any]) -> dict[str, Any]:
        """What `state_of` or `blank` gave, as torch's distributed checkpoint takes it (`Sharding.as_dtensor`)."""
        own = self.targets[position]
        if not self.shards:
            return dict(state)
        whole, shape = self._sharding.as_dtensor, own.view.shape
        odd = [key for key, value in state.items() if _as_large(key, value) and value.shape != shape]
        if odd and not self._sharding.keeps_whole_state(own.weights):
            raise GrassError(
                f"The {odd[0]} of {own.name} belongs to blocks of this rank's shard: states of {self._class.__name__} "
                "cannot be saved where ranks divide them, since another division has other blocks. Save the model "
                "alone, or use AdamW."
            )
        return {
            key: whole(own.weights, value) if _as_large(key, value) and value.shape == shape else value
            for key, value in state.items()
        }

    def own_parts(self, position: int, state: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's part of a loaded state: the inverse of `as_dtensors`, also of whole tensors.

        Raises:
            ValueError: an entry is of another shape or divided in another way, or lacks although the class needs it.
        """
        own = self.targets[position]
        if odd := [key for key in own.dtypes if key in state and not torch.is_tensor(state[key])]:
            raise ValueError(f"The saved {odd[0]} of {own.name} is {state[odd[0]]!r:.40} and no tensor.")
        found = dict(state)
        blocks = {key for key, at in zip(own.dtypes, own.fields, strict=True) if at.shape != own.view.shape}
        for key, value in state.items() if self.shards else ():
            if _as_large(key, value) and (self._elementwise or key not in blocks):
                try:
                    found[key] = self._sharding.own_part(own.weights, value)
                except ValueError as error:
                    raise ValueError(
                        f"The saved {key} of {own.name} {error}: load it with the model and the wrapper that it was "
                        "saved with."
                    ) from None
        return found

    def load_state(self, states: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> None:
        """Takes over what `state_of` gave for each position; all empty leaves it without a state."""
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
                group = next(group for group in self.inner.param_groups if group["user_group"] == own.group)
                own_values = {k.removeprefix(GROUP): v for k, v in state.items() if k.startswith(GROUP)}
                group.update(copy.deepcopy(own_values))
                self._kept.update(own_values)
                kept = {k: v for k, v in state.items() if k != MASTER and not k.startswith(GROUP)}
                if kept:
                    self.inner.state[own.target] = own.state = {}
                    own.fill(kept, own.counts(self._step_like(own), groups))


def _as_large(key: str, value: Any) -> bool:
    """Whether an entry of a state has one for each entry of the parameter, and is no count."""
    return torch.is_tensor(value) and (value.ndim > 0 or key == MASTER) and not key.startswith(GROUP)


def set_training_of(optimizers: Sequence[UnitOptimizer], sharding: Sharding, *, training: bool) -> None:
    """Calls ``train()`` or ``eval()`` of each, and shows other ranks the weights that this changes."""
    for optimizer in optimizers:
        optimizer.set_training(training=training)
    sharding.publish([optimizer.unit for optimizer in optimizers if optimizer.has_state])
