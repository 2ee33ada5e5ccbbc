"""Judges from the facts alone what looks wrong, each in a sentence with the host or rank, the value and the fix.

An error breaks or cripples a run, and makes the exit status 1. One that `Finding.stops` would make collectives hang or
fail, so none is tried. What was measured is judged by these rules:

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from grass_dist.doctor.facts import Collective, Facts, Link, Report
from grass_dist.doctor.network import ALL, shown
from grass_dist.job.interfaces import is_loopback
from grass_dist.job.seats import problem_of
from grass_dist.terminal import duration, size, speed

CLOCKS_DIFFER = 5.0
"""Seconds by which the clocks of two hosts may differ."""
MEMLOCK_AT_LEAST = 1 << 30
"""Bytes that a rank should be able to lock."""

SLOW_LINK = SLOW_ACROSS = 10.0
SLOW_HOST = 4.0
SLOW_COPY = 2.0
GIGABIT = 125e6
SLOW_DISK = 50e6
FULL_DISK = 1e9


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that looks wrong."""

    kind: str
    """One word that programs can tell it by."""
    where: str
    """The host, rank or link that it is about."""
    sentence: str
    is_error: bool = True
    """True if it breaks or cripples a run."""
    stops: bool = False
    """True if collectives would hang or fail; then none is tried."""


def judge(report: Report) -> list[Finding]:
    """Returns everything that looks wrong, errors first."""
    found = [*judge_meeting(report), *_versions(report), *_host_facts(report), *_clocks(report)]
    if report.failed:
        found.append(Finding("failed", "all", report.failed))
    found += [*_links(report.links), *_across(report), *_slow_hosts(report), *_copies(report), *_disks(report)]
    return sorted(found, key=lambda finding: not finding.is_error)


def judge_meeting(report: Report) -> list[Finding]:
    """Returns what keeps the ranks from working together, which has to be known before the first collective."""
    found = [*_missing(report), *_interfaces(report), *_addresses(report), *_unreachable(report), *_devices(report)]
    return [Finding(kind, where, sentence, stops=True) for kind, where, sentence in found]


Said = Iterator[tuple[str, str, str]]
"""Kind, where and sentence of a `Finding`."""


def _missing(report: Report) -> Said:
    missing = sorted(set(range(report.size)) - {facts.rank for facts in report.ranks})
    if missing:
        who = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {listed([str(rank) for rank in missing], 8)}"
        sentence = (
            f"{who} of {report.size} did not come within {report.timeout:g} s; look at the output on its host: one "
            f"that cannot reach {report.meets_at} says so there, and raise --timeout if hosts start that far apart."
        )
        yield "missing", who, sentence


def _interfaces(report: Report) -> Said:
    for host, ranks in report.hosts.items():
        for problem in dict.fromkeys(facts.interface_problem for facts in ranks if facts.interface_problem):
            fix = "name the one that leads to the other hosts, or unset the variable"
            yield "interface", f"host {host}", f"host {host}: {problem}; {fix}."
        first = ranks[0]
        if first.name_problem and len(report.hosts) > 1:
            shown = first.interface or "the interface that leads to the other hosts"
            sentence = (
                f"host {host}: its own name {first.name_problem}, and gloo would listen there; set "
                f"GLOO_SOCKET_IFNAME={shown} (or --interface here), or correct /etc/hosts."
            )
            yield "host name", f"host {host}", sentence


def _addresses(report: Report) -> Said:
    """Finds addresses that every host has, such as those of docker0."""
    seen: dict[str, str] = {}
    for host, ranks in report.hosts.items():
        address = ranks[0].address
        if (other := seen.setdefault(address, host)) != host:
            sentence = (
                f"hosts {other} and {host} both give the address {address} ({ranks[0].interface or 'no interface'}); "
                "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that leads to the other hosts."
            )
            yield "address", f"host {host}", sentence


def _unreachable(report: Report) -> Said:
    by_rank = {facts.rank: facts for facts in report.ranks}
    blocked: dict[tuple[int, str], list[str]] = {}
    for reach in report.reach:
        if reach.problem:
            host = report.host_of(reach.rank)
            hosts = blocked.setdefault((reach.to, reach.problem), [])
            if host not in hosts:
                hosts.append(host)
    for (to, problem), hosts in blocked.items():
        target = by_rank[to]
        where = f"{target.address}:{target.port}" + (f" ({target.interface})" if target.interface else "")
        sentence = (
            f"{hosts_named(hosts)} cannot connect to host {report.host_of(to)} at {where}: {problem}; let all TCP "
            "ports pass between the hosts (firewall, routes), or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to an "
            "interface on which they reach each other."
        )
        yield "unreachable", f"host {report.host_of(to)}", sentence


