"""The doctor on hosts that share no memory: what is wrong with a cluster is found and named, and it always ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from integration_tests.support.hosts import Host, Hosts, needs_hosts

pytestmark = [pytest.mark.timeout(150), pytest.mark.integration, needs_hosts]

BIN = Path(sys.executable).parent
ENVIRONMENT = {
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "HOME": os.environ.get("HOME", "/root"),
    "OMP_NUM_THREADS": "1",
    "PYTHONFAULTHANDLER": "1",
}
PORT = 29400


@dataclass(frozen=True)
class Ended:
    """How one process of a launch ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def three_hosts() -> Iterator[list[Host]]:
    with Hosts(3) as made:
        yield made


@pytest.fixture
def hosts(three_hosts, tmp_path, monkeypatch) -> list[Host]:
    """In a folder of its own, so that no other distribution's metadata is beside it."""
    monkeypatch.chdir(tmp_path)
    return three_hosts


def finish(started: Sequence[subprocess.Popen], within: float = 90) -> list[Ended]:
    try:
        said = [process.communicate(timeout=within) for process in started]
    finally:
        for process in started:
            process.kill()
    return [Ended(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


def start(host: Host, argv: Sequence[str], **variables: str) -> subprocess.Popen:
    pipe = subprocess.PIPE
    options = {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe, "text": True}
    return host.popen(argv, env={**ENVIRONMENT, **variables}, **options)


def one_each(hosts: Sequence[Host], *argv: str, variables: Mapping[int, dict[str, str]] | None = None) -> list[Ended]:
    """One rank on each host, as a launcher starts it that sets torch's variables.

    Args:
        variables: more of the environment, by rank.
    """
    around = {"WORLD_SIZE": str(len(hosts)), "MASTER_ADDR": "grass1", "MASTER_PORT": str(PORT), "LOCAL_RANK": "0"}
    command = [sys.executable, "-m", "grass_dist.doctor", "--json", "found.json", *argv]
    more = variables or {}
    started = [start(h, command, **around, RANK=str(r), **more.get(r, {})) for r, h in enumerate(hosts)]
    return finish(started)


def torchrun(hosts: Sequence[Host], ranks: int, *argv: str, variables: Sequence[dict[str, str]]) -> list[Ended]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(hosts)), "--nproc-per-node"]
    command += [str(ranks), "--rdzv-backend", "c10d", "--rdzv-endpoint", f"grass1:{PORT}", "--rdzv-id", "doctor"]
    command += ["-m", "grass_dist.doctor", "--json", "found.json", *argv]
    return finish([start(host, command, **its) for host, its in zip(hosts, variables, strict=True)])


def found() -> dict:
    return json.loads(Path("found.json").read_text())


def errors() -> list[str]:
    return [finding["sentence"] for finding in found()["findings"] if finding["is_error"]]


