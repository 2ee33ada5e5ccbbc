"""The world that a launcher tells, and what is refused: processes that contradict each other."""

from __future__ import annotations

import datetime
import os
import socket
import subprocess
import sys
import time

import pytest

from grass_dist.errors import GrassError
from grass_dist.job.launchers import PORTS, ProcessPlace, find_place, first_host, own_address, warning_of
from grass_dist.job.seats import Seat, problem_of
from grass_dist.job.world import World

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_MAX_RESTARTS": "0",
    "GROUP_WORLD_SIZE": "2",
}
DEEPSPEED = {k: v for k, v in TORCHRUN.items() if not k.startswith(("TORCHELASTIC", "GROUP"))}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}
SRUN = {
    "SLURM_JOB_ID": "123457",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[003-004]",
}
WHERE = {"MASTER_ADDR": "node9", "MASTER_PORT": "4000"}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, None),
        (TORCHRUN, ProcessPlace("torchrun", 5, 1, 8, "node1", 29400)),
        (DEEPSPEED, ProcessPlace("the launcher", 5, 1, 8, "node1", 29400)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ProcessPlace("the launcher", 0, 0, 1)),
        (OPEN_MPI, ProcessPlace("Open MPI", 3, 1, 4)),
        ({**OPEN_MPI, **WHERE}, ProcessPlace("Open MPI", 3, 1, 4, "node9", 4000)),
        (
            {**OPEN_MPI, "MASTER_ADDR": "node9"},
            ProcessPlace("Open MPI", 3, 1, 4),
        ),  # an address alone is not where to meet
        (HYDRA, ProcessPlace("MPICH or Intel MPI", 3, 1, 4)),
        (SRUN, ProcessPlace("srun", 2, 0, 4, "node003", PORTS[123457 % len(PORTS)])),
        ({**SRUN, "SLURM_STEP_ID": "0"}, ProcessPlace("srun", 2, 0, 4, "node003", PORTS[123457 % len(PORTS)])),
        ({**SRUN, **WHERE}, ProcessPlace("srun", 2, 0, 4, "node9", 4000)),
        ({**SRUN, **OPEN_MPI}, ProcessPlace("Open MPI", 3, 1, 4)),  # mpirun inside an allocation
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "2", **TORCHRUN}, ProcessPlace("torchrun", 5, 1, 8, "node1", 29400)),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", **TORCHRUN, "GROUP_WORLD_SIZE": "1"}, find_place(TORCHRUN)),
        ({**SRUN, **TORCHRUN, "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_MAX_RESTARTS": "3"}, find_place(TORCHRUN)),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"}, None),  # a batch script of one task
    ],
)
def test_the_place_that_a_launcher_tells(environ, place):
    assert find_place(environ) == place


