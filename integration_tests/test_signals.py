"""Signals, deaths and broken terminals under real launchers: what is saved, what is said, and that all end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from grass_dist.checkpoint.loading import newest_good
from integration_tests.support.launched import PROGRAM, Launched, deepspeed, torchrun
from integration_tests.support.program import ROOT, events, make_data, run_program

pytestmark = pytest.mark.timeout(300)

HOST = socket.gethostname()
LONG = ["overwrite=true", "train.max_steps=1000", "train.eval_every=0"]
ADVICE = r"Look at its log; the run can go on with --resume auto\."


def arguments(config, name: str, *more: str) -> list[str]:
    return ["--config", str(config), f"name={name}", *LONG, *more]


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error: ")]


def check_nothing_broke(said: str) -> None:
    assert "terminate called" not in said and "Fatal Python error" not in said, said[-1000:]


@pytest.mark.integration
def test_survivors_name_a_rank_that_is_killed_under_torchrun(config, tmp_path):
    with Launched([*torchrun(3), *arguments(config, "killed", "train.global_batch_size=12")], tmp_path / "log") as run:
        run.reach("step 50/1000")
        run.kill_rank(1)
        assert run.end() == 1
        named = rf"The .* of step \d+ failed: rank 1 \(on host {HOST}\) does not answer\. {ADVICE}"
        [said] = errors(run.said)
        assert re.fullmatch(f"error: {named}", said)
        report = run.said[run.said.index("FAILED\n---") :]  # torchrun's own
        assert len(re.findall(rf"traceback : {named}", report)) == 2 and "Signal 9 (SIGKILL)" in report
        check_nothing_broke(run.said)


@pytest.mark.long
def test_survivors_name_a_rank_that_is_killed_at_the_start(config, tmp_path):
    first = "model.trust_remote_code=true"  # which is said before anything is loaded
    batch = "train.global_batch_size=12"
    with Launched([*torchrun(3), *arguments(config, "early", first, batch)], tmp_path / "log") as run:
        run.reach("may run: model.trust_remote_code is true")
        run.kill_rank(1)
        assert run.end() == 1
        [said] = errors(run.said)
        assert re.search(rf"rank 1 \(on host {HOST}\) does not answer\. {ADVICE}$", said)
        check_nothing_broke(run.said)


@pytest.mark.integration
def test_ranks_whose_launcher_is_killed_end_with_one_sentence(config, tmp_path):
    with Launched([*torchrun(2), *arguments(config, "orphans")], tmp_path / "log") as run:
        run.reach("step 50/1000")
        run.process.kill()
        run.end()
        [said] = errors(run.said)
        lost = r"the launcher on 127\.0\.0\.1, which keeps the store of all ranks, does not answer \(for (\d+) s\)"
        waited = re.search(rf"of step \d+ (?:failed|waited \d+ s in vain): {lost}\. {ADVICE}$", said)
        assert waited is not None and int(waited[1]) <= 30, said  # train.timeout_seconds is 1800
        check_nothing_broke(run.said)


MPIRUN = ["bash", str(ROOT / "launch" / "mpirun.sh")]
PLAIN = [str(Path(sys.executable).parent / "mpirun"), "--allow-run-as-root", "-n", "2"]
PLAIN += ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", sys.executable, PROGRAM]


def some_long(names: Iterable[str], *quick: str) -> list[Any]:
    """The names as parameters of a test; all but ``quick`` are left to `make long`."""
    marks = {name: () if name in quick else pytest.mark.long for name in names}
    assert set(quick) <= set(marks)
    return [pytest.param(name, marks=mark, id=name.replace(" ", "-")) for name, mark in marks.items()]


WAYS = {
    "Ctrl-C under torchrun": (torchrun(2), signal.SIGINT, True, "SIGINT"),
    "a closed terminal under torchrun": (torchrun(2), signal.SIGHUP, False, "SIGHUP"),
    "Ctrl-C under deepspeed": (deepspeed(2), signal.SIGINT, True, "SIG(INT|TERM)"),  # a rank may hear of it so first
    "Ctrl-C under mpirun": (MPIRUN, signal.SIGINT, True, "SIGUSR1"),
    "SIGTERM under mpirun": (MPIRUN, signal.SIGTERM, False, "SIGUSR1"),
    "SIGUSR1 to a plain mpirun": (PLAIN, signal.SIGUSR1, False, "SIGUSR1"),
    "Ctrl-C without a launcher": ([sys.executable, PROGRAM], signal.SIGINT, True, "SIGINT"),
}


@pytest.mark.integration
@pytest.mark.parametrize("way", some_long(WAYS, "Ctrl-C under torchrun", "SIGTERM under mpirun"))
def test_a_launcher_that_is_asked_to_end_lets_the_ranks_save(config, tmp_path, way):
    command, number, to_all, name = WAYS[way]
    folder = way.replace(" ", "-")
    given = arguments(config, folder, *(["parallel=single"] if command[0] == sys.executable else []))
    if command == MPIRUN:
        given = given[2:]
    about = {"CONFIG": str(config), "RANKS": "2", "MPI_ARGS": "--allow-run-as-root", "PYTHON": sys.executable}
    with Launched([*command, *given], tmp_path / "log", **about) as run:
        run.reach("step 50/1000")
        run.signal_all(number) if to_all else os.kill(run.process.pid, number)
        assert run.end() != 0
        assert len(re.findall(rf"^leaving because of {name}; --resume auto goes on$", run.said, re.MULTILINE)) == 1
        saved = newest_good(config.parent / "runs" / folder / "checkpoints")
        assert saved is not None and f"step {saved.step}: saved in " in run.said and saved.step >= 50
        assert errors(run.said) == []
        assert ("mpirun kills its ranks a moment after" in run.said) == (command == PLAIN)
        check_nothing_broke(run.said)


@pytest.mark.integration
def test_a_second_or_an_early_signal_leaves_at_once(config, tmp_path):
    single = ["parallel=single", "train.micro_batch_size=8"]
    with Launched([sys.executable, PROGRAM, *arguments(config, "first", *single)], tmp_path / "first") as run:
        run.reach("step 50/1000")
        for _ in range(2):  # within a second it is the same one
            os.kill(run.process.pid, signal.SIGINT)
        assert run.end() == 130 and "leaving because of SIGINT" in run.said
    early = [sys.executable, PROGRAM, *arguments(config, "second", *single, "model.trust_remote_code=true")]
    with Launched(early, tmp_path / "second") as run:
        run.reach("may run: model.trust_remote_code is true")
        os.kill(run.process.pid, signal.SIGHUP)
        assert run.end() == 129 and "SIGHUP before the first step: leaving, there is nothing to save" in run.said
        check_nothing_broke(run.said)


@pytest.mark.integration
def test_a_signal_in_an_evaluation_is_obeyed_there(config, folder):
    data = make_data(folder / "many.jsonl", 2000)
    more = [f"data.name={data}", "data.eval_examples=1500", "train.eval_every=5", "overwrite=true"]

    def watch(rank, line, pids):
        if line.startswith("step 5/10"):  # the signals of step 5 have been summed; now some forwards
            time.sleep(0.3)
            os.kill(pids[1], signal.SIGTERM)

    ended = run_program([["--config", str(config), "name=evaluation", *more]] * 2, watch=watch)
    assert [rank.code for rank in ended] == [143, 143], ended[0].err
    run = config.parent / "runs" / "evaluation"
    assert newest_good(run / "checkpoints").step == 5
    assert [event["step"] for event in events(run, "eval")] == [0]


@pytest.fixture
def full_disk(folder):
    """Mounts a file system without room at a run's TensorBoard files."""
    mounted = []

    def mount(name: str):
        place = folder / "runs" / name / "tensorboard"
        place.mkdir(parents=True)
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4k", "none", str(place)], capture_output=True
        ).returncode:
            pytest.skip("a file system can only be mounted by root")
        mounted.append(place)
        (place / "fill").write_bytes(bytes(4096))

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=False)