def test_two_hosts_are_measured_and_another_version_is_named(hosts, tmp_path):
    other = tmp_path / "other" / "mpi4py-0.0.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: mpi4py\nVersion: 0.0.9\n")
    ended = torchrun(hosts[:2], 2, "--size", "4MB", variables=[{}, {"PYTHONPATH": str(other.parent)}])
    assert [one.code for one in ended] == [1, 1], ended
    (said,) = errors()
    assert said.startswith("version of mpi4py differs: ") and "0.0.9 on host grass2" in said
    assert said in ended[0].out and "What looks wrong" not in ended[1].out
    report = found()
    assert [rank["host"] for rank in report["ranks"]] == ["grass1", "grass1", "grass2", "grass2"]
    assert [rank["address"] for rank in report["ranks"][1:3]] == ["10.77.0.1", "10.77.0.2"]
    (warned,) = (finding for finding in report["findings"] if finding["kind"] == "store")
    assert warned["where"] == "host grass1" and "of all interfaces (eth0 (10.77.0.1))" in warned["sentence"]
    assert "; the store listens on all interfaces of host grass1, with no password." in ended[0].out
    assert abs(report["ranks"][3]["clock_offset_seconds"]) < 0.1
    measured = [report["all_reduce"], report["reduce_scatter"], *(host["all_reduce"] for host in report["hosts"])]
    assert [one["ranks"] for one in measured] == [4, 4, 2, 2]
    assert all(0 < one["latency_seconds"] < one["seconds"] < 10 for one in measured)
    assert [(link["sender"], link["receiver"]) for link in report["links"]] == [
        ("grass1", "grass2"),
        ("grass2", "grass1"),
    ]
    assert all(host["disk_write_bytes_per_s"] > 0 for host in report["hosts"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["found.json", "other"]


@pytest.mark.long
def test_a_host_that_sends_ten_times_slower_is_named(hosts):
    hosts[2].slow("20mbit")
    try:
        ended = one_each(hosts, "--size", "2MB")
    finally:
        hosts[2].run(["tc", "qdisc", "del", "dev", "eth0", "root"])
    assert [one.code for one in ended] == [1, 1, 1], ended
    (said,) = errors()
    assert said.startswith("host grass3 sends to all other hosts (grass1 and grass2) at 2.")
    speeds = {(link["sender"], link["receiver"]): link["bytes_per_s"] for link in found()["links"]}
    assert len(speeds) == 6
    assert max(speeds["grass3", other] for other in ("grass1", "grass2")) < 5e6 < speeds["grass1", "grass3"]


def test_what_would_make_a_collective_hang_is_named_before(hosts):
    """Two hosts that do not reach each other, and an interface that one of them lacks."""
    hosts[2].run(["ip", "route", "add", "prohibit", "10.77.0.2/32"])
    try:
        ended = one_each(hosts, "--timeout", "30", variables={1: {"GLOO_SOCKET_IFNAME": "eth7"}})
    finally:
        hosts[2].run(["ip", "route", "del", "prohibit", "10.77.0.2/32"])
    assert [one.code for one in ended] == [1, 1, 1], ended
    interface, near, far = sorted(errors(), key=lambda said: ("cannot connect" in said, said))
    assert interface.startswith(
        "host grass2: GLOO_SOCKET_IFNAME=eth7: this host has no such interface with an address; it has eth0 "
        "(10.77.0.2), lo (127.0.0.1); "
    )
    assert near.startswith("host grass2 cannot connect to host grass3 at 10.77.0.3:") and "no answer within" in near
    assert far.startswith("host grass3 cannot connect to host grass2 at 10.77.0.2:") and "Permission denied" in far
    assert "Nothing was measured" in ended[0].out and found()["all_reduce"] is None


@pytest.mark.long
def test_a_host_that_cannot_meet_the_others_says_so(hosts):
    hosts[1].run(["ip", "route", "add", "prohibit", "10.77.0.1/32"])
    try:
        ended = one_each(hosts[:2], "--timeout", "6")
    finally:
        hosts[1].run(["ip", "route", "del", "prohibit", "10.77.0.1/32"])
    assert [one.code for one in ended] == [1, 1], ended
    (said,) = errors()
    assert said.startswith("rank 1 of 2 did not come within 6 s; ") and f"grass1:{PORT}" in said
    (line,) = ended[1].err.splitlines()
    assert line.startswith(f"rank 1 (on host grass2): grass1:{PORT} does not answer: Permission denied, tried for 6 s")


@pytest.mark.long
def test_a_link_that_is_cut_while_it_is_measured_ends_both(hosts):
    hosts[1].slow("20mbit")  # so that there is time
    before = hosts[1].traffic()[1]
    cut = threading.Thread(target=cut_after, args=(hosts[1], before + 1_000_000))
    cut.start()
    try:
        near, far = one_each(hosts[:2], "--timeout", "8")
    finally:
        cut.join()
        hosts[1].heal()
        hosts[1].run(["tc", "qdisc", "del", "dev", "eth0", "root"])
    assert (near.code, far.code) == (1, 1), (near, far)
    (said,) = errors()
    assert "did not end within 8 s: rank 1 (on host grass2) does not answer" in said
    assert "rank 0 (on host grass1), which keeps the store of all ranks, does not answer" in far.err


def cut_after(host: Host, sent: int) -> None:
    deadline = time.monotonic() + 60
    while host.traffic()[1] < sent and time.monotonic() < deadline:
        time.sleep(0.02)
    host.cut()


@pytest.mark.long
def test_mpirun(hosts):
    mpirun = [str(BIN / "mpirun"), "-n", "2", "--allow-run-as-root", "--oversubscribe", sys.executable]
    (ended,) = finish([start(hosts[0], [*mpirun, "-m", "grass_dist.doctor", "--json", "found.json", "--size", "1MB"])])
    assert ended.code == 0 and errors() == [], ended
    assert found()["all_reduce"]["ranks"] == 2 and found()["links"] == []
    assert "MPI Open MPI v5" in ended.out
