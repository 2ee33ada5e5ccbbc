"""Finds the address by which others reach this rank, and tries it by plain TCP with short time limits."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from grass_dist.doctor.facts import Reach
from grass_dist.job.interfaces import is_loopback

CONNECTS_WITHIN = 5.0
"""Time limit of a connection, in seconds."""
ROUND_TRIPS = 8
_TOKEN = 16


@dataclass(frozen=True, slots=True)
class Chosen:
    """The address by which a rank is reached, and why this one."""

    address: str
    interface: str
    chosen_by: str
    problem: str = ""
    """Sentence on what is wrong with the interface that was asked for."""
    name_problem: str = ""
    """The problem of the address of the host name, without a full stop."""


def choose_address(
    environ: Mapping[str, str], interfaces: Mapping[str, str], *, by_name: str | None, by_route: str, toward: str
) -> Chosen:
    """Chooses as gloo and NCCL would: the interface that is asked for, else the host name's address, else the route's.

    Args:
        by_name: what this host's own name resolves to; None if it does not.
        by_route: the address that packets to ``toward`` leave by.
    """
    names = {address: name for name, address in interfaces.items()}
    own_name_leads_here = by_name in names and not is_loopback(by_name)
    problem = name_problem = ""
    if not environ.get("GLOO_SOCKET_IFNAME") and not own_name_leads_here:
        name_problem = f"resolves to {by_name}, which others cannot reach" if by_name else "does not resolve"
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if not (wanted := environ.get(variable)):
            continue
        matching = _matching(wanted, interfaces, exact=variable.startswith("GLOO"))
        if matching:
            return Chosen(interfaces[matching], matching, variable, problem, name_problem)
        problem = problem or (
            f"{variable}={wanted}: this host has no such interface with an address; it has {shown(interfaces)}"
        )
    if by_name is not None and own_name_leads_here:
        return Chosen(by_name, names[by_name], "the host name", problem)
    return Chosen(by_route, names.get(by_route, ""), f"the route to {toward}", problem, name_problem)


ALL = ("0.0.0.0", "::")
"""Addresses that a socket is bound to if it listens on every interface."""
_LISTENS = "0A"


def bound_addresses(port: int) -> tuple[str, ...]:
    """Returns the addresses of this host at which some process listens on a TCP port, by the kernel's own list."""
    found: set[str] = set()
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        try:
            lines = Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, _, state, *_ = line.split()
            address, _, number = local.partition(":")
            if state == _LISTENS and int(number, 16) == port:
                words = struct.unpack(f">{len(address) // 8}I", bytes.fromhex(address))
                found.add(socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words)))
    return tuple(sorted(found))


def shown(interfaces: Mapping[str, str]) -> str:
    """Writes e.g. "eth0 (10.77.0.2), lo (127.0.0.1)", with those that lead elsewhere first."""
    ordered = sorted(interfaces.items(), key=lambda pair: (is_loopback(pair[1]), pair[0]))
    return ", ".join(f"{name} ({address})" for name, address in ordered) or "none"


def address_of_name() -> str | None:
    """Returns the address that this host's own name resolves to."""
    try:
        return str(socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None


def address_of_route(host: str) -> str:
    """Returns the address by which packets to ``host`` leave; that of the loopback if there is no way."""
    with contextlib.suppress(OSError):
        family, _, _, _, where = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)  # nothing is sent
            return str(probe.getsockname()[0])
    return "127.0.0.1"


class TokenServer:
    """Answers every byte with ``token`` and the time, from threads of its own, until the process ends.

    Raises:
        OSError: it cannot listen on the address.
    """

    def __init__(self, address: str, token: bytes) -> None:
        class Answer(socketserver.StreamRequestHandler):
            timeout = 60
            disable_nagle_algorithm = True

            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    while self.rfile.read(1):
                        self.wfile.write(token + struct.pack("!d", time.time()))

        class Server(socketserver.ThreadingTCPServer):
            address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
            daemon_threads = True
            request_queue_size = 256

        self._server = Server((address, 0), Answer)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="doctor listener", daemon=True).start()


def reach(rank: int, to: int, address: str, port: int, token: bytes, seconds: float = CONNECTS_WITHIN) -> Reach:
    """Tries to connect to the listener of rank ``to``; several round trips tell the difference of the clocks.

    Returns:
        The outcome, after a few times ``seconds`` at most. It never raises.
    """
    best, offset = None, None
    try:
        with socket.create_connection((address, port), timeout=seconds) as line:
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(ROUND_TRIPS):
                asked = time.time()
                began = time.perf_counter()
                line.sendall(b"?")
                answer = _read(line, _TOKEN + 8)
                trip = time.perf_counter() - began
                if answer[:_TOKEN] != token:
                    return Reach(rank, to, problem="another process answers there")
                if best is None or trip < best:
                    best, offset = trip, asked + trip / 2 - struct.unpack("!d", answer[_TOKEN:])[0]
    except OSError as error:
        return Reach(rank, to, problem=reason(error, seconds))
    return Reach(rank, to, best, offset)


def reason(error: OSError, seconds: float) -> str:
    """Says why a connection failed, without a full stop."""
    if isinstance(error, TimeoutError):
        return f"no answer within {seconds:g} s"
    return error.strerror or str(error)


def _read(line: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count:
        if not (part := line.recv(count - len(got))):
            raise ConnectionResetError(104, "the connection was closed")
        got += part
    return got


def _matching(wanted: str, interfaces: Mapping[str, str], *, exact: bool) -> str:
    """Returns the first interface that a variable means. gloo takes names, NCCL prefixes, "=name" and "^prefix"."""
    if exact:
        names = wanted.split(",")
        return names[0] if all(name in interfaces for name in names) else ""
    for name in interfaces:
        if wanted.startswith("^"):
            if not name.startswith(tuple(wanted[1:].split(","))) and name != "lo":
                return name
        elif wanted.startswith("="):
            if name in wanted[1:].split(","):
                return name
        elif name.startswith(tuple(wanted.split(","))):
            return name
    return ""
