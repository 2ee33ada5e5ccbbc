"""Several hosts on one machine: each with its own network, name, processes, shared memory and mounts.

A host is a process in namespaces of its own; a pair of virtual interfaces leads from it to a bridge that stands in one
more network namespace. No namespace has a name: all of it ends with the processes, and these end with the one that
made them, however that ends. Needs root, iproute2 and util-linux.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

INTERFACE = "eth0"
NEEDED = ("ip", "tc", "ss", "unshare", "nsenter", "setpriv")
SSHD = "/usr/sbin/sshd"

# The first process of a host or of the hub. It ends when the one that started it does: setpriv sees to unshare,
# unshare --kill-child to the shell, and the end of a pid namespace's first process to all others in it.
_HOLD = ["setpriv", "--pdeathsig", "KILL", "unshare", "--fork", "--kill-child", "--pid", "--mount-proc", "--net"]
_BOOT = """
set -e
hostname "$1"
mount -t tmpfs tmpfs /dev/shm
mount --bind "$2/hosts" /etc/hosts
if [ -e "$2/key" ]; then
  mount -t tmpfs tmpfs /run
  mkdir /run/sshd
  mount --bind "$2/ssh_config" /etc/ssh/ssh_config
fi
ip link set lo up
echo up
exec sleep infinity
"""


@functools.cache
def why_not() -> str | None:
    """Why no hosts can be made here, in a sentence; None if they can."""
    if os.geteuid() != 0:
        return "hosts in network namespaces need root"
    missing = [tool for tool in NEEDED if shutil.which(tool) is None]
    if missing:
        return f"hosts in network namespaces need {', '.join(missing)} (Debian's iproute2 and util-linux)"
    tried = subprocess.run([*_HOLD, "ip", "link", "add", "br0", "type", "bridge"], capture_output=True, text=True)
    return None if tried.returncode == 0 else f"this system gives no network namespaces: {tried.stderr.strip()}"


needs_hosts = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
needs_ssh = pytest.mark.skipif(
    not Path(SSHD).exists() or shutil.which("pdsh") is None, reason="needs Debian's openssh-server and pdsh"
)


def traffic(counters: str = "/proc/net/dev") -> tuple[int, int]:
    """Bytes that the interface of this process's host has received and sent, headers included."""
    for line in Path(counters).read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == INTERFACE:
            return int(counts.split()[0]), int(counts.split()[8])
    raise LookupError(f"{counters} has no {INTERFACE}")


@dataclass
class Host:
    """One host of `Hosts`."""

    name: str
    address: str
    pid: int
    """Of its first process, as seen from outside."""
    port: str
    """Its interface on the bridge."""
    hub: int
    """First process of the hub."""

    def command(self, argv: Sequence[str]) -> list[str]:
        """``argv`` such that it runs on this host, in the present folder."""
        inside = ["--net", "--uts", "--pid", "--mount", "--ipc", f"--wd={os.getcwd()}"]
        return ["nsenter", "--target", str(self.pid), *inside, "--", *argv]

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen:
        """Starts a process here; it ends with the host at the latest."""
        return subprocess.Popen(self.command(argv), **options)

    def run(self, argv: Sequence[str], **options: Any) -> str:
        """Runs a command here and gives back what it wrote; one that fails raises `CalledProcessError`."""
        return subprocess.run(self.command(argv), check=True, capture_output=True, text=True, **options).stdout

    def cut(self) -> None:
        """Takes the link away: packets are lost, and nobody is told."""
        _in_network(self.hub, "ip", "link", "set", self.port, "down")

    def heal(self) -> None:
        _in_network(self.hub, "ip", "link", "set", self.port, "up")

    def slow(self, rate: str) -> None:
        """Lets this host send no faster than ``rate``, in tc's notation: ``200mbit``."""
        shape = ["tbf", "rate", rate, "burst", "64k", "latency", "400ms"]
        _in_network(self.pid, "tc", "qdisc", "replace", "dev", INTERFACE, "root", *shape)

    def lose_power(self) -> None:
        """Ends all its processes at once; its link goes with them."""
        os.kill(self.pid, 9)

    def traffic(self) -> tuple[int, int]:
        """Bytes that its interface has received and sent, headers included."""
        return traffic(f"/proc/{self.pid}/net/dev")


