"""Signals of one process: which are noted, which end it, and which are not its own."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

ONE = """
import os, signal, sys, time
from grass_dist.job.signals import LeaveSignals

def wait(signals):
    deadline = time.monotonic() + 60
    while signals.asked is None and time.monotonic() < deadline:
        time.sleep(0.01)

signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a test run in the background has ignored
with LeaveSignals() as signals:
    if sys.argv[1] == "held":
        signals.hold()
    os.kill(os.getpid(), signal.SIGHUP)
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writer, b"!")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    os.kill(child, signal.SIGTERM)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]), signals.asked, flush=True)
    os.kill(os.getpid(), int(sys.argv[2]))
    wait(signals)
    if sys.argv[1] == "held":
        print(signals.asked, signals.agreed(signals.flags()), flush=True)
        os.kill(os.getpid(), signal.SIGTERM)  # within a second: the same
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def run(*argv: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-c", ONE, *argv], capture_output=True, text=True, timeout=100)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_second_signal_leaves_and_foreign_handlers_stay(number):
    code, out, err = run("held", str(int(number)))
    assert code == 128 + signal.SIGTERM
    assert out == f"15 None\n{int(number)} {int(number)}\n"
    assert err == "SIGTERM a second time: leaving at once\n"


def test_before_there_is_anything_to_save_the_first_leaves():
    code, out, err = run("early", str(int(signal.SIGINT)))
    assert (code, out) == (130, "15 None\n")
    assert err == "SIGINT before the first step: leaving, there is nothing to save\n"