def _devices(report: Report) -> Said:
    kinds = {host: "GPUs" if ranks[0].on_gpu else "CPU" for host, ranks in report.hosts.items()}
    if len(set(kinds.values())) > 1:
        sentence = (
            f"ranks train on {by_value(kinds)}; give every host GPUs and a torch with CUDA, or set "
            "CUDA_VISIBLE_DEVICES= on all."
        )
        yield "devices", "all", sentence
    for facts in report.ranks:
        if len(facts.seat.visible) > 1 and facts.seat.local_rank >= len(facts.seat.visible):
            sentence = (
                f"rank {facts.rank} is number {facts.seat.local_rank} on host {report.host_of(facts.rank)}, which has "
                f"{len(facts.seat.visible)} GPUs; start one rank for each GPU at most."
            )
            yield "devices", f"rank {facts.rank}", sentence
            return
    if len(report.ranks) == report.size and (said := problem_of([facts.seat for facts in report.ranks])):
        yield "devices", "all", said


def _versions(report: Report) -> Iterator[Finding]:
    for name in report.ranks[0].versions if report.ranks else ():
        # The patch version of Python does not matter, as in a fine-tune.
        values = {
            host: ".".join(version.split(".")[:2]) if name == "python" else version
            for host, ranks in report.hosts.items()
            for version in [ranks[0].versions.get(name, "none")]
        }
        if len(set(values.values())) > 1:
            sentence = f"version of {name} differs: {by_value(values)}; install the same on all hosts."
            yield Finding("version", "all", sentence)


def _host_facts(report: Report) -> Iterator[Finding]:
    for host, ranks in report.hosts.items():
        yield from _host(host, ranks)
        yield from _store(host, ranks[0], report.meets_at)
    gpus = {host: ranks[0].device for host, ranks in report.hosts.items() if ranks[0].on_gpu}
    if len(set(gpus.values())) > 1:
        sentence = f"GPUs differ: {by_value(gpus)}; every step takes as long as the slowest, so train on one kind."
        yield Finding("devices", "all", sentence, is_error=False)


def _host(host: str, ranks: list[Facts]) -> Iterator[Finding]:
    where, first = f"host {host}", ranks[0]
    if first.unused_gpu:
        cuda = first.versions.get("CUDA", "none")
        fix = "install a torch with CUDA" if cuda == "none" else f"install a driver for CUDA {cuda}, look at nvidia-smi"
        fix += ", or unset CUDA_VISIBLE_DEVICES if that hides them"
        sentence = f"{where} has an NVIDIA driver, but torch {first.versions.get('torch')} sees no GPU; {fix}."
        yield Finding("devices", where, sentence)
    threads = sum(facts.omp_threads for facts in ranks)
    if len(ranks) > 1 and threads > first.host_cores:
        each = max(1, first.host_cores // len(ranks))
        sentence = (
            f"{where} has {first.host_cores} cores, and its {len(ranks)} ranks use {threads} threads; "
            f"set OMP_NUM_THREADS={each}."
        )
        yield Finding("threads", where, sentence, is_error=False)
    limits = [facts.memlock_bytes for facts in ranks if facts.memlock_bytes is not None]
    if limits and min(limits) < MEMLOCK_AT_LEAST and first.infiniband:
        sentence = (
            f"{where} lets a process lock {min(limits):,} bytes of memory (RLIMIT_MEMLOCK), and InfiniBand needs "
            "more; start the ranks with `ulimit -l unlimited`."
        )
        yield Finding("memlock", where, sentence, is_error=False)


def _store(host: str, facts: Facts, meets_at: str) -> Iterator[Finding]:
    """Torch's store asks for no password, and what it is told is believed."""
    elsewhere = {name: at for name, at in facts.interfaces.items() if not is_loopback(at)}
    if elsewhere and any(address in ALL for address in facts.store_bound):
        port = meets_at.rpartition(":")[2]
        sentence = (
            f"the ranks' store on host {host} listens on port {port} of all interfaces ({shown(elsewhere)}) and asks "
            "for no password, as all of torch's: whoever reaches it can stop the run or have the ranks run code; let "
            "only the hosts of this cluster reach it (a network of their own, or a firewall on the other interfaces)."
        )
        yield Finding("store", f"host {host}", sentence, is_error=False)


def _clocks(report: Report) -> Iterator[Finding]:
    for reach in report.reach:
        offset = reach.clock_offset_seconds
        if reach.to != 0 or offset is None or abs(offset) <= CLOCKS_DIFFER:
            continue
        host = report.host_of(reach.rank)
        if report.hosts[host][0].rank == reach.rank:
            sentence = (
                f"the clock of host {host} is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} that of "
                f"host {report.host_of(0)}, so that their logs and file times disagree; start an NTP client (chrony)."
            )
            yield Finding("clock", f"host {host}", sentence, is_error=False)


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


def _slow_hosts(report: Report) -> Iterator[Finding]:
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
