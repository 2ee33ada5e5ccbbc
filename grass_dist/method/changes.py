"""Which units have changed since which step: what a copy of the model, such as one that generates, has to be given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from grass_dist.errors import ConfigError
from grass_dist.model.discovery import Unit

OTHER = "other"
"""Name of the unit of the parameters that are in none of the method's, which a load may change all the same."""


class ChangeLog:
    """Keeps, for each unit, the number of the step that has changed it last: one int a unit.

    What is changed between two steps counts as changed by the step to come: a copy may have been made just before it.

    After a load the step may be lower than before it. Numbers of steps from before the load then mean other weights,
    and cannot be told from new ones. So all units count as changed until the run is past every step that it has been
    at, and `since` tells too much meanwhile, never too little.

    Args:
        units: in the order in which they are told; `OTHER` follows them, where the model has such parameters.
        model: the units' model. Whatever its `load_state_dict`, or that of a module in it, loads is changed.
    """

    def __init__(self, units: Sequence[Unit], model: nn.Module) -> None:
        known = {id(param) for unit in units for _, param in unit.params}
        others = tuple((name, param) for name, param in model.named_parameters() if id(param) not in known)
        self._units = (*units, *([Unit(OTHER, None, others)] if others else ()))
        self._index = {unit.name: index for index, unit in enumerate(self._units)}
        self._last = [0] * len(self._units)
        self._reached = 0  # the most completed steps so far
        self._handles = self._follow(model)

    def _follow(self, model: nn.Module) -> list[RemovableHandle]:
        unit_of = {id(param): unit for unit in self._units for _, param in unit.params}
        handles = []
        for module in model.modules():
            # With every name of a tied parameter, which one of its modules alone may be given.
            own = {unit.name: unit for p in module.parameters(recurse=False) if (unit := unit_of.get(id(p)))}
            if own:
                handles.append(module.register_load_state_dict_post_hook(_Loaded(self, tuple(own.values()))))
        return handles

    def close(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def end_step(self, step: int, units: Iterable[Unit]) -> None:
        """A step has ended that makes ``step`` completed ones, and has updated ``units``."""
        self._reached = max(self._reached, step)
        self._set(units, step)

    def load(self, step: int) -> None:
        """The run goes on after ``step`` completed steps, with other weights than it had."""
        self._reached = max(self._reached, step)
        self.note()

    def note(self, units: Iterable[Unit] | None = None) -> None:
        """``units``, all by default, have been changed between two steps."""
        self._set(self._units if units is None else units, self._reached + 1)

    def _set(self, units: Iterable[Unit], step: int) -> None:
        for unit in units:
            index = self._index[unit.name]
            self._last[index] = max(self._last[index], step)

    def since(self, step: int) -> tuple[Unit, ...]:
        """
        Raises:
            ConfigError: the run has never been after ``step`` steps.
        """
        if not 0 <= step <= self._reached:
            raise ConfigError(
                "changed_since(step)",
                step,
                f"this process has seen steps 0 to {self._reached} of the run",
                "give what grass.step was when the weights were last taken, and take all of them the first time",
            )
        return tuple(unit for unit, last in zip(self._units, self._last, strict=True) if step < last)


class _Loaded:
    """The hook on a module that holds parameters of units."""

    def __init__(self, log: ChangeLog | None, units: Sequence[Unit]) -> None:
        self._log, self._units = log, units

    def __call__(self, *_: object) -> None:
        if self._log is not None:
            self._log.note(self._units)

    def __reduce__(self) -> Any:
        """A copy or pickle of a model has the hooks, too, and no optimizer: they do nothing."""
        return _Loaded, (None, ())