def test_only_a_plain_mpirun_is_warned_of():
    assert "send mpirun a SIGUSR1, or start it by launch/mpirun.sh" in str(warning_of(OPEN_MPI))
    for environ in ({}, TORCHRUN, SRUN, HYDRA, {**OPEN_MPI, "GRASS_DIST_SIGNAL": "SIGUSR1"}):
        assert warning_of(environ) is None


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "1"}, "the launcher has not set WORLD_SIZE; start all processes by one launcher."),
        ({"WORLD_SIZE": "2"}, "the launcher has not set RANK; "),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2; number the processes from 0."),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' is no number; unset it, or start all processes by one launcher."),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK=1 is set without LOCAL_RANK; set it to the process's number on its"),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, "RANK=1 is set without MASTER_ADDR; set it to rank 0's"),
        ({**DEEPSPEED, "MASTER_PORT": "99999"}, "MASTER_PORT=99999 is no port; set it to one from 1 to 65535, for all"),
        ({**DEEPSPEED, "MASTER_PORT": "-1"}, "MASTER_PORT=-1 is no port; "),
        ({**OPEN_MPI, "MASTER_ADDR": "a", "MASTER_PORT": "65536"}, "MASTER_PORT=65536 is no port; "),
        ({**SRUN, "MASTER_PORT": "9" * 50}, "MASTER_PORT=9999"),
        ({**DEEPSPEED, "MASTER_PORT": ""}, "RANK=5 is set without MASTER_PORT; "),
        (
            {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"},
            "SLURM_NTASKS=4, but this process was started without srun and would train alone; write srun before the "
            "command, or ask for one task.",
        ),
        (
            {**SRUN, **TORCHRUN, "GROUP_WORLD_SIZE": "1"},
            "srun started 4 processes, and torchrun in each counts one node: they are worlds of their own; give "
            "torchrun --nnodes 4 and the same --rdzv-endpoint.",
        ),
        (
            {**OPEN_MPI, **TORCHRUN, "GROUP_WORLD_SIZE": "1"},
            "Open MPI started 4 processes, and torchrun in each",
        ),
        (
            {**SRUN, "RANK": "0", "WORLD_SIZE": "1"},
            "RANK=0 and WORLD_SIZE=1 are set, but srun started this process as 2 of 4; unset RANK and WORLD_SIZE.",
        ),
        ({**OPEN_MPI, "RANK": "0", "WORLD_SIZE": "1"}, "but Open MPI started this process as 3 of 4; unset RANK"),
        ({**SRUN, "SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST='' names no host; set MASTER_ADDR to that of"),
    ],
)
def test_a_world_that_contradicts_itself_is_refused(environ, message):
    with pytest.raises(GrassError) as refused:
        find_place(environ)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("n[03-07,12],g1", "n03"),
        ("n[7,9]", "n7"),
        ("rack1-n[1-2]", "rack1-n1"),
        ("rack[0-1]n[01-16]", "rack0n01"),
        ("n[1-2]-ib0", "n1-ib0"),
        ("n[1-2]-ib0,g[3,5]", "n1-ib0"),
        ("r[2,4-5]n[8]x.cluster", "r2n8x.cluster"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", ",a", "n[", "n[1-2", "n[]", "n[a]", "[", "n]"])
def test_a_node_list_that_names_no_host_is_refused(nodes):
    with pytest.raises(GrassError, match="names no host; set MASTER_ADDR"):
        first_host(nodes)


def test_steps_of_a_job_and_of_the_next_meet_at_their_own_ports():
    def port(job: int, step: dict[str, str]) -> int | None:
        place = find_place({**SRUN, "SLURM_JOB_ID": str(job), **step})
        return place.port if place else None

    ports = [port(job, {"SLURM_STEP_ID": str(step)}) for job in range(100, 110) for step in range(50)]
    assert len(set(ports)) == len(ports) and all(each in PORTS for each in ports)
    assert port(100, {"SLURM_STEPID": "3"}) == ports[3]  # the older name
    assert port(100, {"SLURM_STEP_ID": "4294967291"}) in PORTS  # the number of a batch script


def test_an_address_in_use_is_said_at_once(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "PMI", "TORCHELASTIC")):
            monkeypatch.delenv(name)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        where = ProcessPlace("the launcher", 0, 0, 2, "127.0.0.1", port).variables()
        for name in (*where, "DS_ACCELERATOR"):  # what joining sets is put back after the test
            monkeypatch.setenv(name, where.get(name, "cpu"))
        began = time.monotonic()
        with pytest.raises(GrassError) as refused:
            World.join(datetime.timedelta(seconds=60))
    assert time.monotonic() - began < 20
    assert f"rank 0 cannot wait for the others at 127.0.0.1:{port} (address already in use): " in str(refused.value)
    assert "set MASTER_PORT to a port that is free on that host, the same for all 2 ranks." in str(refused.value)


def test_variables_are_those_of_torchrun():
    assert find_place(ProcessPlace("srun", 2, 0, 4, "n", 7).variables()) == ProcessPlace(
        "the launcher", 2, 0, 4, "n", 7
    )


def test_the_own_address_is_one():
    assert len(own_address().split(".")) == 4


def seat(local_rank, *visible, host="a", machine="m", takes=None):
    return Seat(
        host, machine, local_rank, visible[local_rank if takes is None else takes] if visible else None, visible
    )


@pytest.mark.parametrize(
    ("seats", "problem"),
    [
        ([seat(0), seat(1), seat(0, host="b"), seat(1, host="b")], None),
        ([seat(0), seat(0, machine="other")], None),  # containers of one name
        ([seat(0, "g0", "g1"), seat(1, "g0", "g1")], None),
        ([seat(0, "g0", takes=0), seat(1, "g1", takes=0)], None),  # each task its own GPU
        (
            [seat(0), seat(1), seat(1)],
            "ranks 1 and 2 on host a are both number 1 there; start all ranks of a host",
        ),
        (
            [seat(0, "g0", takes=0), seat(1, "g0", takes=0)],
            "ranks 0 and 1 on host a both use the GPU g0; start one rank",
        ),
        ([seat(0, "g0", "g1"), seat(1, "g1", "g0")], "ranks 0 and 1 on host a both use the GPU g0; start one"),
        ([seat(0, "g0", "g1", "g2"), seat(1, "g0", "g1")], "ranks 0 and 1 on host a see different GPUs (3 and 2); set"),
    ],
)
def test_ranks_on_each_others_seat_are_refused(seats, problem):
    said = problem_of(seats)
    assert said is None if problem is None else said is not None and said.startswith(problem)


@pytest.mark.parametrize(
    "start", [["-m", "grass_dist.finetune", "--config"], ["-m", "grass_dist.cli", "train"]], ids=str
)
def test_the_program_starts_from_the_package(tmp_path, start):
    command = [sys.executable, *start, str(tmp_path / "none.yaml"), "name=x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: --config="), done.stderr
