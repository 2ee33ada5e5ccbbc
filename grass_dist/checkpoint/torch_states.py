"""State dicts of a `GrassOptimizer`, also those that torch's distributed checkpoint asks for and gives back.

`torch.distributed.checkpoint.state_dict` knows an optimizer by `state`, `step`, `state_dict` and `load_state_dict`:

1. It takes the truth value of ``state``. Where that is False (there is none yet) and there is no gradient, it calls
   `step` with zero gradients and a learning rate of 0, which is to make all states.
2. To save, it takes ``state`` and ``param_groups`` from `state_dict`, and nothing else.
3. To load, it hands over the states of parameters with ``requires_grad`` and drops the others.

So from 1 on (`ask`) until the state dict is given, the loading is done, or the model runs, every parameter of a layer
or role has ``requires_grad``, and the state dict is *complete*: it has a state for each of them, with zeros where there
is none yet, so that its keys do not depend on which layers have trained. The position of the method travels as JSON in
the first parameter group.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from grass_dist.errors import CheckpointError, GrassError, StateError, shorten
from grass_dist.method.controller import GrassController
from grass_dist.method.saved import SETTINGS, check_clock, other_settings, settings_of
from grass_dist.ranks import describe_error
from grass_dist.states.fields import Groups
from grass_dist.states.unit_optimizer import UnitOptimizer
from grass_dist.states.view import StateView

METHOD = "grass"
"""Key of the method's position in a state dict, or in its first parameter group."""

StateDict = dict[str, Any]


def method_of(state_dict: Mapping[str, Any]) -> dict[str, Any] | None:
    """The method's position in a state dict; None if that is another optimizer's."""
    if isinstance(method := state_dict.get(METHOD), dict):
        return method
    texts = (group.get(METHOD) for group in state_dict.get("param_groups", ()))
    return next((json.loads(text) for text in texts if isinstance(text, str) and text), None)


class StateHooks:
    """The hooks that a caller has registered around `state_dict` and `load_state_dict`, as `torch.optim.Optimizer` runs
    them."""

    def __init__(self) -> None:
        self._hooks: dict[str, OrderedDict[int, Callable[..., Any]]] = {}

    def add(self, when: str, hook: Callable[..., Any], prepend: bool) -> RemovableHandle:
        hooks = self._hooks.setdefault(when, OrderedDict())
        handle = RemovableHandle(hooks)
        hooks[handle.id] = hook
        if prepend:
            hooks.move_to_end(handle.id, last=False)
        return handle

    def run(self, when: str, optimizer: torch.optim.Optimizer, *state_dict: StateDict) -> StateDict:
        """Calls the hooks; what one of them returns takes the place of the state dict."""
        for hook in list(self._hooks.get(when, {}).values()):
            if (changed := hook(optimizer, *state_dict)) is not None:
                state_dict = (changed,)
        return state_dict[0] if state_dict else {}


@dataclass(frozen=True)
class Loaded:
    """A state dict that was checked: for each unit the states of its parameters, the groups, and the method."""

    states: Sequence[Sequence[Mapping[str, Any]]]
    groups: Groups
    method: dict[str, Any]

    def must_agree(self) -> dict[str, Any]:
        """What must be equal on all ranks, by the names that an error shows."""
        method, of_rank = self.method, ("of", "measured", "unused", "blank")
        return {
            "The step of the state to load": method["step"],
            "The method's position in the state to load": sorted((k, v) for k, v in method.items() if k not in of_rank),
            "The parameter groups of the state to load": [
                {k: v for k, v in group.items() if k not in ("params", METHOD)} for group in self.groups
            ],
        }


