"""Signals that ask a run to leave: it saves first, at the next step boundary, on all ranks together."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from types import TracebackType
from typing import Any

ASKS = (signal.SIGTERM, signal.SIGUSR1)
"""SIGTERM: a pre-emption, `kill`, a launcher that gives up. SIGUSR1: SLURM's ``--signal=USR1@120``."""

ECHO_SECONDS = 1.0
"""A signal that comes again within this time is the same one: a scheduler signals the whole job, and the launcher
passes it on."""


class LeaveSignals:
    """Notes the first signal; a second one ends the process at once, whatever it is doing. A context manager.

    The second is seen by a thread of its own, since a Python handler waits for the main thread, which may be inside
    a collective.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> LeaveSignals:
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in ASKS:
            self._before[number] = signal.signal(number, lambda *_: None)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._write.close()

    def flags(self) -> list[float]:
        """1 for the signal that has come, 0 for the others: to be summed over the ranks."""
        return [float(self.asked == number) for number in ASKS]

    @staticmethod
    def agreed(flags: list[float]) -> int | None:
        """The signal that some rank has got, from the sums of `flags`: the same on all ranks."""
        return next((number for number, count in zip(ASKS, flags, strict=True) if count), None)

    def _watch(self) -> None:
        while received := self._read.recv(1):
            if (number := received[0]) in ASKS:
                self._note(number)
        self._read.close()

    def _note(self, number: int) -> None:
        if self.asked is None:
            self.asked, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > ECHO_SECONDS:
            sys.stderr.write(f"second {signal.Signals(number).name}: leaving at once\n")
            sys.stderr.flush()
            os._exit(exit_code(number))


def exit_code(number: int) -> int:
    """What a shell, SLURM and Kubernetes take for an end by this signal."""
    return 128 + number
