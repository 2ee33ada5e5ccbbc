"""The update rule of one layer: any torch optimizer class, with fp32 masters where the weights are 16-bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from grass_dist.backends import Backend
from grass_dist.discovery import Unit

ELEMENTWISE = frozenset(
    getattr(torch.optim, name)
    for name in ["Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]
)
"""Update rules that treat each entry by itself, and so give the same on a shard as on the whole."""


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
        backend: says which part of a parameter this rank holds.
    """

    def __init__(
        self,
        unit: Unit,
        group_of: Sequence[int],
        optimizer_class: type[torch.optim.Optimizer],
        kwargs: Mapping[str, Any],
        backend: Backend,
    ) -> None:
        self.unit = unit
        self._group_of = list(group_of)
        self._class, self._kwargs, self._backend = optimizer_class, dict(kwargs), backend
        self._shards = optimizer_class in ELEMENTWISE
        self.inner: torch.optim.Optimizer | None = None
        self.updated: list[nn.Parameter] = []
        """What the optimizer class updates, in the order of ``unit.params``: the parameters' own shards, or masters."""

    @property
    def born(self) -> bool:
        return self.inner is not None

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
                grad = self._backend.local(grad) if self._shards else grad
                target.grad = grad.to(target.dtype)
        self.inner.step()
        for (_, param), target in zip(self.unit.params, self.updated, strict=True):
            if target is not param:
                target.grad = None
                if _is_master(param, target):
                    self._view(param).copy_(target)

    def create(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Makes the masters and the optimizer; the class makes its own state when it first steps."""
        self.updated = [self._target(param) for _, param in self.unit.params]
        own: dict[int, dict[str, Any]] = {}
        for index, target in zip(self._group_of, self.updated, strict=True):
            user = {k: v for k, v in groups[index].items() if k not in ("params", "initial_lr")}
            own.setdefault(index, {**user, "user_group": index, "params": []})["params"].append(target)
        self.inner = self._class(list(own.values()), **self._kwargs)

    def tensors(self) -> list[torch.Tensor]:
        """All state tensors on this rank: masters, and those of the optimizer class."""
        if self.inner is None:
            return []
        masters = [t for (_, p), t in zip(self.unit.params, self.updated, strict=True) if _is_master(p, t)]
        states = [v for t in self.updated for v in self.inner.state[t].values() if torch.is_tensor(v)]
        return [self._backend.local(t.detach()) for t in [*masters, *states]]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors())

    def state_of(self, position: int) -> dict[str, Any]:
        """State of the parameter at ``position`` in the unit, with its fp32 ``master`` where it has one."""
        if self.inner is None:
            return {}
        (_, param), target = self.unit.params[position], self.updated[position]
        master = {"master": target.detach()} if _is_master(param, target) else {}
        return {**self.inner.state[target], **master}

    def load_state(self, states: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> None:
        """Takes over what `state_of` gave for each position; all empty leaves the unit unborn."""
        if not any(states):
            self.inner, self.updated = None, []
            return
        self.create(groups)
        assert self.inner is not None
        with torch.no_grad():
            for target, state in zip(self.updated, states, strict=True):
                if "master" in state:
                    target.copy_(state["master"])
                own = {k: _placed(k, v, target) for k, v in state.items() if k != "master"}
                if own:
                    self.inner.state[target] = own

    def _view(self, param: torch.Tensor) -> torch.Tensor:
        detached = param.detach()
        return self._backend.local(detached) if self._shards else detached

    def _target(self, param: nn.Parameter) -> nn.Parameter:
        view = self._view(param)
        if view.dtype in (torch.bfloat16, torch.float16):
            return nn.Parameter(view.float())
        return param if type(view) is type(param.detach()) else nn.Parameter(view)

    def _follow(self, param: nn.Parameter, target: nn.Parameter) -> None:
        """Keeps a shard's target on the memory of its parameter, should the engine have moved that."""
        if target is param or _is_master(param, target):
            return
        view = self._view(param)
        if view.data_ptr() != target.data_ptr():
            target.data = view


def _placed(key: str, value: Any, target: torch.Tensor) -> Any:
    """A copy of a loaded state entry, where the parameter is; step counts stay where the optimizer class has them."""
    if not torch.is_tensor(value):
        return value
    return value.clone() if key == "step" else value.to(target.device, copy=True)


def _is_master(param: torch.Tensor, target: torch.Tensor) -> bool:
    return target is not param and target.dtype != param.dtype
