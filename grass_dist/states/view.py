"""`GrassOptimizer.state`: shows each parameter's state, and takes over what a caller has changed in it."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from grass_dist.states.layer_state import MASTER
from grass_dist.states.unit_optimizer import GROUP, ParamState, UnitOptimizer

PutState = Callable[[int, Sequence[Mapping[str, Any]]], None]
"""Replaces the state of a unit, by its index, by one for each of its parameters."""


class ShownStates(dict[nn.Parameter, dict[str, Any]]):
    """State by parameter; a parameter without one gets an empty dict when it is asked for, as in any optimizer.

    torch's distributed checkpoint asks for its truth value before it takes or gives a state dict; that is how
    `GrassOptimizer` knows that nothing may lack in it (`TorchStates`). A copy is a plain dict.

    Args:
        asked: a method, held weakly, that is called when the truth value is asked for.
    """

    def __init__(self, asked: Callable[[], None]) -> None:
        super().__init__()
        self._asked = weakref.WeakMethod(asked)

    def __missing__(self, param: nn.Parameter) -> dict[str, Any]:
        made = self[param] = {}
        return made

    def __bool__(self) -> bool:
        some = len(self) > 0
        if (asked := self._asked()) is not None:
            asked()
        return some

    def __reduce_ex__(self, protocol: Any) -> Any:
        return defaultdict, (dict, dict(self))


class StateView:
    """Keeps `ShownStates` and the states of the units the same, whoever has changed one of them.

    Args:
        units: layers first.
        put: replaces the state of a unit by one for each of its parameters.
        moves: whether the states of layers rest in memory of this library's, which a caller's tensors are copied to.
        asked: see `ShownStates`.
    """

    def __init__(
        self, units: Sequence[UnitOptimizer], put: PutState, *, moves: bool, asked: Callable[[], None]
    ) -> None:
        self._units, self._put, self._moves = units, put, moves
        self.shown = ShownStates(asked)
        self._lent = False  # a caller has it, and may change something at any time
        self._guests: list[tuple[nn.Parameter, str]] = []

    def show(self, unit: UnitOptimizer) -> None:
        """Makes ``shown[param]`` the very dict in which the unit's optimizer keeps that parameter's state."""
        for own in unit.targets:
            if unit.inner is not None:
                self.shown[own.weights] = own.state
            else:
                self.shown.pop(own.weights, None)

    def lend(self) -> ShownStates:
        """What a caller may read and change from now on."""
        self._lent = True
        return self.shown

    def replace(self, states: Mapping[Any, dict[str, Any]]) -> None:
        """A caller has assigned another mapping."""
        given = dict(states)
        self.shown.clear()
        self.shown.update(given)
        self._lent = True

    def show_all(self, keys: Callable[[UnitOptimizer, int], Sequence[str]]) -> None:
        """Shows every key that a state dict has, for every parameter, until `show_own`: masters, and None for what is
        not there yet.
        """
        for unit in self._units:
            for at, own in enumerate(unit.targets):
                mine, there = self.shown[own.weights], unit.state_of(at)
                for key in (*keys(unit, at), *there):
                    if key not in mine:
                        mine[key] = there.get(key)
                        self._guests.append((own.weights, key))

    def show_own(self) -> None:
        """Takes back what `show_all` has added, but for what a caller has put in its place."""
        for param, key in self._guests:
            mine = self.shown.get(param, {})
            if key in mine and (mine[key] is None or key == MASTER or key.startswith(GROUP)):
                del mine[key]
        for param in dict.fromkeys(param for param, _ in self._guests):
            if param in self.shown and not self.shown[param] and not self._has_state(param):
                del self.shown[param]
        self._guests.clear()

    def _has_state(self, param: nn.Parameter) -> bool:
        return any(own.weights is param and own.param is not None for unit in self._units for own in unit.targets)

    def adopt(self) -> None:
        """Takes over what a caller has changed: entries and states that were replaced, added or taken away.

        Raises:
            ValueError: an entry that was put there is no state of its parameter. Nothing has been taken over.
        """
        if not self._lent or self._guests:
            return
        wanted = {
            index: [self._wanted(unit, at) for at in range(len(unit.targets))]
            for index, unit in enumerate(self._units)
            if any(map(self._changed, unit.targets))
        }
        for index, states in wanted.items():
            unit = self._units[index]
            if unit.inner is None or self._moves:
                copies = [{k: v.clone() if torch.is_tensor(v) else v for k, v in state.items()} for state in states]
                for own in unit.targets:
                    own.come_home()
                self._put(index, [own | self._kept_of(unit, at) for at, own in enumerate(copies)])
                continue
            for own, state in zip(unit.targets, states, strict=True):
                mine = self.shown[own.weights]
                mine.update(state)
                own.state = unit.inner.state[own.target] = mine
            self.show(unit)

    def _changed(self, own: ParamState) -> bool:
        mine = self.shown.get(own.weights)
        if own.param is None or mine is None:
            return bool(mine) or bool(own.state)
        if mine is not own.state:
            return True
        return any(
            own.left(key) or (value is not own.homes[key] and value is not own.last_homes.get(key))
            if key in own.homes
            else _is_foreign(value, own)
            for key, value in mine.items()
            if key in own.dtypes and key != MASTER
        )

    def _wanted(self, unit: UnitOptimizer, at: int) -> dict[str, Any]:
        """What the state of a parameter is to be, as this rank keeps it."""
        own, found = unit.targets[at], {}
        for key, value in self.shown.get(own.weights, {}).items():
            large = key in own.dtypes
            if large and not torch.is_tensor(value):
                raise ValueError(
                    f"optimizer.state of {own.name} has {value!r:.40} as {key}, which is a tensor of the parameter's "
                    "shape; put one there, or clear the state."
                )
            found[key] = unit.own_parts(at, {key: value})[key] if large and _is_foreign(value, own) else value
        return found

    def _kept_of(self, unit: UnitOptimizer, at: int) -> dict[str, Any]:
        """What is no part of what is shown: the master, and what the class keeps in its group."""
        own = unit.targets[at]
        master = {} if own.master is None else {MASTER: own.master.clone()}
        return master | unit.kept_of(own)


def _is_foreign(value: Any, own: ParamState) -> bool:
    """Whether a value is no plain tensor of the shape of this rank's part: the whole, or a DTensor, or none at all."""
    return not torch.is_tensor(value) or value.shape != own.view.shape or hasattr(value, "to_local")