class TorchStates:
    """Makes and checks the state dicts of one optimizer.

    Args:
        model: a forward of which ends what `ask` has begun.
        units: the optimizers of all units, layers first.
        class_name: of the optimizer class.
        view: shows the states.
        borrowed: whether the state of a unit, by its index, lies in memory that another one gets later.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[UnitOptimizer],
        grass: GrassController,
        class_name: str,
        view: StateView,
        borrowed: Callable[[int], bool],
    ) -> None:
        self._model, self._units, self._grass, self._borrowed = model, list(units), grass, borrowed
        self._view = view
        self._settings = settings_of(grass, class_name)
        self._handle: RemovableHandle | None = None
        self._frozen_since: set[int] = set()  # by someone else, what trains
        self._made = False

    # --- what torch's distributed checkpoint asks for

    @property
    def asked(self) -> bool:
        """Whether the next state dict, or the next load, is that of torch's distributed checkpoint."""
        return self._handle is not None

    def ask(self, groups: Groups) -> None:
        """Shows every parameter and the key of the method, which torch else leaves out."""
        if self.asked:
            return
        self._handle = self._model.register_forward_pre_hook(lambda *_: self.answer(groups), prepend=True)
        self._frozen_since = {
            id(p) for unit in self._grass.trainable_units() for _, p in unit.params if not p.requires_grad
        }
        for own in self._targets():
            own.weights.requires_grad_(True)
        self._view.show_all(lambda unit, at: self._keys(unit, at, groups))
        _first(groups)[METHOD] = ""

    def answer(self, groups: Groups) -> None:
        """Ends what `ask` has begun: what is frozen is frozen again."""
        if self._handle is None:
            return
        self._handle.remove()
        self._handle = None
        self._view.show_own()
        _first(groups).pop(METHOD, None)
        trains = {id(p) for unit in self._grass.trainable_units() for _, p in unit.params} - self._frozen_since
        for own in self._targets():
            own.weights.requires_grad_(id(own.weights) in trains)

    def makes_states(self, groups: Groups) -> bool:
        """Whether a step is torch's way to have states made: with learning rates of 0, and a gradient of zeros for
        every parameter. In a probe, and where layers are frozen, no backward leaves that.
        """
        if not self.asked or any(float(group["lr"]) for group in groups if "lr" in group):
            return False
        grass, grads = self._grass, [own.weights.grad for own in self._targets()]
        if grass.arrived and grass.phase == "train" and len(grass.trainable_units()) == len(self._units):
            return False
        local = grass.backend.sharding.local
        self._made = all(grad is not None and not bool(local(grad).any()) for grad in grads)
        return self._made

    def made(self) -> bool:
        """Whether the last step has made states, after which torch drops the gradients that it has put there."""
        made, self._made = self._made, False
        return made

    # --- to save

    def save(self, groups: Groups) -> dict[str, Any]:
        """The state dict: of what has a state, or the complete one where torch has asked for it.

        Over the wire, where it was asked for and each rank has measured its own shards: one all-reduce of T × γ fp64.
        """
        position = _positions(groups)
        state: dict[int, dict[str, Any]] = {}
        blank: list[int] = []
        for index, unit in enumerate(self._units):
            for at, own in enumerate(unit.targets):
                kept, made = self._complete(unit, at, groups) if self.asked else (unit.state_of(at), False)
                if self._borrowed(index):
                    kept = {key: _copied(value) for key, value in kept.items()}
                if made:
                    blank.append(position[id(own.weights)])
                if kept:
                    state[position[id(own.weights)]] = unit.as_dtensors(at, kept)
        saved: dict[str, Any] = {"state": dict(sorted(state.items())), "param_groups": _packed(groups)}
        if self.asked:
            method = self._totals(self._grass.state_dict())
            text = json.dumps({**method, SETTINGS: self._settings, "blank": blank, "total": True})
            _first(saved["param_groups"])[METHOD] = text
        else:
            saved[METHOD] = {**self._grass.state_dict(), SETTINGS: self._settings, "of": self._of()}
        return saved

    def _complete(self, unit: UnitOptimizer, at: int, groups: Groups) -> tuple[dict[str, Any], bool]:
        """The state of a parameter, and whether it is one that was made because there is none."""
        own = unit.targets[at]
        if unit.inner is not None and (own.state or not own.fields):
            return unit.state_of(at), False
        try:
            return unit.blank(at, groups), True
        except GrassError:  # a class that cannot say is saved and loaded without what it has not made yet
            return {}, True

    def _of(self) -> list[int] | None:
        """The rank and number of ranks that a state dict of shards is of; None if every rank has the whole."""
        sharding = self._grass.backend.sharding
        if all(sharding.keeps_whole_state(own.weights) for own in self._targets()):
            return None
        return [sharding.ranks.rank, sharding.ranks.world_size]

    def _totals(self, method: dict[str, Any]) -> dict[str, Any]:
        """The method's position with the measurements of all ranks together."""
        rows, backend = method["measured"]["rows"], self._grass.backend
        if rows:
            mine = torch.tensor([value for row in rows for value in row], dtype=torch.float64)
            alike = backend.measures_alike
            total = mine * backend.ranks.world_size if alike else backend.ranks.sum_over_ranks(mine)
            parts = torch.split(total, [len(row) for row in rows])  # rows may differ, by active_parameters
            method = {**method, "measured": {**method["measured"], "rows": [part.tolist() for part in parts]}}
        return method

    # --- to load

    def check(self, state_dict: Mapping[str, Any], groups: Groups) -> Loaded:
        """Checks a state dict and takes this rank's part of it. Changes nothing.

        Raises:
            StateError: this optimizer cannot go on from it.
        """
        try:
            return self._checked(state_dict, groups)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise StateError(
                f"The state dict is damaged, or of another kind ({describe_error(error)}); load one that a "
                "GrassOptimizer gave."
            ) from error
        except (ValueError, CheckpointError) as error:
            raise StateError(str(error)) from None

    def _checked(self, state_dict: Mapping[str, Any], groups: Groups) -> Loaded:
        saved = state_dict.get("param_groups", ())
        method = self._method(state_dict)
        self._check_method(method)
        sizes, own = ([len(g["params"]) for g in which] for which in (saved, groups))
        if sizes != own:
            raise ValueError(
                f"The saved state is of parameter groups with {shorten(str(sizes), 80)} parameters, this optimizer's "
                f"have {shorten(str(own), 80)}; build it with the same model and groups."
            )
        keys = list(chain.from_iterable(g["params"] for g in saved))
        at_place = _positions(groups)
        blank = {keys[place] for place in method.get("blank", ())}
        found = {key: state for key, state in state_dict["state"].items() if key not in blank}
        if strange := sorted(map(str, found.keys() - set(keys))):
            raise ValueError(
                f"The saved state has states of {len(strange)} parameters that are in none of its groups "
                f"({shorten(strange[0], 80)}, ...); load one that a GrassOptimizer gave."
            )
        states, lacking = [], []
        for unit in self._units:
            own_keys = [keys[at_place[id(target.weights)]] for target in unit.targets]
            states.append([self._own(unit, at, found.get(key, {}), groups) for at, key in enumerate(own_keys)])
            if "blank" in method:
                there = [
                    key in found or key in blank or not self._keys(unit, at, groups) for at, key in enumerate(own_keys)
                ]
                lacking += [key for key, known in zip(own_keys, there, strict=True) if not known]
        if lacking:
            raise ValueError(
                f"The state dict lacks the states of {len(lacking)} parameters ({lacking[0]}, ...), which torch leaves "
                "out where a parameter is frozen; call torch.distributed.checkpoint's functions with this optimizer, "
                "or load what its own state_dict() gave."
            )
        return Loaded(states, saved, self._mine(method))

    def _method(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        if (method := method_of(state_dict)) is not None:
            return method
        raise ValueError(
            "The state dict has no position of the method (its entry 'grass'), as that of another optimizer has none; "
            "load one that a GrassOptimizer gave, or begin without a state."
        )

    def _check_method(self, method: Mapping[str, Any]) -> None:
        if told := other_settings(method, self._settings):
            raise ValueError(told)
        of, mine = method.get("of"), self._of()
        if of is not None and mine is not None and list(of) != mine:
            raise ValueError(
                f"The saved state is that of rank {of[0]} of {of[1]}, and this is rank {mine[0]} of {mine[1]}: each "
                "rank loads what it has saved itself; for other ranks use torch.distributed.checkpoint with "
                "get_optimizer_state_dict, or grass_dist.AsyncCheckpointer."
            )
        self._grass.check_layers(method)
        check_clock(self._grass, method)

    def _own(self, unit: UnitOptimizer, at: int, state: Mapping[str, Any], groups: Groups) -> dict[str, Any]:
        own = unit.own_parts(at, state)
        if own and (lacking := sorted(set(self._keys(unit, at, groups)) - set(own))):
            raise ValueError(
                f"The saved state of {unit.targets[at].name} has no {', '.join(lacking)}, which this optimizer keeps; "
                "load it with the optimizer class, its arguments and the dtype of the weights that it was saved with."
            )
        return own

    @staticmethod
    def _keys(unit: UnitOptimizer, at: int, groups: Groups) -> list[str]:
        """The keys of a parameter's state; none, if its class keeps nothing or cannot say what."""
        try:
            return unit.keys(at, groups)
        except GrassError:
            return []

    def _mine(self, method: dict[str, Any]) -> dict[str, Any]:
        """The method's position with this rank's share of the measurements."""
        rows, ranks = method["measured"]["rows"], self._grass.backend.ranks
        if not (rows and method.get("total")) or ranks.world_size == 1:
            return method
        share = 1 / ranks.world_size if self._grass.backend.measures_alike else float(ranks.rank == 0)
        rows = [[value * share if share else 0.0 for value in row] for row in rows]
        return {**method, "measured": {**method["measured"], "rows": rows}}

    def _targets(self) -> list[Any]:
        return [own for unit in self._units for own in unit.targets]


def _first(groups: Groups) -> dict[str, Any]:
    return next(group for group in groups if group["params"])


def _positions(groups: Groups) -> dict[int, int]:
    return {id(p): i for i, p in enumerate(chain.from_iterable(g["params"] for g in groups))}


def _packed(groups: Groups) -> list[dict[str, Any]]:
    """The groups with the positions of their parameters."""
    packed, start = [], 0
    for group in groups:
        count = len(group["params"])
        packed.append({**{k: v for k, v in group.items() if k != METHOD}, "params": list(range(start, start + count))})
        start += count
    return packed


def _copied(value: Any) -> Any:
    """Makes a copy in host memory: a slot on the device holds another layer's state later."""
    return value.detach().to("cpu", copy=True) if torch.is_tensor(value) else value
