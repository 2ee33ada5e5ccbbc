"""Handles signals that ask a run to leave: it saves first, at the next step boundary, on all ranks together."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from types import TracebackType
from typing import Any

from grass_dist.job.peers import Peers

ASKS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""SIGTERM: a pre-emption, `kill`, a launcher that gives up. SIGUSR1: SLURM's ``--signal=USR1@120``. SIGINT: Ctrl-C.
SIGHUP: a terminal that was closed."""

ECHO_SECONDS = 1.0
"""A signal that comes again within this time, or another one, is the same: a scheduler or a terminal signals the whole
job, and the launcher passes it on, maybe as SIGTERM."""

TELLS_WITHIN = 30.0
"""Seconds to tell who is lost, before a process that has nothing to save leaves."""


class LeaveSignals:
    """Notes the first signal; a second one ends the process at once, whatever it is doing. A context manager.

    Before `hold` the first one ends it too, since there is nothing to save. A thread of its own sees all signals: a
    handler in Python waits for the main thread, which may be inside a collective. A signal that was ignored when the
    process began, as under ``nohup``, stays ignored.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._since = 0.0
        self._holds = False
        self._peers = Peers()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> LeaveSignals:
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in ASKS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, lambda *_: None)
        # A child would tell this process of its own signals.
        os.register_at_fork(after_in_child=self._restore)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()
        self._write.close()

    def meet(self, peers: Peers) -> None:
        """Makes a signal call the roll from now on: a launcher may send it because a rank has died."""
        self._peers = peers

    def hold(self) -> None:
        """Says that there is something to save from now on: the first signal is noted, and waits for `agreed`."""
        self._holds = True

    def flags(self) -> list[float]:
        """Returns 1 for the signal that has come and 0 for the others, to be summed over the ranks."""
        return [float(self.asked == number) for number in ASKS]

    @staticmethod
    def agreed(flags: list[float]) -> int | None:
        """Returns the signal that some rank has got, from the sums of `flags`: the same on all ranks."""
        return next((number for number, count in zip(ASKS, flags, strict=True) if count), None)

    def _restore(self) -> None:
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
        while self._before:
            signal.signal(*self._before.popitem())

    def _watch(self) -> None:
        while received := self._read.recv(1):
            if (number := received[0]) in ASKS:
                self._note(number)
        self._read.close()

    def _note(self, number: int) -> None:
        if self.asked is None:
            self.asked, self._since = number, time.monotonic()
            self._peers.ask()
            if not self._holds:
                threading.Thread(target=self._leave, args=(number,), name="leave", daemon=True).start()
        elif time.monotonic() - self._since > ECHO_SECONDS:
            _exit(number, "a second time: leaving at once")

    def _leave(self, number: int) -> None:
        """Leaves, unless a rank is lost, which `Peers.guard` tells before it ends the process."""
        self._peers.all_here(TELLS_WITHIN)
        _exit(number, "before the first step: leaving, there is nothing to save")


def exit_code(number: int) -> int:
    """Returns the exit code that a shell, SLURM and Kubernetes take for an end by this signal."""
    return 128 + number


def _exit(number: int, why: str) -> None:
    sys.stderr.write(f"{signal.Signals(number).name} {why}\n")
    sys.stderr.flush()
    os._exit(exit_code(number))
