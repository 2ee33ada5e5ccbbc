"""Judges from the facts alone what looks wrong, each in a sentence with the host or rank, the value and the fix.

An error breaks or cripples a run, and makes the exit status 1. One that `Finding.stops` would make collectives hang or
fail, so none is tried. `measured` judges what was measured, by rules of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from grass_dist.doctor.facts import Facts, Report
from grass_dist.doctor.measured import judge_measures
from grass_dist.doctor.network import ALL, shown
from grass_dist.doctor.words import Finding, by_value, hosts_named, listed
from grass_dist.job.interfaces import is_loopback
from grass_dist.job.seats import problem_of

CLOCKS_DIFFER = 5.0
"""Seconds by which the clocks of two hosts may differ."""
MEMLOCK_AT_LEAST = 1 << 30
"""Bytes that a rank should be able to lock."""


def judge(report: Report) -> list[Finding]:
    """Returns everything that looks wrong, errors first."""
    found = [*judge_meeting(report), *_versions(report), *_host_facts(report), *_clocks(report)]
    if report.failed:
        found.append(Finding("failed", "all", report.failed))
    found += judge_measures(report)
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
        yield (
            "missing",
            who,
            f"{who} of {report.size} did not come within {report.timeout:g} s; look at the output on its host: one "
            f"that cannot reach {report.meets_at} says so there, and raise --timeout if hosts start that far apart.",
        )


def _interfaces(report: Report) -> Said:
    for host, ranks in report.hosts.items():
        for problem in dict.fromkeys(facts.interface_problem for facts in ranks if facts.interface_problem):
            fix = "name the one that leads to the other hosts, or unset the variable"
            yield "interface", f"host {host}", f"host {host}: {problem}; {fix}."
        first = ranks[0]
        if first.name_problem and len(report.hosts) > 1:
            shown = first.interface or "the interface that leads to the other hosts"
            yield (
                "host name",
                f"host {host}",
                f"host {host}: its own name {first.name_problem}, and gloo would listen there; set "
                f"GLOO_SOCKET_IFNAME={shown} (or --interface here), or correct /etc/hosts.",
            )


def _addresses(report: Report) -> Said:
    """Finds addresses that every host has, such as those of docker0."""
    seen: dict[str, str] = {}
    for host, ranks in report.hosts.items():
        address = ranks[0].address
        if (other := seen.setdefault(address, host)) != host:
            yield (
                "address",
                f"host {host}",
                f"hosts {other} and {host} both give the address {address} ({ranks[0].interface or 'no interface'}); "
                "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that leads to the other hosts.",
            )


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
        yield (
            "unreachable",
            f"host {report.host_of(to)}",
            f"{hosts_named(hosts)} cannot connect to host {report.host_of(to)} at {where}: {problem}; let all TCP "
            "ports pass between the hosts (firewall, routes), or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to an "
            "interface on which they reach each other.",
        )


def _devices(report: Report) -> Said:
    kinds = {host: "GPUs" if ranks[0].on_gpu else "CPU" for host, ranks in report.hosts.items()}
    if len(set(kinds.values())) > 1:
        yield (
            "devices",
            "all",
            f"ranks train on {by_value(kinds)}; give every host GPUs and a torch with CUDA, or set "
            "CUDA_VISIBLE_DEVICES= on all.",
        )
    for facts in report.ranks:
        if len(facts.seat.visible) > 1 and facts.seat.local_rank >= len(facts.seat.visible):
            yield (
                "devices",
                f"rank {facts.rank}",
                f"rank {facts.rank} is number {facts.seat.local_rank} on host {report.host_of(facts.rank)}, which has "
                f"{len(facts.seat.visible)} GPUs; start one rank for each GPU at most.",
            )
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