def check_trained(run) -> None:
    """Ten steps, all recorded, a checkpoint and a model."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step"] == list(range(1, 11))
    assert newest_good(run / "checkpoints").step == 10 and (run / "model" / "model.safetensors").exists()


ENDS = ["parallel=single", "train.checkpoint.every=3"]


def test_a_run_goes_on_without_tensorboard_stdout_and_plots(config, tmp_path, full_disk):
    full_disk("full")
    run = config.parent / "runs" / "full"
    (run / "plots").write_text("a file")
    given = ["--config", str(config), "name=full", *ENDS]
    with (
        open("/dev/full", "w") as nothing,
        Launched([sys.executable, PROGRAM, *given], tmp_path / "log", nothing, PYTHONIOENCODING="ascii") as run_,
    ):
        assert run_.end() == 0, run_.said
        warnings = [line for line in run_.said.splitlines() if line.startswith("warning: ")]
        assert len(warnings) == 3 and "Traceback" not in run_.said, run_.said
        assert warnings[0].startswith(
            "warning: TensorBoard: No space left on device; the run goes on, and not all of it"
        )
        assert warnings[1] == "warning: stdout cannot be written (No space left on device); the run goes on."
        assert re.match(
            r"warning: the answer of the model and the report: .*/plots: .*; grass-dist report", warnings[2]
        )
    check_trained(run)


TERMINALS = {
    "closed": "{} >&-",
    "both closed": "{} >&- 2>&-",
    "a pipe that nobody reads": "{} | head -n 1",
    "latin-1": "PYTHONIOENCODING=latin-1 {} > {out}",
    "ascii": "PYTHONIOENCODING=ascii {} > {out}",
}


@pytest.mark.integration
@pytest.mark.parametrize("terminal", some_long(TERMINALS, "both closed", "latin-1"))
def test_a_run_ends_well_on_any_terminal(config, tmp_path, terminal):
    name = terminal.replace(" ", "-")
    program = f"{sys.executable} {PROGRAM} --config {config} name={name} {' '.join(ENDS)}"
    script = f"set -o pipefail; {TERMINALS[terminal].format(program, out=tmp_path / 'out')}"
    with Launched(["bash", "-c", script], tmp_path / "log") as run:
        assert run.end() == 0, run.said
        assert "Traceback" not in run.said and run.said.count("warning: stdout cannot") == ("pipe" in terminal)
    check_trained(config.parent / "runs" / name)
    if (tmp_path / "out").exists():
        strip = r"round 1   [#.]{6}  layers" if terminal == "ascii" else "round 1   [#\xb7.]{6}  layers"
        assert re.search(strip, (tmp_path / "out").read_text("latin-1"))
