"""Holds the words of the findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that looks wrong."""

    kind: str
    """One word that programs can tell it by."""
    where: str
    """The host, rank or link that it is about."""
    sentence: str
    is_error: bool = True
    """Whether it breaks or cripples a run."""
    stops: bool = False
    """Whether collectives would hang or fail; then none is tried."""


def hosts_named(hosts: Sequence[str], limit: int = 6) -> str:
    """Writes e.g. "host a", "hosts a and b" or "hosts a, b and 5 more"."""
    if len(hosts) == 1:
        return f"host {hosts[0]}"
    return f"hosts {listed(hosts, limit)}"


def listed(names: Sequence[str], limit: int = 6) -> str:
    """Writes e.g. "a, b and c", and the number of those beyond ``limit``."""
    names = list(names) if len(names) <= limit else [*names[: limit - 1], f"{len(names) - limit + 1} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def by_value(values: Mapping[str, str]) -> str:
    """Writes values by host, e.g. "2.9.1 on host a and 2.13.0 on hosts b and c"."""
    hosts: dict[str, list[str]] = {}
    for host, value in values.items():
        hosts.setdefault(value, []).append(host)
    return listed([f"{value} on {hosts_named(where)}" for value, where in hosts.items()])


def size(nbytes: float) -> str:
    """Writes bytes, e.g. "16.8 MB"."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{_short(nbytes / factor)} {unit}"
    return f"{nbytes:.0f} bytes"


def speed(bytes_per_s: float) -> str:
    """Writes bytes/s, e.g. "1.2 GB/s"."""
    return f"{size(bytes_per_s)}/s"


def duration(seconds: float) -> str:
    """Writes seconds, e.g. "35 µs", "1.2 ms" or "3 s"."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if abs(seconds) >= factor:
            return f"{_short(seconds / factor)} {unit}"
    return f"{_short(seconds * 1e6)} µs"


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 99.95 else f"{value:.0f}"
