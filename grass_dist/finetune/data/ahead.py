"""Prepares the next steps in a thread while a step computes, so that no step waits for its data."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """What a function returns for one step after the other, some steps before it is asked for.

    The order of the calls, and so what they return, is the same with any number of steps ahead.

    Args:
        prepare: is called with the number of each step, in their order, never twice at a time.
        first, last: numbers of the first and the last step. Nothing is prepared for later ones.
        steps: number of steps that may be ready before they are asked for. 0: each is prepared when it is asked for.
    """

    def __init__(self, prepare: Callable[[int], T], first: int, last: int, steps: int) -> None:
        self._prepare, self._next, self._last, self._steps = prepare, first, last, steps
        self._thread = ThreadPoolExecutor(1, "data") if steps else None
        self._ready: deque[Future[T]] = deque()

    def take(self) -> T:
        """Returns what there is for the next step; raises what its preparation has raised."""
        if self._thread is None:
            self._next += 1
            return self._prepare(self._next - 1)
        self._begin(1)
        found = self._ready.popleft().result()
        self._begin(self._steps)
        return found

    def settle(self) -> None:
        """Waits until nothing is being prepared. What has been raised is raised when its step is asked for."""
        wait(self._ready)

    def close(self) -> None:
        """Ends the thread; what is ready is thrown away."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._ready.clear()

    def _begin(self, count: int) -> None:
        """Has the thread prepare steps until so many are ready or under way."""
        assert self._thread is not None
        while len(self._ready) < count and self._next <= self._last:
            self._ready.append(self._thread.submit(self._prepare, self._next))
            self._next += 1
