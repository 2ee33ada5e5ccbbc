"""The hosts that other tests run on: what they share and do not, and that nothing is left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from integration_tests.support.hosts import Hosts, needs_hosts
from integration_tests.support.program import ROOT

pytestmark = [pytest.mark.timeout(60), needs_hosts]

# Of its own session, as a daemon is: it does not end with the one that started it.
DAEMON = ["setsid", "sh", "-c", "sleep 1000 & echo begun; sleep 1000"]
HELD = """
from integration_tests.support.hosts import Hosts
with Hosts(2) as hosts:
    print([host.pid for host in hosts], flush=True)
    input()
"""


def namespaces(pids: list[int]) -> set[str]:
    return {os.readlink(f"/proc/{pid}/ns/{kind}") for pid in pids for kind in ("net", "pid", "uts", "mnt", "ipc")}


def in_use() -> set[str]:
    """Namespaces of all processes that run."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/ns/*"):
        try:
            if (link.parent.parent / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.add(os.readlink(link))
        except OSError:  # it has ended meanwhile
            continue
    return found


def wait_until_gone(made: set[str]) -> set[str]:
    deadline = time.monotonic() + 10
    while (left := made & in_use()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def test_hosts_are_apart_and_nothing_is_left_of_them():
    before = namespaces([os.getpid()])
    with Hosts(3) as hosts:
        made = namespaces([host.pid for host in hosts])
        assert len(made) == 15 and not made & before
        assert [host.run(["hostname"]).strip() for host in hosts] == ["grass1", "grass2", "grass3"]
        daemon = hosts[1].popen(DAEMON, stdout=subprocess.PIPE, text=True)
        assert daemon.stdout is not None and daemon.stdout.readline() == "begun\n"
        Path("/dev/shm").joinpath("of-all").unlink(missing_ok=True)
        hosts[0].run(["touch", "/dev/shm/of-one"])
        assert hosts[1].run(["ls", "/dev/shm"]) == "" and not Path("/dev/shm/of-one").exists()
        counts = [host.traffic() for host in hosts]
        serve = (
            "import socket; peer = socket.create_server(('', 5000)).accept()[0]; print(len(peer.makefile('rb').read()))"
        )
        server = hosts[1].popen([sys.executable, "-c", serve], stdout=subprocess.PIPE, text=True)
        client = "import socket, time\nwhile True:\n try: peer = socket.create_connection(('grass2', 5000)); break"
        send = f"{client}\n except OSError: time.sleep(0.01)\npeer.sendall(bytes(200000))"
        hosts[0].run([sys.executable, "-c", send])
        assert server.communicate(timeout=10)[0] == "200000\n"
        for host, (received, sent), talked in zip(hosts, counts, (True, True, False), strict=True):
            moved = sum(host.traffic()) - received - sent  # some hundred bytes are the kernel's own, for IPv6
            assert (moved > 200_000) == talked
        lost = namespaces([hosts[2].pid])
        hosts[2].lose_power()
        assert wait_until_gone(lost) == set() and made - lost <= in_use()
    assert wait_until_gone(made) == set()
    daemon.wait(10)
    daemon.stdout.close()


def test_they_end_with_the_process_that_made_them_in_any_way():
    maker = subprocess.Popen(
        [sys.executable, "-c", HELD], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert maker.stdout is not None
    made = namespaces([int(pid) for pid in maker.stdout.readline().strip("[]\n").split(",")])
    assert made <= in_use()
    maker.send_signal(signal.SIGKILL)
    maker.wait(10)
    assert wait_until_gone(made) == set()
