"""What a part tells while it runs, kept in a file, so that a part that dies has told what it found before."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Told:
    """Checks and figures of one part.

    Args:
        file: is written after each of them.
        tiny: the part runs on the CPU, with small models and stand-ins for CUDA.
        seconds: until the part is ended from outside.
    """

    def __init__(self, file: Path, *, tiny: bool, seconds: float) -> None:
        self.tiny = tiny
        self._file, self._end = file, time.monotonic() + seconds
        self._found: dict[str, Any] = {"figures": {}, "checks": {}, "left out": {}}

    def seconds_left(self) -> float:
        """Until 5 seconds before the part is ended."""
        return self._end - time.monotonic() - 5

    def figure(self, name: str, value: Any) -> None:
        self._found["figures"][name] = value
        self._write()

    def check(self, name: str, holds: bool, **figures: Any) -> None:
        """Says whether something is as it must be, and the figures that show it."""
        self._found["checks"][name] = {"holds": bool(holds), **figures}
        self._write()

    def left_out(self, name: str, why: str) -> None:
        self._found["left out"][name] = why
        self._write()

    def attempt(self, name: str, work: Callable[[], None]) -> None:
        """Runs ``work``. An error of it, or too little time to start it, does not end what comes after it."""
        if self.seconds_left() < 0:
            self.left_out(name, "there was no time left")
            return
        try:
            work()
        except Exception as error:
            self.check(name, False, error=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")

    def machine(self, described: dict[str, Any]) -> None:
        self._found["machine"] = described
        self._write()

    def _write(self) -> None:
        write_json(self._file, self._found)


def write_json(file: Path, content: Any) -> None:
    """Writes the file as a whole or not at all."""
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(file)
