"""Judges what was measured, by these rules.

- a link between two hosts ten times slower than the median of all other links is an error; two hosts have two links,
  one each way
- an all-reduce over all hosts whose bus bandwidth is ten times lower than that within a host is a warning, since some
  clusters are built so, and work
- links that are all slower than 1 Gbit/s, and a host whose own all-reduce is four times slower than the other hosts'
  median, are warnings
- a GPU whose pinned copies are less than half as fast as the median of all GPUs is a warning
- a folder that cannot be written is an error; one that is written at less than 50 MB/s, or holds less than 1 GB more,
  is a warning
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from grass_dist.doctor.facts import Collective, Link, Report
from grass_dist.doctor.words import Finding, by_value, duration, hosts_named, listed, size, speed

SLOW_LINK = SLOW_ACROSS = 10.0
SLOW_HOST = 4.0
SLOW_COPY = 2.0
GIGABIT = 125e6
SLOW_DISK = 50e6
FULL_DISK = 1e9


def judge_measures(report: Report) -> list[Finding]:
    """Judges all measurements that were made."""
    return [*_links(report.links), *_across(report), *_hosts(report), *_copies(report), *_disks(report)]


def slow_links(links: list[Link]) -> list[tuple[Link, float]]:
    """Finds links that are ten times slower than the median of all others, each with that median in bytes/s."""
    found = []
    for link in links:
        others = [other.bytes_per_s for other in links if other is not link]
        if others and (median := statistics.median(others)) > SLOW_LINK * link.bytes_per_s:
            found.append((link, median))
    return found


def _links(links: list[Link]) -> Iterator[Finding]:
    slow: dict[str, list[tuple[Link, float]]] = {}
    for link, median in slow_links(links):
        slow.setdefault(link.sender, []).append((link, median))
    for sender, its in slow.items():
        receivers = sorted(link.receiver for link, _ in its)
        worst, median = min(its, key=lambda pair: pair[0].bytes_per_s)
        all_its_links = len(its) == sum(link.sender == sender for link in links) > 1
        where = f"all other hosts ({listed(receivers)})" if all_its_links else hosts_named(receivers)
        about = "network card, cable and switch port of that host" if all_its_links else "path between them"
        sentence = (
            f"host {sender} sends to {where} at {speed(worst.bytes_per_s)}, and the other links have a median of "
            f"{speed(median)}; look at the {about} (ethtool, ip -s link), or leave the host out."
        )
        yield Finding("slow link", f"{sender} -> {listed(receivers)}", sentence)
    if links and not slow and (median := statistics.median(link.bytes_per_s for link in links)) < GIGABIT:
        sentence = (
            f"the hosts send to each other at {speed(median)}, less than 1 Gbit/s: a gradient of 1 GB takes "
            f"{duration(1e9 / median)} or more; set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to a faster interface."
        )
        yield Finding("slow network", "all", sentence, is_error=False)


def _within(report: Report) -> dict[str, Collective]:
    return {c.over: c for c in report.collectives if c.kind == "all_reduce" and c.over != "all"}


def _across(report: Report) -> Iterator[Finding]:
    whole = next((c for c in report.collectives if c.kind == "all_reduce" and c.over == "all"), None)
    within = [c.bus_bytes_per_s for c in _within(report).values()]
    if whole is None or not within or len(report.hosts) < 2:
        return
    median, across = statistics.median(within), whole.bus_bytes_per_s
    if median > SLOW_ACROSS * across:
        sentence = (
            f"an all-reduce over all {len(report.hosts)} hosts runs at {speed(across)} (bus bandwidth), one within a "
            f"host at {speed(median)}, {median / across:.0f} times faster; shard within the hosts and replicate "
            "across them (HSDP), communicate less often with more gradient accumulation, or use a faster interface."
        )
        yield Finding("slow across hosts", "all", sentence, is_error=False)


def _hosts(report: Report) -> Iterator[Finding]:
    within = _within(report)
    for host, collective in within.items():
        others = [c.bus_bytes_per_s for name, c in within.items() if name != host]
        if others and (median := statistics.median(others)) > SLOW_HOST * collective.bus_bytes_per_s:
            sentence = (
                f"within host {host} an all-reduce runs at {speed(collective.bus_bytes_per_s)} (bus bandwidth), on "
                f"the other hosts at {speed(median)}; look for other work on it (top, nvidia-smi) and at how its GPUs "
                "are connected (nvidia-smi topo -m)."
            )
            yield Finding("slow host", f"host {host}", sentence, is_error=False)


def _copies(report: Report) -> Iterator[Finding]:
    on_gpu = {facts.rank for facts in report.ranks if facts.on_gpu}
    copies = [c for c in report.copies if c.rank in on_gpu]
    for name, values in (("H2D", [c.h2d_alone for c in copies]), ("D2H", [c.d2h_alone for c in copies])):
        median = statistics.median(values) if values else 0.0
        for copy, value in zip(copies, values, strict=True):
            if median > SLOW_COPY * value:
                sentence = (
                    f"rank {copy.rank} (on host {report.host_of(copy.rank)}) copies {name} at {speed(value)} from "
                    f"pinned memory, the median is {speed(median)}; look at the PCIe width of its GPU "
                    "(nvidia-smi -q, Link Width) and bind the rank to its NUMA node."
                )
                yield Finding("slow copies", f"rank {copy.rank}", sentence, is_error=False)


def _disks(report: Report) -> Iterator[Finding]:
    broken = {disk.host: f"{disk.folder}: {disk.problem}" for disk in report.disks if disk.problem}
    if broken:
        sentence = f"--folder cannot be written: {by_value(broken)}; name a folder that every host can write."
        yield Finding("folder", hosts_named(list(broken)), sentence)
    slow = {disk.host: disk for disk in report.disks if not disk.problem and disk.write < SLOW_DISK}
    if slow:
        host, disk = min(slow.items(), key=lambda pair: pair[1].write)
        sentence = (
            f"--folder {disk.folder} is written at {speed(disk.write)} on host {host}"
            + (f" (and slowly on {len(slow) - 1} more)" if len(slow) > 1 else "")
            + f": a checkpoint of 10 GB takes {duration(1e10 / max(disk.write, 1.0))}; use a faster one."
        )
        yield Finding("slow disk", f"host {host}", sentence, is_error=False)
    for disk in report.disks:
        if not disk.problem and disk.free_bytes < FULL_DISK:
            sentence = f"--folder {disk.folder} on host {disk.host} has {size(disk.free_bytes)} left; make room there."
            yield Finding("full disk", f"host {disk.host}", sentence, is_error=False)
