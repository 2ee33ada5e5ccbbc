"""Where the ranks write, so that a person can read it: rank 0 on the terminal, each other one in a file of its own."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import sys
from pathlib import Path
from typing import TextIO

from grass_dist.errors import GrassError
from grass_dist.training.world import World


class Output:
    """What one rank says. Errors of any rank reach the terminal, once, with the rank and its host."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._terminal: TextIO | None = None
        self._file: Path | None = None

    def to_file(self, run: Path) -> None:
        """From now on a rank that is not the main one writes to ``run/logs/rank_N.log``, and so do its libraries."""
        if self._world.is_main:
            return
        self._file = run / "logs" / f"rank_{self._world.rank}.log"
        self._file.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(self._file, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(line_buffering=True)
        self._terminal = os.fdopen(os.dup(2), "w")
        os.dup2(log, 1)
        os.dup2(log, 2)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        os.write(log, f"--- {self._me} of {self._world.size}, process {os.getpid()}, {now}\n".encode())
        os.close(log)

    def own_error(self, error: BaseException) -> None:
        """Tells an error that this rank alone has."""
        text = str(error) if isinstance(error, GrassError) else f"{type(error).__name__}: {error}"
        log = f" (its log: {self._file})" if self._file and not isinstance(error, GrassError) else ""
        self._tell(f"{self._me}: {text}{log}" if self._world.size > 1 else text)

    def shared_error(self, error: GrassError) -> None:
        """Tells an error that every rank has."""
        if self._world.is_main:
            self._tell(str(error))

    def lost(self, error: GrassError) -> None:
        """Tells that a rank is lost, which others notice too: one of them tells it on the terminal."""
        self._tell(str(error), on_terminal=self._world.peers.tells)

    @property
    def _me(self) -> str:
        return f"rank {self._world.rank} (on host {self._world.peers.hosts[self._world.rank]})"

    def _tell(self, text: str, *, on_terminal: bool = True) -> None:
        if on_terminal or self._terminal is not None:
            print(f"error: {text}", file=sys.stderr, flush=True)
        if self._terminal is not None and on_terminal:
            with contextlib.suppress(OSError):  # the launcher that read it may be gone
                print(f"error: {text}", file=self._terminal, flush=True)
