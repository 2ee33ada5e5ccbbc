"""What only watches a run fails without ending it: writers, threads, the record, stdout and stderr."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import pytest

from grass_dist.finetune.metrics import MetricsLog
from grass_dist.finetune.progress import Reporter
from grass_dist.job.guard import Guard


def test_an_error_is_told_once_in_the_name_of_what_failed():
    told: list[str] = []
    guard = Guard(told.append)
    for error in (OSError(28, "No space left on device", "x"), ValueError("later"), SystemExit(1)):
        with guard.around("the board", "its curves have gaps"):
            raise error
    with guard.around("the display", "nothing is shown"):
        raise ValueError("a sentence\nof two lines.")
    assert told == [
        "the board: No space left on device; its curves have gaps.",
        "the display: a sentence of two lines; nothing is shown.",
    ]
    with pytest.raises(KeyboardInterrupt), guard.around("the board", ""):
        raise KeyboardInterrupt


def test_a_thread_that_a_writer_has_begun_fails_in_its_name(capsys):
    told: list[str] = []
    guard, go = Guard(told.append), threading.Event()

    def fail() -> None:
        go.wait(10)
        raise OSError(28, "No space left on device")

    with guard.around("a writer", "it is given up"):
        later = threading.Thread(target=fail)
        later.start()
    foreign = threading.Thread(target=lambda: [][0])
    foreign.start()
    foreign.join()
    assert told == [] and "IndexError" in capsys.readouterr().err  # nobody's, and shown as ever
    go.set()
    later.join()
    with guard.around("another", "it is given up"):
        at_once = threading.Thread(target=fail)
        at_once.start()
        at_once.join()
    assert told == [
        "a writer: No space left on device; it is given up.",
        "another: No space left on device; it is given up.",
    ]
    assert capsys.readouterr().err == ""


def test_a_writer_of_later_costs_the_run_nothing(tmp_path, capsys):
    class Late:
        def write(self, event, step, values):
            raise ConnectionError("the server is gone")

        def close(self):
            raise ConnectionError("the server is gone")

    log = MetricsLog(tmp_path, {})
    log._writers = {"a service": Late(), **log._writers}
    log.write("step", 3, loss=1.0)
    log.write("step", 4, loss=0.5)
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [3, 4]
    assert capsys.readouterr().err == (
        "warning: a service: the server is gone; the run goes on, and not all of it is recorded there from step 3 on.\n"
    )


def test_a_display_that_fails_costs_the_run_nothing(monkeypatch, capsys):
    class Broken:
        encoding = "ascii"

        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")  # upon which rich leaves by SystemExit

        def flush(self): ...
        def isatty(self):
            return False

        def fileno(self):
            raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(sys, "stdout", Broken())
    with Reporter(10, 4, speaks=True) as reporter:
        reporter.step(10, "train", 1.0, 0.1)
        reporter.say("done")
    assert capsys.readouterr().err.startswith("warning: the display: ")


RECORD = """
import json, resource, sys
from pathlib import Path
from grass_dist.record.writers import JsonLines

path = Path(sys.argv[1])
lines = JsonLines(path)
lines.write("step", 1, {"loss": float("nan")})
small = lines.nbytes + 10
resource.setrlimit(resource.RLIMIT_FSIZE, (small, -1))  # as a disk that fills in the midst of a line
for step in (2, 3):
    try:
        lines.write("step", step, {"loss": 0.5})
    except OSError:
        print("left out", step, lines.nbytes == path.stat().st_size)
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
lines.write("step", 4, {"loss": [1.0]})
again = JsonLines(path, keep=small - 10)
again.write("step", 2, {"loss": 2.0})
assert again.nbytes == path.stat().st_size
"""


def test_a_record_on_a_full_disk_has_whole_lines_only(tmp_path):
    file = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", RECORD, str(file)], capture_output=True, text=True, timeout=100)
    assert done.stdout == "left out 2 True\nleft out 3 True\n", done.stderr
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == [{"event": "step", "step": 1, "loss": None}, {"event": "step", "step": 2, "loss": 2.0}]


STREAMS = """
import os, sys
from grass_dist.job.guard import steady_streams

kept = [os.dup(number) for number in (1, 2)]
def put(path, number):
    other = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(other, number)
    os.close(other)

put("/dev/full", 1)
sys.stdout = os.fdopen(1, "w", encoding="ascii")  # a program's own, which closes its descriptor when nobody has it
steady_streams()
print("lost", flush=True)
print("lost", flush=True)
os.dup2(kept[0], 1)
print("there is room again: \\u2588 \\udcff", flush=True)
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 2)  # a pipe that nobody reads
print("lost", file=sys.stderr)
os.dup2(kept[1], 2)
os.close(0)
os.close(1)
sys.stdout = None  # as the interpreter leaves it where 1 is closed
steady_streams()
print("nowhere", flush=True)
with open(sys.argv[1]) as file:
    print(file.fileno() > 2, file=sys.stderr)
"""


def test_streams_that_fail_are_told_on_the_other_and_tried_again(tmp_path):
    (tmp_path / "file").touch()
    argv = [sys.executable, "-c", STREAMS, str(tmp_path / "file")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        r"there is room again: \u2588 \udcff",
        "warning: stderr cannot be written (Broken pipe); the run goes on.",
    ]
    assert done.stderr.splitlines() == [
        "warning: stdout cannot be written (No space left on device); the run goes on.",
        "True",
    ]
