"""Prints on rank 0 the tables of ranks, hosts and speeds, then what looks wrong."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from grass_dist.doctor.facts import Report
from grass_dist.doctor.network import ALL
from grass_dist.doctor.schema import clock_offset, pinnable_bytes
from grass_dist.doctor.words import Finding, by_value, duration, listed, size, speed

LINKS_SHOWN = 16
"""Number of links that are shown, the slowest ones."""


def show(report: Report, findings: Sequence[Finding]) -> None:
    """Prints all of it on stdout."""
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    tables = [_ranks(report), _hosts(report)] if report.ranks else []
    for table in [*tables, *_speeds(report)]:
        console.print(table)
    for line in [*_store(report), *_versions(report), *_formulas(report), *_verdict(findings)]:
        console.print(line, markup=False, soft_wrap=True)
    sys.stdout.flush()


def _ranks(report: Report) -> Any:
    copies = {one.rank: one for one in report.copies}
    gpu = any(facts.on_gpu for facts in report.ranks)
    into, out = ("H2D, pinned", "D2H, pinned") if gpu else ("copies (no GPU)", "")
    rows = []
    for facts in report.ranks:
        offset = clock_offset(report, facts.rank) if report.size > 1 else None
        one = copies.get(facts.rank)
        device = facts.device + (f", {size(facts.device_bytes)}" if facts.device_bytes else "")
        where = f"{facts.address} ({facts.interface or '?'}, by {facts.chosen_by})" if report.size > 1 else None
        rows.append(
            [
                facts.rank,
                report.host_of(facts.rank),
                facts.seat.local_rank,
                device,
                f"{facts.cores}/{facts.omp_threads}",
                where,
                None if offset is None else duration(offset),
                one and _both(one.h2d_alone, one.h2d_together),
                one and gpu and _both(one.d2h_alone, one.d2h_together),
            ]
        )
    columns = ("rank", "host", "local", "device", "cores/threads", "address", "clock", into, out)
    return _table("Ranks; copies alone → while all ranks of the host copy", columns, rows)


def _both(alone: float, together: float) -> str:
    return speed(alone) if alone == together else f"{speed(alone)} → {speed(together)}"


def _hosts(report: Report) -> Any:
    disks = {one.host: one for one in report.disks if not one.problem}
    rows = []
    for host, ranks in report.hosts.items():
        free = [facts.available_bytes for facts in ranks if facts.available_bytes is not None]
        limits = [facts.memlock_bytes for facts in ranks if facts.memlock_bytes is not None]
        pinnable, disk = pinnable_bytes(ranks, report.copies), disks.get(host)
        rows.append(
            [
                host,
                len(ranks),
                ranks[0].host_cores,
                size(min(free)) if free else None,
                None if pinnable is None else size(pinnable),
                size(min(limits)) if limits else "no limit",
                disk and speed(disk.write),
                disk and speed(disk.read),
                disk and size(disk.free_bytes),
            ]
        )
    where = f"; the disk is that of {next(iter(disks.values())).folder}" if disks else ""
    columns = (
        "host",
        "ranks",
        "cores",
        "memory free",
        "can be pinned",
        "memlock",
        "write + fsync",
        "read",
        "disk free",
    )
    return _table(f"Hosts{where}", columns, rows)


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
        yield _table("Collectives", columns, rows)
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
        yield _table(title, ("from", "to", "message", "bandwidth", "latency"), rows)


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


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Any:
    """Makes a table without the columns that are empty in all rows."""
    from rich.table import Table
    from rich.text import Text

    rows = [["" if cell is None or cell is False else str(cell) for cell in row] for row in rows]
    used = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    table = Table(title=Text(title), title_justify="left")
    for i in used:
        table.add_column(columns[i], overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[i]) for i in used))
    return table
