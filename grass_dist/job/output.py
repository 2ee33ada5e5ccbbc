"""Decides where the ranks write: rank 0 on the terminal, each other rank in a file of its own."""

from __future__ import annotations

import datetime
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import TextIO

from grass_dist.errors import GrassError
from grass_dist.job.guard import Guard, steady_text
from grass_dist.job.world import World


class Output:
    """The output of one rank. Errors of any rank reach the terminal once, with the rank and its host.

    They are also written where torchrun looks for them, for its report.
    """

    def __init__(self, world: World, guard: Guard | None = None) -> None:
        self._world, self._guard = world, guard or Guard()
        self._terminal: TextIO | None = None
        self._file: Path | None = None

    def to_file(self, run: Path) -> None:
        """Makes a rank that is not the main one, and its libraries, write to ``run/logs/rank_N.log`` from now on."""
        if not self._world.is_main:
            file = run / "logs" / f"rank_{self._world.rank}.log"
            with self._guard.around(str(file), "the run goes on, and this rank writes on the terminal"):
                file.parent.mkdir(parents=True, exist_ok=True)
                self._move(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644))
                self._file = file

    def _move(self, log: int) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(line_buffering=True)
        self._terminal = steady_text(os.dup(2), sys.stderr.encoding)
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
        else:
            record_for_launcher(str(error))

    def lost(self, error: GrassError) -> None:
        """Tells that a rank is lost. Others notice it too, and one of them tells it on the terminal."""
        self._tell(str(error), on_terminal=self._world.peers.tells)

    @property
    def _me(self) -> str:
        return f"rank {self._world.rank} (on host {self._world.peers.hosts[self._world.rank]})"

    def _tell(self, text: str, *, on_terminal: bool = True) -> None:
        record_for_launcher(text)
        if on_terminal or self._terminal is not None:
            print(f"error: {text}", file=sys.stderr, flush=True)
        if self._terminal is not None and on_terminal:
            print(f"error: {text}", file=self._terminal, flush=True)


def record_for_launcher(text: str) -> None:
    """Writes a sentence into the file that torchrun's report is made of, if it has named one."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        told = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
        with Guard().around(file, "torchrun's report does not say why this rank ended"):
            Path(file).write_text(json.dumps({"message": told}), encoding="utf-8")
