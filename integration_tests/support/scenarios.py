"""Scenarios: functions that all ranks run, each written beside the test that asserts what it returned."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from integration_tests.support.ranks import RankFailed, run_ranks

FOLDER: Any = object()
"""Argument of a scenario: it gets the path of an empty folder of its own."""


@dataclass(frozen=True)
class Scenario:
    """A function with its arguments, and the spawn whose ranks call it."""

    spawn: Spawn
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        """The id of the test: arguments, and the number of ranks."""
        given = [_shown(arg) for arg in self.args if arg is not FOLDER]
        given += [f"{name}={_shown(value)}" for name, value in self.kwargs.items()]
        return ", ".join([*given, f"{self.spawn.world_size} ranks"])


class Spawn:
    """Ranks that are started once and run the scenarios of all selected tests, since it is the start that takes time.

    ``SPAWN(function, *args, **kwargs)`` is a scenario: each rank calls ``function(rank, world_size, *args, **kwargs)``.
    If one raises on a rank, the tests of all scenarios of the spawn fail with its traceback.

    Args:
        before: called on each rank before the first scenario.
        timeout: seconds that all scenarios may take together.
    """

    def __init__(self, world_size: int, before: Callable[[], Any] | None = None, timeout: float = 360) -> None:
        self.world_size, self._before, self._timeout = world_size, before, timeout
        self._scenarios: list[Scenario] = []
        self._returned: list[list[Any]] = []
        self._failure = ""

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Scenario:
        return Scenario(self, function, args, kwargs)

    def returned(self, scenario: Scenario, items: Iterable[pytest.Item], folder: Callable[[], Path]) -> list[Any]:
        """What each rank returned from a scenario; the first call runs those of all ``items`` that use this spawn."""
        if not self._returned and not self._failure:
            self._scenarios = [scenario for scenario in _distinct(items) if scenario.spawn is self]
            calls = [
                (s.function, [str(folder()) if arg is FOLDER else arg for arg in s.args], s.kwargs)
                for s in self._scenarios
            ]
            try:
                self._returned = run_ranks(self.world_size, _run_all, self._before, calls, timeout=self._timeout)
            except RankFailed as error:
                self._failure = str(error)
        if self._failure:
            raise RankFailed(self._failure)
        number = self._scenarios.index(scenario)
        return [rank[number] for rank in self._returned]


TWO, FOUR = Spawn(2), Spawn(4)
"""Ranks without DeepSpeed, for all files that test on two or on four."""


def scenarios(*given: Any) -> pytest.MarkDecorator:
    """Runs a test once for each scenario; its fixture ``runs`` is what the ranks returned."""
    return pytest.mark.parametrize("runs", given, indirect=True, ids=str)


def _distinct(items: Iterable[Any]) -> list[Scenario]:
    """The scenarios of tests, each once."""
    found: list[Scenario] = []
    for item in items:
        scenario = item.callspec.params.get("runs") if hasattr(item, "callspec") else None
        if isinstance(scenario, Scenario) and scenario not in found:
            found.append(scenario)
    return found


def _shown(value: Any) -> str:
    return getattr(value, "__name__", str(value).removeprefix("torch."))


def _run_all(rank: int, world_size: int, before: Callable[[], Any] | None, calls: list[tuple]) -> list[Any]:
    if before is not None:
        before()
    returned = []
    for function, args, kwargs in calls:
        try:
            returned.append(function(rank, world_size, *args, **kwargs))
        except BaseException as error:
            error.add_note(f"in the scenario {function.__name__}, {args}, {kwargs}")
            raise
    return returned
