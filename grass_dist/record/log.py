"""The events of a run, on their way to its writers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from grass_dist.events import Event, Refreshed
from grass_dist.method.importance import entropy
from grass_dist.record.once import Once
from grass_dist.record.writers import Writer


class EventLog:
    """Hands each event to its writers, under one guard.

    Args:
        writers: by the name in which their errors are told.
        guard: tells an error of a writer, which costs the run nothing.
    """

    def __init__(self, writers: Mapping[str, Writer], guard: Once) -> None:
        self._writers, self._guard = dict(writers), guard

    def write(self, event: str, step: int, **values: Any) -> None:
        """Writes one event."""
        for name, writer in self._writers.items():
            with self._guarded(name, step):
                writer.write(event, step, values)

    def observe(self, event: Event) -> None:
        """Writes refreshes, and draws as they begin to train, as an observer of the method."""
        if isinstance(event, Refreshed):
            numbers = {"importances": event.importances, "probabilities": event.probabilities, "dropped": event.dropped}
            self.write("refresh", event.step, **numbers, entropy=entropy(event.probabilities))
        else:
            drawn = {"round": event.round, "drawn_at": event.drawn_at, "active_layers": event.active_layers}
            self.write("sample", event.step, **drawn, probabilities=event.probabilities)

    def close(self) -> None:
        for name, writer in self._writers.items():
            with self._guarded(name):
                writer.close()

    def _guarded(self, name: str, step: int = 0) -> contextlib.AbstractContextManager[None]:
        return self._guard.around(name, f"the run goes on, and not all of it is recorded there from step {step} on")
