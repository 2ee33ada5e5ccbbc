"""Each launch script starts two ranks on each of two hosts that share no memory, and all train the same run."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from integration_tests.support.hosts import Host, Hosts, needs_hosts, needs_ssh
from integration_tests.support.launched import ENVIRONMENT
from integration_tests.support.program import ROOT, events, run_all
from integration_tests.support.slurm import cluster, needs_slurm

pytestmark = [pytest.mark.timeout(150), needs_hosts, needs_ssh]


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with Hosts(2, ssh=True) as made:
        yield made


@pytest.fixture(scope="module")
def alone(config) -> Path:
    return run_all(config, 1, "name=alone", "save_model=false")


def launch(
    hosts: list[Host],
    script: str,
    config: Path,
    name: str,
    *settings: str,
    by: Sequence[str] = (),
    **variables: str,
) -> Path:
    """Runs a launch script on the hosts, to the end of all of them; gives the folder of the run.

    Args:
        by: command that the script is given to, if it is not run itself.
    """
    argv = [*by, str(ROOT / "launch" / script), f"name={name}", "save_model=false", *settings]
    started = [
        host.popen(
            argv,
            env={**ENVIRONMENT, "CONFIG": str(config), "NODE_RANK": str(number), **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, host in enumerate(hosts)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(said)
    assert "\x1b" not in "".join(said)  # no bar where there is no terminal
    return config.parent / "runs" / name


def check_same(run: Path, alone: Path) -> None:
    """The same layers were drawn, the losses are equal to 1e-5, and each rank left its log."""
    for kind in ("sample", "refresh"):
        assert [e.get("active_layers") for e in events(run, kind)] == [
            e.get("active_layers") for e in events(alone, kind)
        ]
    losses, expected = ([e["loss"] for e in events(r, "step")] for r in (run, alone))
    assert losses == pytest.approx(expected, rel=1e-5) and len(losses) == 10
    logs = {file.name: file.read_text() for file in (run / "logs").iterdir()}
    assert sorted(logs) == ["rank_1.log", "rank_2.log", "rank_3.log"]
    assert [logs[f"rank_{rank}.log"].split(" of 4")[0] for rank in (1, 2, 3)] == [
        "--- rank 1 (on host grass1)",
        "--- rank 2 (on host grass2)",
        "--- rank 3 (on host grass2)",
    ]


@pytest.mark.parametrize("rendezvous", ["c10d", pytest.param("static", marks=pytest.mark.integration)])
def test_torchrun(hosts, config, alone, rendezvous):
    check_same(launch(hosts, "torchrun.sh", config, f"torchrun-{rendezvous}", RENDEZVOUS=rendezvous), alone)


@pytest.mark.long
def test_mpirun(hosts, config, alone):
    run = launch(hosts[:1], "mpirun.sh", config, "mpirun", HOSTS="grass1,grass2", MPI_ARGS="--allow-run-as-root")
    check_same(run, alone)


@pytest.mark.integration
@needs_slurm
def test_slurm(hosts, config, alone, tmp_path):
    by = ["sbatch", "--wait", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"]
    by += [f"--chdir={ROOT}", f"--output={tmp_path / 'said'}"]
    with cluster(hosts, tmp_path / "slurm") as variables:
        run = launch(hosts[:1], "slurm.sbatch", config, "slurm", by=by, **variables)
    check_same(run, alone)
    assert f"report: {run}" in (tmp_path / "said").read_text()


@pytest.mark.integration
@pytest.mark.parametrize(
    ("launcher", "args"),
    [
        ("pdsh", ""),
        pytest.param("openmpi", "--allow-run-as-root --mca btl ^openib", marks=pytest.mark.long),
        pytest.param("no_ssh", "", marks=pytest.mark.long),
    ],
)
def test_deepspeed(hosts, config, alone, launcher, args, tmp_path):
    (tmp_path / "hosts").write_text("grass1 slots=2\ngrass2 slots=2\n")
    run = launch(
        hosts if launcher == "no_ssh" else hosts[:1],
        "deepspeed.sh",
        config,
        f"deepspeed-{launcher}",
        f"parallel={{backend: deepspeed, config: {config.parent / 'zero2.json'}}}",
        HOSTFILE=str(tmp_path / "hosts"),
        HEAD="10.77.0.1",
        LAUNCHER=launcher,
        LAUNCHER_ARGS=args,
    )
    check_same(run, alone)
