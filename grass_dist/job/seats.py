"""Finds where each rank sits, its host and its device, and refuses ranks that sit on the same device."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class Seat:
    """One rank's host and device, as it sees them."""

    host: str
    machine: str
    """Identity of this boot of the machine, which tells hosts of one name, in containers, apart."""
    local_rank: int
    device: str | None
    """UUID of its GPU; None on a CPU."""
    visible: tuple[str, ...]
    """UUIDs of the GPUs that it could take, in the order in which it sees them."""


def own_seat(local_rank: int, device: torch.device) -> Seat:
    boot = Path("/proc/sys/kernel/random/boot_id")
    machine = boot.read_text().strip() if boot.exists() else ""
    visible: tuple[str, ...] = ()
    if device.type == "cuda":
        visible = tuple(str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count()))
    taken = visible[device.index] if device.index is not None and visible else None
    return Seat(socket.gethostname(), machine, local_rank, taken, visible)


def problem_of(seats: Sequence[Seat]) -> str | None:
    """Says in a sentence what is wrong with the seats of all ranks, in rank order; None if nothing is."""
    for rank, seat in enumerate(seats):
        for other, before in enumerate(seats[:rank]):
            same_host = (seat.host, seat.machine) == (before.host, before.machine)
            if same_host and (said := _contradict(before, seat)):
                return f"ranks {other} and {rank} on host {seat.host} {said}"
    return None


def _contradict(one: Seat, two: Seat) -> str | None:
    """Says in what two ranks of one host contradict each other."""
    if one.device is not None and one.device == two.device:
        return f"both use the GPU {one.device}; start one rank for each GPU at most."
    if one.local_rank == two.local_rank:
        return (
            f"are both number {one.local_rank} there; start all ranks of a host by one launcher, "
            "or number them by LOCAL_RANK."
        )
    if len(one.visible) != len(two.visible) or (len(one.visible) > 1 and one.visible != two.visible):
        return (
            f"see different GPUs ({len(one.visible)} and {len(two.visible)}); set CUDA_VISIBLE_DEVICES alike for all "
            "ranks of a host, or give each rank one GPU."
        )
    return None
