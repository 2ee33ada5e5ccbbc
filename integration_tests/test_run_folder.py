"""launch/finetune.py started twice, while it trains and after its end, and on a disk without room for the model."""

from __future__ import annotations

import os
import re
import signal
import subprocess

import pytest

from integration_tests.support.program import check_refused, events, run_program, tree_of

pytestmark = pytest.mark.timeout(300)


def test_a_second_start_is_refused_during_and_after_a_run(config, folder):
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


@pytest.mark.integration
def test_a_model_too_large_for_the_disk_is_written_by_going_on(config, folder):
    run, room = folder / "runs" / "small-disk", folder / "room"
    room.mkdir()
    run.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", run], capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root")
    try:
        (run / "checkpoints").symlink_to(room)
        argv = [["--config", str(config), "name=small-disk", "--resume", "auto", "train.checkpoint.every=0"]] * 2
        ended = run_program(argv)
        assert [rank.code for rank in ended] == [1, 1] and not ended[1].err
        [said] = [line for line in ended[0].err.splitlines() if line.startswith("error: ")]
        assert re.search(r"small-disk/model was not written \(.*No space left on device.*\), and nothing", said), said
        assert [path.name for path in room.iterdir()] == ["step-000010"]
        assert not [path for path in run.iterdir() if "model" in path.name]
        subprocess.run(["mount", "-o", "remount,size=20m", run], check=True)
        ended = run_program(argv)
        assert [rank.code for rank in ended] == [0, 0], ended[0].err
        assert "step 10: goes on from" in ended[0].out and (run / "model" / "model.safetensors").exists()
        assert [len(events(run, kind)) for kind in ("step", "end")] == [10, 1]
    finally:
        subprocess.run(["umount", run], check=True)
