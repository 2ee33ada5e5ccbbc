"""Deaths in short: a few runs that are killed and go on to the bit, of which `make soak` takes many."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from integration_tests.support.killed_runs import SETTINGS, Case, Death, Runs, Setting, odd_tensors, play
from integration_tests.support.mortal import MODEL_IS_WRITTEN, start
from integration_tests.support.program import ROOT

pytestmark = pytest.mark.timeout(300)

STEPS = 12
INTERVAL, STREAM = SETTINGS[:2]
"""Both save in the background."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("kills"), STEPS)


@pytest.mark.parametrize(
    ("setting", "moment", "share", "rank", "elastic"),
    [
        pytest.param(INTERVAL, "probe", 0.7, 1, False, marks=pytest.mark.long),
        (INTERVAL, "save: a tensor file half written", 0.5, 0, False),
        pytest.param(INTERVAL, "save: between manifest and rename", 0.7, 0, False, marks=pytest.mark.integration),
        pytest.param(STREAM, "eviction", 0.6, 1, False, marks=pytest.mark.integration),
        (INTERVAL, "update", 0.5, 1, True),
    ],
    ids=["a probe", "half a file", "no rename", "an eviction", "torchrun"],
)
def test_a_run_that_is_killed_goes_on_to_the_bit(
    runs: Runs, setting: Setting, moment: str, share: float, rank: int, elastic: bool
):
    passages = runs.passages(setting, moment, rank)
    death = Death(moment, max(1, round(share * passages)), rank)
    assert play(runs, Case(moment.replace(": ", "-").replace(" ", "-"), setting, death, elastic)) == []


@pytest.mark.long
def test_runs_that_are_killed_at_random_times_go_on_to_the_bit(tmp_path):
    """Torchrun's agent, a rank or all of them; in dcp's format and in DeepSpeed's."""
    command = [sys.executable, "-m", "integration_tests.kills", "--kills", "4", "--seed", "3", "--first", "2"]
    done = subprocess.run([*command, "--keep", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "4 kills (" in done.stdout, done.stdout + done.stderr[-2000:]
    assert "4 resumed to the bit; 0 runs with something wrong" in done.stdout


def test_a_signal_while_the_model_is_written_is_obeyed_then(runs: Runs):
    wanted, run = runs.undisturbed(INTERVAL), runs.run_folder("asked")
    asked = Death(MODEL_IS_WRITTEN, 1, 0).environment(runs.folder / "asked.signal") | {"MORTAL_SIGNAL": "15"}
    ended = start(runs.arguments(INTERVAL, "asked"), asked, runs.folder / "asked.out")
    assert [rank.code for rank in ended] == [128 + signal.SIGTERM] * 2, ended[0].err
    assert (runs.folder / "asked.signal").exists() and "leaving because of SIGTERM: the run has ended" in ended[0].out
    assert odd_tensors(run / "model", wanted / "model") == "" and not list(run.glob(".model*"))
