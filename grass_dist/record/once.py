"""Tells the errors of what only watches a run: once each, and the run goes on."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from grass_dist.errors import shorten


class Once:
    """Stands around writers: what one of them raises is told once, in its name, and dropped.

    Args:
        tell: takes a sentence; by default it goes to stderr as a warning.
    """

    def __init__(self, tell: Callable[[str], None] | None = None) -> None:
        self._tell = tell or _warn
        self._told: set[str] = set()

    @contextlib.contextmanager
    def around(self, what: str, then: str) -> Iterator[None]:
        """Ends the block at its first error.

        Args:
            what: a name, e.g. "TensorBoard".
            then: what comes of it, without a full stop, e.g. "the run goes on, and its curves have gaps".
        """
        try:
            yield
        except Exception as error:
            self.note(what, then, error)

    def note(self, what: str, then: str, error: BaseException) -> None:
        """Tells an error if it is the first of ``what``."""
        if what not in self._told:
            self._told.add(what)
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            reason = " ".join(reason.split()).rstrip(".") or type(error).__name__
            self._tell(f"{what}: {shorten(reason, 200)}; {then}.")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
