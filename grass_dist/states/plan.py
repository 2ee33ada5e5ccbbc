"""Decides which mode a run takes, what that costs on the device and on the host, and whether the host can hold it."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from grass_dist.config import GrassConfig, OffloadMode, slot_count
from grass_dist.errors import ConfigError
from grass_dist.ranks import Ranks, say

SHARE = 4
""""auto" lets the states have one part in so many of the device memory that is free when training begins."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does with the states of its layers on this rank; the mode is the same on all ranks."""

    mode: OffloadMode
    """Not "auto"."""
    device_bytes: int
    """The most that states take, with those of the roles."""
    host_bytes: int


def make_plan(
    ranks: Ranks,
    config: GrassConfig,
    sizes: Sequence[tuple[int, int]],
    resident: int,
    device: torch.device,
    *,
    fallback: str | None = None,
) -> Plan:
    """Chooses the mode, tells what it costs, and refuses what a host cannot hold.

    Over the wire: one all-gather of some numbers from each rank.

    Args:
        ranks: those that train one model together.
        config: of the run; equal on all ranks.
        sizes: bytes of each layer's state on this rank, on the device and on the host.
        resident: bytes of the states that never move, on this rank.
        device: that trains.
        fallback: why nothing can move here; "interval" and "stream" are refused then, any other mode is "none".

    Raises:
        ConfigError: on every rank alike.
    """
    mode = config.offload.mode
    if fallback is None and not any(size for size, _ in sizes):
        return Plan("none", resident, 0)  # the optimizer keeps nothing that could move
    if fallback is not None:
        if mode == "none":
            return Plan("none", resident, 0)
        if mode in ("interval", "stream"):
            raise ConfigError("offload.mode", mode, f"states cannot move: {fallback}", "use 'none'")
        say(ranks, f"States stay on the device (grass.offload.mode='none'): {fallback}.")
        return Plan("none", resident, 0)
    mode = mode or "interval"
    costs = _costs(config, sizes, resident)
    host = 0 if mode == "none" else sum(size for _, size in sizes)
    reports = cast(
        "list[dict[str, Any]]",
        ranks.gather_objects(
            {"host": _host(), "free": free_host_memory(), "device": _free_device(device), "costs": costs, "bytes": host}
        ),
    )
    on_cpu = device.type == "cpu"
    if mode == "auto":
        mode = _first_that_fits(reports, on_cpu)
        host = 0 if mode == "none" else host
    if mode != "none" and config.offload.folder is None:
        _check_hosts(reports, mode, on_cpu)
    here = [report["bytes"] for report in reports if report["host"] == reports[0]["host"]]
    where = f"in {config.offload.folder}" if config.offload.folder else "in host memory" if on_cpu else "pinned"
    count = f"on this host of {len(here)} ranks" if len(here) > 1 else "on this host"
    parts = [f"{gigabytes(costs[mode])} on the device" + (" of each rank" if len(reports) > 1 else "")]
    if mode != "none" and len({size for size, _ in sizes}) > 1:
        count_of = slot_count(config, mode, len(sizes))
        parts[0] += f" ({count_of} slots of {gigabytes(max(size for size, _ in sizes))}, the size of the largest layer)"
    parts += [f"{gigabytes(sum(here))} {where} {count}"] if host else []
    say(ranks, f"states ({mode}): {', '.join(parts)}")
    return Plan(mode, costs[mode], host)


def free_host_memory() -> int | None:
    """Bytes that this process may still take: of the machine, and of its control group; None where nobody says."""
    limits = []
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        return None
    for limit, used in _cgroup_files():
        try:
            limits.append(int(limit.read_text()) - int(used.read_text()) + _cache(limit.parent))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(limits)


def check_host_memory(ranks: Ranks, setting: str, value: str, needed: int) -> int:
    """Checks that each host has the memory that its ranks need; gives the bytes of the ranks on the first one.

    Over the wire: one all-gather of some numbers from each rank.

    Args:
        needed: bytes of this rank.

    Raises:
        ConfigError: on every rank alike.
    """
    mine = {"host": _host(), "free": free_host_memory(), "bytes": needed}
    reports = cast("list[dict[str, Any]]", ranks.gather_objects(mine))
    for host in dict.fromkeys(report["host"] for report in reports):
        here = [report for report in reports if report["host"] == host]
        total, free = sum(report["bytes"] for report in here), [r["free"] for r in here if r["free"] is not None]
        if free and total > min(free):
            problem = (
                f"the weights of all layers take {gigabytes(total)} of host memory on {host[1]} for its {len(here)} "
                f"ranks, and {gigabytes(min(free))} are free"
            )
            raise ConfigError(setting, value, problem, "use more hosts, or 'resident'")
    return sum(report["bytes"] for report in reports if report["host"] == reports[0]["host"])


def _cgroup_files() -> Iterator[tuple[Path, Path]]:
    """Limit and use of memory of each control group that this process is in, as cgroup 2 and 1 name them."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup", controllers)
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        inner = root / path.lstrip("/")
        for folder in (inner, *(parent for parent in inner.parents if parent.is_relative_to(root))):
            yield folder / names[0], folder / names[1]


def _cache(group: Path) -> int:
    """Bytes that a control group counts as used and gives back when they are needed."""
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(stat.get("inactive_file", stat.get("total_inactive_file", 0)))


def _costs(config: GrassConfig, sizes: Sequence[tuple[int, int]], resident: int) -> dict[str, int]:
    """Bytes on the device in each mode."""
    longest = max(size for size, _ in sizes)
    return {
        "none": resident + sum(size for size, _ in sizes),
        "interval": resident + slot_count(config, "interval", len(sizes)) * longest,
        "stream": resident + slot_count(config, "stream", len(sizes)) * longest,
    }


def _first_that_fits(reports: Sequence[dict[str, Any]], on_cpu: bool) -> OffloadMode:
    """Decides by the rank that has the least room."""

    def room(report: dict[str, Any]) -> float:
        if not on_cpu:
            return report["device"]
        ranks = sum(other["host"] == report["host"] for other in reports)
        return float("inf") if report["free"] is None else report["free"] / ranks

    modes: tuple[OffloadMode, ...] = ("none", "interval")
    for mode in modes:
        if all(report["costs"][mode] * SHARE <= room(report) for report in reports):
            return mode
    return "stream"


def _check_hosts(reports: Sequence[dict[str, Any]], mode: OffloadMode, on_cpu: bool) -> None:
    for host in dict.fromkeys(report["host"] for report in reports):
        ranks = [report for report in reports if report["host"] == host]
        needed = sum(report["bytes"] + (report["costs"][mode] if on_cpu else 0) for report in ranks)
        free = min((report["free"] for report in ranks if report["free"] is not None), default=None)
        if free is not None and needed > free:
            raise ConfigError(
                "offload.mode",
                mode,
                f"the states of all layers take {gigabytes(needed)} of host memory on {host[1]} for its {len(ranks)} "
                f"ranks, and {gigabytes(free)} are free",
                "set offload.folder to a folder on a fast local disk, or use more hosts"
                + ("" if on_cpu else ", or offload.mode='none'"),
            )


def _host() -> tuple[str, str]:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return boot, socket.gethostname()


def _free_device(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def gigabytes(nbytes: int) -> str:
    """Bytes as a sentence shows them."""
    return f"{nbytes / 1e9:.3g} GB" if nbytes >= 1e7 else f"{nbytes / 1e6:.3g} MB"
