"""A SLURM cluster of `Hosts`: a controller, and a daemon on each. Needs Debian's slurmctld, slurmd and slurm-client."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from integration_tests.support.hosts import Host

needs_slurm = pytest.mark.skipif(
    any(shutil.which(name) is None for name in ("slurmctld", "slurmd", "sbatch")),
    reason="needs Debian's slurmctld, slurmd and slurm-client",
)

SETTINGS = """
ClusterName=grass
SlurmctldHost={first}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmctldTimeout=300
SlurmdTimeout=300
KillWait=5
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
NodeName={names} CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def cluster(hosts: list[Host], folder: Path) -> Iterator[dict[str, str]]:
    """Starts the daemons, which have no secrets among themselves; gives the variables that its commands need."""
    (folder / "state").mkdir(parents=True)
    names = ",".join(host.name for host in hosts)
    (folder / "slurm.conf").write_text(SETTINGS.format(first=hosts[0].name, names=names, folder=folder))
    # The script asks for GPUs, which are devices to SLURM and nothing more.
    (folder / "gres.conf").write_text("Name=gpu File=/dev/zero\nName=gpu File=/dev/full\n")
    variables = {"SLURM_CONF": str(folder / "slurm.conf")}
    environment = {**os.environ, **variables}
    daemons = [hosts[0].popen(["slurmctld", "-D"], env=environment, stderr=subprocess.DEVNULL)]
    daemons += [
        host.popen(["slurmd", "-D", "-N", host.name], env=environment, stderr=subprocess.DEVNULL) for host in hosts
    ]
    try:
        _wait_until_idle(hosts, folder, environment)
        yield variables
    finally:
        for daemon in daemons:
            daemon.kill()
            daemon.wait(10)


def _wait_until_idle(hosts: list[Host], folder: Path, environment: dict[str, str]) -> None:
    deadline, said = time.monotonic() + 30, ""
    while time.monotonic() < deadline:
        asked = subprocess.run(
            hosts[0].command(["sinfo", "--noheader", "--Node", "--format=%T"]),
            env=environment,
            capture_output=True,
            text=True,
        )
        said = asked.stdout + asked.stderr
        if said.split() == ["idle"] * len(hosts):
            return
        time.sleep(0.2)
    logs = "\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in sorted(folder.glob("*.log")))
    raise RuntimeError(f"the cluster did not come up: {said}\n{logs}")
