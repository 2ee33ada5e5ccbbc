"""Prints on rank 0 the tables of ranks, hosts and speeds, then what looks wrong."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from grass_dist.doctor.facts import Report
from grass_dist.doctor.findings import Finding, by_value, listed
from grass_dist.doctor.network import ALL
from grass_dist.doctor.schema import host_entry, rank_entry
from grass_dist.terminal import console, duration, size, speed, table

LINKS_SHOWN = 16
"""Number of links that are shown, the slowest ones."""


def show(report: Report, findings: Sequence[Finding]) -> None:
    """Prints all of it on stdout."""
    out = console(160)
    tables = [_ranks(report), _hosts(report)] if report.ranks else []
    for made in [*tables, *_speeds(report)]:
        out.print(made)
    for line in [*_store(report), *_versions(report), *_formulas(report), *_verdict(findings)]:
        out.print(line, markup=False, soft_wrap=True)
    sys.stdout.flush()


def _ranks(report: Report) -> Any:
    gpu = any(facts.on_gpu for facts in report.ranks)
    into, out = ("H2D, pinned", "D2H, pinned") if gpu else ("copies (no GPU)", "")
    rows = []
    for facts in report.ranks:
        entry = rank_entry(report, facts)
        device = facts.device + (f", {size(facts.device_bytes)}" if facts.device_bytes else "")
        cells = [facts.rank, entry["host"], facts.seat.local_rank, device, f"{facts.cores}/{facts.omp_threads}"]
        where = offset = None
        if report.size > 1:
            where = f"{facts.address} ({facts.interface or '?'}, by {facts.chosen_by})"
            offset = _written(duration, entry["clock_offset_seconds"])
        rows.append([*cells, where, offset, _copied(entry, "h2d"), gpu and _copied(entry, "d2h")])
    columns = ("rank", "host", "local", "device", "cores/threads", "address", "clock", into, out)
    return table("Ranks; copies alone → while all ranks of the host copy", columns, rows)


def _copied(entry: Mapping[str, Any], way: str) -> str | None:
    alone, together = (_written(speed, entry[f"{way}{when}_bytes_per_s"]) for when in ("", "_together"))
    return alone if alone == together else f"{alone} → {together}"


def _written(write: Callable[[float], str], value: float | None) -> str | None:
    return None if value is None else write(value)


def _hosts(report: Report) -> Any:
    rows, folders = [], set[str]()
    for host, ranks in report.hosts.items():
        entry = host_entry(report, host, ranks)
        limits = [facts.memlock_bytes for facts in ranks if facts.memlock_bytes is not None]
        memory = [_written(size, entry[name]) for name in ("available_bytes", "pinnable_bytes")]
        disk = [_written(speed, entry[f"disk_{way}_bytes_per_s"]) for way in ("write", "read")]
        limit = size(min(limits)) if limits else "no limit"
        rows.append([host, len(ranks), entry["cores"], *memory, limit, *disk, _written(size, entry["disk_free_bytes"])])
        folders |= {entry["folder"]} - {None}
    where = f"; the disk is that of {min(folders)}" if folders else ""
    memory = ("memory free", "can be pinned", "memlock")
    columns = ("host", "ranks", "cores", *memory, "write + fsync", "read", "disk free")
    return table(f"Hosts{where}", columns, rows)


def _speeds(report: Report) -> Iterable[Any]:
    if report.collectives:
        rows = [
            [
                one.kind.replace("_", "-"),
                "all ranks" if one.over == "all" else f"within {one.over}",
                one.ranks,
                size(one.nbytes),
                duration(one.seconds),
                speed(one.algorithm_bytes_per_s),
                speed(one.bus_bytes_per_s),
                duration(one.latency_seconds),
            ]
            for one in report.collectives
        ]
        columns = ("collective", "over", "ranks", "S", "t", "algorithm bandwidth", "bus bandwidth", "latency")
        yield table("Collectives", columns, rows)
    if report.links:
        slowest = sorted(report.links, key=lambda link: link.bytes_per_s)[:LINKS_SHOWN]
        kept = [link for link in report.links if link in slowest]
        rows = [
            [link.sender, link.receiver, size(link.nbytes), speed(link.bytes_per_s), duration(link.latency_seconds)]
            for link in kept
        ]
        more = f", the slowest {len(kept)} of {len(report.links)}" if len(kept) < len(report.links) else ""
        median = speed(statistics.median(link.bytes_per_s for link in report.links))
        title = f"Links between first ranks{more}; the median is {median}"
        yield table(title, ("from", "to", "message", "bandwidth", "latency"), rows)


def _store(report: Report) -> Iterable[str]:
    """Says where the store listens by which all ranks meet."""
    for host, ranks in report.hosts.items():
        if bound := ranks[0].store_bound:
            where = "all interfaces" if any(address in ALL for address in bound) else listed(bound)
            yield f"The ranks meet at {report.meets_at}; the store listens on {where} of host {host}, with no password."


def _versions(report: Report) -> Iterable[str]:
    """Writes in one line the versions that all hosts have; one that differs is a finding."""
    if not report.ranks:
        return
    names = report.ranks[0].versions
    values = {name: {host: its[0].versions.get(name, "none") for host, its in report.hosts.items()} for name in names}
    same = [f"{name} {next(iter(of.values()))}" for name, of in values.items() if len(set(of.values())) == 1]
    yield f"Versions: {', '.join(same)}."
    yield from (f"  {name}: {by_value(of)}." for name, of in values.items() if len(set(of.values())) > 1)


def _formulas(report: Report) -> Iterable[str]:
    if report.collectives:
        yield (
            "Algorithm bandwidth is S / t, with S bytes of input on each of n ranks; bus bandwidth is that times "
            "2 (n - 1) / n for all-reduce and (n - 1) / n for reduce-scatter."
        )


def _verdict(findings: Sequence[Finding]) -> Iterable[str]:
    if not findings:
        yield "Nothing looks wrong."
        return
    yield "What looks wrong:"
    for finding in findings:
        yield f"  {'error' if finding.is_error else 'warning'}: {finding.sentence}"
    if any(finding.stops for finding in findings):
        yield "Nothing was measured: the collectives would hang or fail."