class Hosts:
    """``with Hosts(2) as hosts``: a list of hosts ``grass1`` at 10.77.0.1, ``grass2`` at 10.77.0.2, and so on.

    Args:
        ssh: whether each lets root of the others in, without a question.
    """

    def __init__(self, count: int, *, ssh: bool = False):
        self.count, self._ssh = count, ssh
        self._stack = ExitStack()

    def __enter__(self) -> list[Host]:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hosts-")))
            names = [f"grass{n}" for n in range(1, self.count + 1)]
            lines = [f"10.77.0.{n} {name}" for n, name in enumerate(names, 1)]
            (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
            if self._ssh:
                _prepare_ssh(folder)
            hub = _hold(stack, "hub", folder)
            _in_network(hub, "ip", "link", "add", "br0", "type", "bridge")
            _in_network(hub, "ip", "link", "set", "br0", "up")
            hosts = [self._host(stack, n, name, folder, hub) for n, name in enumerate(names, 1)]
            for host in hosts if self._ssh else ():
                _start_sshd(stack, host, folder)
            self._stack = stack.pop_all()
        return hosts

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @staticmethod
    def _host(stack: ExitStack, number: int, name: str, folder: Path, hub: int) -> Host:
        host = Host(name, f"10.77.0.{number}", _hold(stack, name, folder), f"port{number}", hub)
        pair = ["link", "add", INTERFACE, "netns", str(host.pid), "type", "veth", "peer", "name", host.port]
        subprocess.run(["ip", *pair, "netns", str(hub)], check=True)
        _in_network(hub, "ip", "link", "set", host.port, "master", "br0", "up")
        _in_network(host.pid, "ip", "addr", "add", f"{host.address}/24", "dev", INTERFACE)
        _in_network(host.pid, "ip", "link", "set", INTERFACE, "up")
        return host


def _prepare_ssh(folder: Path) -> None:
    for key in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    known = ["StrictHostKeyChecking no", "UserKnownHostsFile /dev/null", "LogLevel ERROR", "BatchMode yes"]
    (folder / "ssh_config").write_text("\n".join([f"IdentityFile {folder / 'key'}", *known, ""]))
    settings = [f"HostKey {folder / 'host_key'}", f"AuthorizedKeysFile {folder / 'key.pub'}", "StrictModes no"]
    settings += ["PermitRootLogin yes", "UsePAM no", "UseDNS no", "PidFile none", "MaxStartups 100"]
    (folder / "sshd_config").write_text("\n".join([*settings, ""]))


def _start_sshd(stack: ExitStack, host: Host, folder: Path) -> None:
    log = stack.enter_context((folder / f"{host.name}.sshd").open("w"))
    sshd = host.popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stdin=subprocess.DEVNULL, stderr=log)
    stack.callback(sshd.wait, 10)
    stack.callback(sshd.kill)
    deadline = time.monotonic() + 10
    while ":22 " not in host.run(["ss", "--listening", "--tcp", "--numeric"]):
        if sshd.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"sshd on {host.name}: {(folder / f'{host.name}.sshd').read_text()}")
        time.sleep(0.02)


def _hold(stack: ExitStack, name: str, folder: Path) -> int:
    """Starts the first process of a host; gives its pid when the host is up."""
    argv = [*_HOLD, "--uts", "--ipc", "--mount", "sh", "-c", _BOOT, "sh", name, str(folder)]
    holder = subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    stack.callback(_end, holder)
    assert holder.stdout is not None
    if holder.stdout.readline() != "up\n":
        raise RuntimeError(f"host {name} did not come up")
    return int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()[0])


def _end(holder: subprocess.Popen) -> None:
    holder.kill()
    holder.wait(10)
    assert holder.stdout is not None
    holder.stdout.read()  # ends when the last process that holds it has ended: the host is gone
    holder.stdout.close()


def _in_network(pid: int, *argv: str) -> None:
    subprocess.run(["nsenter", "--target", str(pid), "--net", "--", *argv], check=True)
