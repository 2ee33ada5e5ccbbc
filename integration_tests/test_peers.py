"""A rank that is killed, stopped or stuck ends all others, with a sentence that names it; ranks can be restarted."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from grass_dist.errors import GrassError
from grass_dist.job.peers import Peers, lost_peer, of_collective
from grass_dist.job.world import _agree_on_start
from integration_tests.support.peers import Ended, Scene, play
from integration_tests.support.program import ROOT
from integration_tests.support.ranks import free_port

pytestmark = pytest.mark.timeout(90)

HOST = re.escape(socket.gethostname())
REDUCTION = "error: The gradient reduction of step 2"
ADVICE = r"Look at its log; the run can go on with --resume auto\.$"


def check_said(ended: Ended, message: str, within: float) -> None:
    """The rank ended in time with status 1, and said one sentence, which matches ``message``."""
    assert ended.code == 1, ended.err
    assert len(ended.said) == 1 and re.match(message, ended.said[0]), ended.err
    assert "Traceback" not in ended.err
    assert ended.seconds < within


@pytest.mark.long
def test_healthy_ranks_end_quietly(tmp_path):
    for ended in play(Scene(3, timeout=30), tmp_path, within=40):
        assert ended.code == 0 and ended.err == "", ended.err


def test_a_rank_that_is_stopped_is_named_by_the_others(tmp_path):
    ended = play(Scene(3, victim=1, blow=signal.SIGSTOP, answers_within=3), tmp_path, within=40)
    said = rf"{REDUCTION} did not end within 5 s: rank 1 \(on host {HOST}\) does not answer\. {ADVICE}"
    for rank in (0, 2):
        check_said(ended[rank], said, within=20)


def test_a_rank_that_is_killed_is_named_long_before_the_timeout(tmp_path):
    # In a ring of five two ranks alone are connected to it: the others hear of it from these.
    ended = play(Scene(5, victim=1, blow=signal.SIGKILL, timeout=60, answers_within=3), tmp_path, within=40)
    assert ended[1].code == -signal.SIGKILL
    for rank in (0, 2, 3, 4):
        check_said(ended[rank], rf"{REDUCTION} failed: rank 1 \(on host {HOST}\) does not answer\. {ADVICE}", within=20)


def test_a_rank_that_keeps_the_store_is_named_when_it_is_stopped(tmp_path):
    ended = play(Scene(3, victim=0, blow=signal.SIGSTOP, answers_within=3), tmp_path, within=40)
    said = rf"rank 0 \(on host {HOST}\), which keeps the store of all ranks, does not answer\. {ADVICE}"
    for rank in (1, 2):
        check_said(ended[rank], rf"{REDUCTION} did not end within 5 s: {said}", within=20)


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_where_nothing_has_a_timeout(tmp_path, victim):
    scene = Scene(3, victim=victim, blow=signal.SIGSTOP, answers_within=3, patient=True)
    ended = play(scene, tmp_path, within=60)
    keeps = "" if victim else ", which keeps the store of all ranks,"
    said = rf"rank {victim} \(on host {HOST}\){keeps} does not answer\. {ADVICE}"
    for rank in {0, 1, 2} - {victim}:
        check_said(ended[rank], rf"{REDUCTION} waited (\d+) s in vain: {said}", within=30)
        told = re.search(r"waited (\d+) s", ended[rank].said[0])
        assert told is not None and 5 <= int(told[1]) <= ended[rank].seconds + 1  # the true time


@pytest.mark.long
def test_a_rank_that_is_killed_with_the_store_is_named(tmp_path):
    ended = play(Scene(3, victim=0, blow=signal.SIGKILL, timeout=60), tmp_path, within=40)
    said = rf"rank 0 \(on host {HOST}\), which keeps the store of all ranks, does not answer\. {ADVICE}"
    for rank in (1, 2):
        check_said(ended[rank], rf"{REDUCTION} failed: {said}", within=20)


@pytest.mark.long
def test_a_rank_stuck_elsewhere_is_named_with_what_it_does(tmp_path):
    ended = play(Scene(3, victim=1), tmp_path, within=40)
    said = rf"rank 1 \(on host {HOST}\) was still at reading the data of step 2\. {ADVICE}"
    for rank in (0, 2):
        check_said(ended[rank], rf"{REDUCTION} did not end within 5 s: {said}", within=20)


@pytest.mark.integration
def test_a_rank_that_came_back_is_no_alarm_but_the_next_lost_is(tmp_path):
    stopped = {"victim": 1, "blow": signal.SIGSTOP, "wakes_after": 8, "patient": True, "answers_within": 10}
    ended = play(Scene(3, next_victim=2, **stopped), tmp_path, within=90)
    assert ended[2].code == -signal.SIGKILL
    for rank in (0, 1):
        third = REDUCTION.replace("step 2", "step 3")
        check_said(ended[rank], rf"{third} failed: rank 2 \(on host {HOST}\) does not answer\. {ADVICE}", within=60)


def test_torchrun_restarts_the_ranks_after_one_is_killed(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
    command += ["--master-port", str(free_port()), "-m", "integration_tests.support.peers", str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as launcher:
        try:
            err = launcher.communicate(timeout=80)[1]
        finally:
            launcher.terminate()  # it ends its ranks
    assert launcher.returncode == 0, err
    assert {file.name for file in tmp_path.glob("done.*")} == {"done.1.0", "done.1.1"}
    assert {file.read_text() for file in tmp_path.glob("joined.*")} == {"2"} and len(list(tmp_path.iterdir())) == 6


def test_ranks_that_take_each_others_seat_are_refused_on_each():
    join = "import datetime; from grass_dist.job.world import World; World.join(datetime.timedelta(seconds=30))"
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", join],
            cwd=ROOT,
            env={**os.environ, **where, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = f"GrassError: ranks 0 and 1 on host {socket.gethostname()} are both number 0 there; start all ranks of a"
    for rank in ranks:
        assert said in rank.communicate(timeout=60)[1] and rank.returncode == 1


def test_a_rank_does_not_wait_for_ever_for_a_silent_store():
    join = "import datetime; from grass_dist.job import world; world._GRACE = 1; "
    join += "world.World.join(datetime.timedelta(seconds=1))"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(silent.getsockname()[1]), "WORLD_SIZE": "2"}
        environ = {**os.environ, **where, "LOCAL_RANK": "1", "RANK": "1"}
        ended = subprocess.run(
            [sys.executable, "-c", join], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60
        )
    assert ended.returncode == 1 and ended.stderr.startswith("Timeout (0:00:03)!") and "_meet" in ended.stderr


def agreed(store: dist.Store, size: int) -> set[str]:
    names: list[str] = []
    threads = [
        threading.Thread(target=lambda r=r: names.append(_agree_on_start(store, r, size, timedelta(seconds=20))))
        for r in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names) == size
    return set(names)


def test_ranks_agree_on_a_start_in_a_store_already_used():
    store = dist.HashStore()
    starts = [agreed(store, size) for size in (3, 3, 2, 4)]
    assert all(len(names) == 1 for names in starts) and len(set.union(*starts)) == 4
    with pytest.raises(GrassError, match=r"rank 1 of 2 did not join within 0\.1 s"):  # it has, but earlier
        _agree_on_start(store, 0, 2, timedelta(seconds=0.1))


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"
ERRORS = {
    "killed": RuntimeError(GLOO + "pair.cc:553] Connection closed by peer [127.0.0.1]:20908. This is typically …"),
    "reset": RuntimeError(GLOO + "pair.cc:537] Read error [127.0.0.1]:20908: Connection reset by peer. This is …"),
    "late": RuntimeError(GLOO + "unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete"),
    "store": dist.DistStoreError("wait timeout after 5000ms, keys: /default_pg/0/1"),
    "network": dist.DistNetworkError("Connection reset by peer"),
    "NCCL": dist.DistBackendError("Watchdog caught collective operation timeout: ran for 5000 milliseconds before …"),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS.keys())
def test_errors_of_collectives_are_known(error):
    assert of_collective(error)
    wrapped = ValueError("wrapped")
    wrapped.__cause__ = error
    assert of_collective(wrapped)
    assert not of_collective(RuntimeError("shapes do not match"))
    assert not of_collective(ValueError(str(error)))


def sentence(rank: int, peers: Peers, error: BaseException) -> str:
    return str(lost_peer(peers, error))


def test_several_silent_ranks_and_their_hosts():
    peers = Peers(0, ["a", "b", "b", "c"], dist.HashStore(), answers_within=0.2)
    said = sentence(0, peers, ERRORS["NCCL"])
    assert said == (
        "A collective did not end within 5 s: ranks 1, 2, 3 (on hosts b, c) do not answer. Look at their logs."
    )


def test_the_rank_whose_error_came_first_is_named_if_all_answer():
    store = dist.HashStore()
    ranks = [Peers(rank, ["a", "b"], store, answers_within=5) for rank in (0, 1)]
    error = ERRORS["killed"]
    with pytest.raises(RuntimeError), ranks[0].during("the start"), ranks[0].during("the forward of step 3"):
        raise error
    first = sentence(0, ranks[0], error)
    assert first.startswith("The forward of step 3 failed: all ranks are there, and the error was: [/pytorch/")
    second = sentence(1, ranks[1], ERRORS["reset"])
    assert second == "A collective failed: rank 0 (on host a) failed before, in the forward of step 3. Look at its log."


def test_a_roll_that_all_answer_is_no_end_of_the_watch():
    store = dist.HashStore()
    ranks = [Peers(rank, ["a", "b", "c"], store, answers_within=3) for rank in range(3)]
    for caller in (1, 0):
        ranks[caller].ask()
        assert ranks[caller].all_here(within=30)
    ranks[2].stop()
    said = "A collective failed: rank 2 (on host c) does not answer. Look at its log."
    assert sentence(0, ranks[0], ERRORS["network"]) == said
    assert sentence(1, ranks[1], ERRORS["reset"]) == said


def test_a_rank_that_was_given_up_says_so_when_it_is_back():
    store = dist.HashStore()
    early = Peers(0, ["a", "b"], store, answers_within=0.2)
    assert sentence(0, early, ERRORS["network"]) == (
        "A collective failed: rank 1 (on host b) does not answer. Look at its log."
    )
    late = Peers(1, ["a", "b"], store, answers_within=0.2)
    assert sentence(1, late, ERRORS["reset"]) == (
        "A collective failed: rank 0 (on host a) called the roll, and this rank answered too late. Look at its log."
    )


def test_an_error_that_is_none_of_a_collective_is_left_alone():
    assert sentence(0, Peers(0, ["a", "b"]), KeyError("x")) == "None"
    assert sentence(0, Peers(), ERRORS["late"]) == "None"  # in a world of one nobody can be lost
