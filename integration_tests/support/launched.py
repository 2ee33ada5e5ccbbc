"""A launcher that is started as a person starts it, with all processes that come of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from integration_tests.support.program import ROOT
from integration_tests.support.ranks import free_port

BIN = Path(sys.executable).parent
PROGRAM = str(ROOT / "launch" / "finetune.py")
ENVIRONMENT = {
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "HOME": os.environ.get("HOME", "/root"),
    "PYTHON": sys.executable,
    "RANKS": "2",
    "HEAD": "grass1",
    "NODES": "2",
    "INTERFACE": "eth0",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "DS_ACCELERATOR": "cpu",
    "PYTHONFAULTHANDLER": "1",
}
"""What a launch script is given that starts two ranks on each of two `Hosts`."""


def torchrun(ranks: int) -> list[str]:
    command = [str(BIN / "torchrun"), "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
    return [*command, PROGRAM]


def deepspeed(ranks: int) -> list[str]:
    command = [str(BIN / "deepspeed"), "--log_level", "warning", "--num_gpus", str(ranks)]
    return [*command, "--master_port", str(free_port()), PROGRAM]


class Launched:
    """Runs ``command`` in a session of its own, with what it writes in ``log``. Nothing of it is there afterwards.

    Args:
        stdout: where stdout goes instead; stderr stays in the log.
    """

    def __init__(self, command: Sequence[str], log: Path, stdout: Any = None, **environ: str) -> None:
        self._token, self._log = f"{os.getpid()}-{time.monotonic_ns()}", log
        own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "LAUNCHED": self._token}
        path = {"PATH": f"{BIN}:{os.environ['PATH']}"}
        plain = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**plain, **own, **path, **environ},
                stdin=subprocess.DEVNULL,
                stdout=file if stdout is None else stdout,
                stderr=file,
                start_new_session=True,
            )

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for pid in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)

    @property
    def said(self) -> str:
        return self._log.read_text()

    def reach(self, text: str, within: float = 120) -> None:
        """Waits until it has written ``text``."""
        deadline = time.monotonic() + within
        while text not in self.said:
            assert time.monotonic() < deadline and self.process.poll() is None, self.said[-3000:]
            time.sleep(0.02)

    def kill_rank(self, rank: int) -> None:
        [pid] = [pid for pid in self._processes() if f"\0RANK={rank}\0".encode() in _environ(pid)]
        os.kill(pid, signal.SIGKILL)

    def signal_all(self, number: int) -> None:
        """As a terminal does."""
        os.killpg(self.process.pid, number)

    def end(self, within: float = 60) -> int:
        """Waits until all its processes are gone; the launcher's exit code."""
        deadline = time.monotonic() + within
        code = self.process.wait(within)
        while left := list(self._processes()):
            assert time.monotonic() < deadline, f"{left} are left: {self.said[-3000:]}"
            time.sleep(0.05)
        return code

    def _processes(self) -> Iterator[int]:
        for entry in Path("/proc").glob("[0-9]*"):
            pid = int(entry.name)
            if f"LAUNCHED={self._token}".encode() in _environ(pid):
                yield pid


def _environ(pid: int) -> bytes:
    """Empty for a process that has ended, or is of somebody else."""
    try:
        return b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""
