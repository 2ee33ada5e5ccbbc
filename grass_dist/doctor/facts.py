"""Holds what the ranks have found, as plain data in seconds, bytes and bytes/s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from grass_dist.job.seats import Seat


@dataclass(frozen=True, slots=True)
class Facts:
    """Holds what one rank says about itself and its host."""

    rank: int
    seat: Seat
    """Its host and device."""
    launcher: str
    versions: dict[str, str]
    """Version of each package; "none" for what is not installed."""
    device: str
    """Name of its GPU, or "CPU"."""
    device_bytes: int
    """Memory of its GPU; 0 on CPU."""
    unused_gpu: bool
    """True if the host has a driver for NVIDIA GPUs, and torch sees none of them."""
    cores: int
    """Number of cores that this process may run on."""
    host_cores: int
    omp_threads: int
    interfaces: dict[str, str]
    """Address of each interface that has one, by the name of the interface."""
    interface: str
    """Interface by which others reach this rank; "" if unknown."""
    address: str
    port: int
    """Port on which it listens while the doctor runs; 0 if it cannot."""
    chosen_by: str
    """The reason for the interface, e.g. "GLOO_SOCKET_IFNAME", "the host name" or "the route to grass1"."""
    interface_problem: str
    """Sentence on an interface that is not there; "" if it is."""
    name_problem: str
    """The problem of the address of the host's own name, on which gloo listens unless it is told an interface."""
    available_bytes: int | None
    """Host memory that this process may still take: MemAvailable, or what its control groups leave."""
    memlock_bytes: int | None
    """RLIMIT_MEMLOCK of this process; None without a limit, or with CAP_IPC_LOCK, to which none applies."""
    infiniband: bool
    """True if the host has adapters for RDMA."""
    store_bound: tuple[str, ...] = ()
    """Addresses of this host at which the ranks' store listens; "0.0.0.0" and "::" mean all. Empty if it does not."""

    @property
    def host(self) -> str:
        return self.seat.host

    @property
    def on_gpu(self) -> bool:
        return self.seat.device is not None

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Facts:
        seat = Seat(**{**found["seat"], "visible": tuple(found["seat"]["visible"])})
        return cls(**{**found, "seat": seat, "store_bound": tuple(found["store_bound"])})


@dataclass(frozen=True, slots=True)
class Reach:
    """One attempt of a rank to connect to another."""

    rank: int
    to: int
    seconds: float | None = None
    """The shortest round trip; None if it failed."""
    clock_offset_seconds: float | None = None
    """This rank's clock minus the other's, with an error of up to half the round trip."""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Collective:
    """One kind of collective over a set of ranks."""

    kind: str
    """The collective: "all_reduce" or "reduce_scatter"."""
    over: str
    """Its ranks: "all", or the name of a host."""
    ranks: int
    nbytes: int
    """Bytes of the input of each rank (S)."""
    seconds: float
    """Median of several, on the slowest rank (t)."""
    latency_seconds: float
    """Seconds for one element of each rank."""

    @property
    def algorithm_bytes_per_s(self) -> float:
        """Returns S / t: the input of each rank over the time of the collective."""
        return self.nbytes / self.seconds

    @property
    def bus_bytes_per_s(self) -> float:
        """Returns what a rank sends in a ring over the time: S/t times 2 (n - 1) / n, or (n - 1) / n to reduce-scatter.

        It can be compared with the speed of the wire, and between numbers of ranks.
        """
        return self.algorithm_bytes_per_s * (2 if self.kind == "all_reduce" else 1) * (self.ranks - 1) / self.ranks


@dataclass(frozen=True, slots=True)
class Link:
    """One direction between the first ranks of two hosts."""

    sender: str
    receiver: str
    nbytes: int
    seconds: float
    """Time until the receiver's answer of one element has come back."""
    latency_seconds: float
    """Half of the time for one element there and one back."""

    @property
    def bytes_per_s(self) -> float:
        return self.nbytes / self.seconds


@dataclass(frozen=True, slots=True)
class Copies:
    """Bytes/s of one rank's pinned copies. On CPU they are within pageable host memory, the same in both fields."""

    rank: int
    nbytes: int
    h2d_alone: float
    d2h_alone: float
    h2d_together: float = 0.0
    """Bytes/s while all ranks of the host copy."""
    d2h_together: float = 0.0


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes/s of the disk that the first rank of a host sees at ``folder``."""

    host: str
    folder: str
    nbytes: int = 0
    write: float = 0.0
    """Bytes/s with fsync."""
    read: float = 0.0
    """Bytes/s after the file has been dropped from the page cache, where the system does so when asked."""
    free_bytes: int = 0
    problem: str = ""


@dataclass(slots=True)
class Report:
    """Everything that was found, in rank order; empty where it was not measured."""

    size: int
    timeout: float
    meets_at: str = ""
    """The place where the ranks meet, ``address:port`` of the store; "" for one process."""
    ranks: list[Facts] = field(default_factory=list)
    """Facts of the ranks that came."""
    reach: list[Reach] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    copies: list[Copies] = field(default_factory=list)
    disks: list[Disk] = field(default_factory=list)
    failed: str = ""
    """Sentence on a step that failed; later ones were not tried."""

    @property
    def hosts(self) -> dict[str, list[Facts]]:
        """Returns the ranks of each host. Hosts of one name, in containers, are told apart: "node", "node (2)"."""
        machines: dict[tuple[str, str], list[Facts]] = {}
        for facts in self.ranks:
            machines.setdefault((facts.host, facts.seat.machine), []).append(facts)
        named: dict[str, list[Facts]] = {}
        for (name, _), ranks in machines.items():
            count = sum(other == name or other.startswith(f"{name} (") for other in named)
            named[f"{name} ({count + 1})" if count else name] = ranks
        return named

    def host_of(self, rank: int) -> str:
        return next((host for host, ranks in self.hosts.items() if any(f.rank == rank for f in ranks)), "?")
