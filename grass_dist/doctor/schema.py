"""Writes everything that was found as JSON, for the planner. Units are in the names: bytes, bytes_per_s, seconds.

version        1; another number where a field changes its meaning
size           number of ranks, as the launcher tells it
ranks          each rank that came: rank, local_rank, host, device, device_bytes (0 on CPU), cores, omp_threads,
               interface, address, store_bound (addresses at which the ranks' store listens on its host; 0.0.0.0 and ::
               are all interfaces), versions, clock_offset_seconds (against rank 0), memlock_bytes (null: no limit),
               h2d_bytes_per_s and d2h_bytes_per_s (alone on its host), h2d_together_bytes_per_s and
               d2h_together_bytes_per_s (while all its ranks copy), pinned (whether the copies were); null where
               it was not measured
hosts          each host: host, ranks (their numbers), cores, available_bytes (MemAvailable, or what its control
               groups leave), pinnable_bytes, folder, disk_write_bytes_per_s, disk_read_bytes_per_s,
               disk_free_bytes, all_reduce, reduce_scatter (as below, of its ranks alone; null for one rank)
all_reduce     over all ranks: ranks, nbytes, seconds, latency_seconds, algorithm_bytes_per_s (nbytes / seconds),
               bus_bytes_per_s (that times 2 (ranks - 1) / ranks)
reduce_scatter the same; nbytes is the input of a rank, bus_bytes_per_s has the factor (ranks - 1) / ranks
links          each direction between first ranks of two hosts: sender, receiver, nbytes, seconds, bytes_per_s,
               latency_seconds
unreachable    rank, to, problem
findings       kind, where, sentence, is_error
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from grass_dist.doctor.facts import Collective, Copies, Facts, Report
from grass_dist.doctor.findings import Finding

VERSION = 1


def report_json(report: Report, findings: Sequence[Finding]) -> dict[str, Any]:
    """Returns the object that the module describes, with values that JSON can hold."""
    return {
        "version": VERSION,
        "size": report.size,
        "ranks": [rank_entry(report, facts) for facts in report.ranks],
        "hosts": [host_entry(report, host, ranks) for host, ranks in report.hosts.items()],
        "all_reduce": _collective(report, "all_reduce", "all"),
        "reduce_scatter": _collective(report, "reduce_scatter", "all"),
        "links": [{**asdict(link), "bytes_per_s": link.bytes_per_s} for link in report.links],
        "unreachable": [_picked(one, "rank", "to", "problem") for one in report.reach if one.problem],
        "findings": [_picked(one, "kind", "where", "sentence", "is_error") for one in findings],
    }


def clock_offset(report: Report, rank: int) -> float | None:
    """Seconds by which a rank's clock is ahead of rank 0's; 0 on rank 0's host. None if the two could not talk."""
    if report.host_of(rank) == report.host_of(0):
        return 0.0
    return next((one.clock_offset_seconds for one in report.reach if (one.rank, one.to) == (rank, 0)), None)


def pinnable_bytes(ranks: Sequence[Facts], copies: Sequence[Copies]) -> int | None:
    """Bytes that the ranks of a host together may pin: what is free, or what each of them may lock.

    CUDA's drivers usually do not count what they pin against RLIMIT_MEMLOCK, so the limit is left out where a rank has
    pinned more for its ``copies``. None where the host does not say what is free.
    """
    free = [facts.available_bytes for facts in ranks if facts.available_bytes is not None]
    if not free:
        return None
    pinned = {one.rank: one.nbytes for one in copies}
    may_lock = 0
    for facts in ranks:
        limit = facts.memlock_bytes
        if limit is None or (facts.on_gpu and pinned.get(facts.rank, 0) > limit):
            return min(free)
        may_lock += limit
    return min(*free, may_lock)


def rank_entry(report: Report, facts: Facts) -> dict[str, Any]:
    """Returns the entry of one rank in ``ranks``."""
    copies = next((one for one in report.copies if one.rank == facts.rank), None)
    own = ("rank", "device", "device_bytes", "cores", "omp_threads", "interface", "address", "versions")
    return {
        **_picked(facts, *own, "memlock_bytes"),
        "store_bound": list(facts.store_bound),
        "local_rank": facts.seat.local_rank,
        "host": report.host_of(facts.rank),
        "clock_offset_seconds": clock_offset(report, facts.rank),
        "h2d_bytes_per_s": copies and copies.h2d_alone,
        "d2h_bytes_per_s": copies and copies.d2h_alone,
        "h2d_together_bytes_per_s": copies and copies.h2d_together,
        "d2h_together_bytes_per_s": copies and copies.d2h_together,
        "pinned": facts.on_gpu,
    }


def host_entry(report: Report, host: str, ranks: Sequence[Facts]) -> dict[str, Any]:
    """Returns the entry of one host, and of its ``ranks``, in ``hosts``."""
    disk = next((one for one in report.disks if one.host == host and not one.problem), None)
    # The ranks of a single host are all ranks.
    over = "all" if len(ranks) == report.size else host
    free = [facts.available_bytes for facts in ranks if facts.available_bytes is not None]
    return {
        "host": host,
        "ranks": [facts.rank for facts in ranks],
        "cores": ranks[0].host_cores,
        "available_bytes": min(free) if free else None,
        "pinnable_bytes": pinnable_bytes(ranks, report.copies),
        "folder": disk and disk.folder,
        "disk_write_bytes_per_s": disk and disk.write,
        "disk_read_bytes_per_s": disk and disk.read,
        "disk_free_bytes": disk and disk.free_bytes,
        "all_reduce": _collective(report, "all_reduce", over),
        "reduce_scatter": _collective(report, "reduce_scatter", over),
    }


def _collective(report: Report, kind: str, over: str) -> dict[str, Any] | None:
    found: Collective | None = next((c for c in report.collectives if (c.kind, c.over) == (kind, over)), None)
    if found is None:
        return None
    names = ("ranks", "nbytes", "seconds", "latency_seconds", "algorithm_bytes_per_s", "bus_bytes_per_s")
    return _picked(found, *names)


def _picked(value: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names}
