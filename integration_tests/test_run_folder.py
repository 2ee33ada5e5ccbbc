"""launch/finetune.py started twice: while the first start trains, and after it has ended without a checkpoint."""

from __future__ import annotations

import os
import signal

import pytest

from integration_tests.program import check_refused, events, run_program
from integration_tests.test_program_resume import tree_of

pytestmark = pytest.mark.timeout(300)


def test_a_second_start_of_a_run_is_refused_while_it_trains_and_after_its_end(config, folder):
    argv = [["--config", str(config), "name=once", "--resume", "auto", "train.checkpoint=null"]] * 2
    second = []

    def watch(rank, line, pids):
        if line.startswith("step 3/10") and not second:
            second.append(pids[0])
            for pid in pids:  # or it might end meanwhile
                os.kill(pid, signal.SIGSTOP)
            try:
                check_refused(
                    run_program(argv), rf"runs/once is in use by process {pids[0]} on host .*, since .*; wait"
                )
            finally:
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)

    ended = run_program(argv, watch=watch, timeout=150)
    assert [rank.code for rank in ended] == [0, 0] and second, ended[0].err
    run = folder / "runs" / "once"
    assert [event["step"] for event in events(run, "step")] == list(range(1, 11))
    before = tree_of(run)
    check_refused(run_program(argv), r"name='once': the run in .* has ended \(its model is in .*once/model\), and")
    assert tree_of(run) == before and (run / "report.html").exists()
