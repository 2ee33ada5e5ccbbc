"""Finds the network interfaces of this host, and their addresses."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915


def find_interfaces() -> dict[str, str]:
    """Returns the address of each interface that has one, by name: its first IPv4 address, else its IPv6 address."""
    found = {name: address for address, name in reversed(_ipv6_addresses())}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(answer[20:24])
    return dict(sorted(found.items()))


def is_loopback(address: str | None) -> bool:
    return address is not None and (address.startswith("127.") or address == "::1")


def _ipv6_addresses() -> list[tuple[str, str]]:
    """Returns (address, interface) pairs, without addresses that are valid on one link alone."""
    try:
        lines = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
    except OSError:
        return []
    return [(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(line[0])), line[5]) for line in lines if line[3] != "20"]
