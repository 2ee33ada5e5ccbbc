"""Measures collectives over all ranks and within each host, and every link between two hosts.

Each kind of collective sends at most some seven times ``--size`` a rank over the wire, each link three times. It is
less where the wire is slow: a small message goes first, and shows how much fits into a second or two.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from grass_dist.doctor.facts import Collective, Link
from grass_dist.job.world import World

KINDS = ("all_reduce", "reduce_scatter")
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # its name from torch 2.13 on
PROBE = 256 << 10
"""Bytes of the small message that goes first."""
COLLECTIVE_SECONDS = 2.0
"""Approximate time budget of each measurement of a collective."""
LINKS_SECONDS = 40.0
"""Approximate time budget of all links together."""
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Part:
    """Some ranks that measure among themselves."""

    name: str
    """Name of the ranks, as in `Collective.over`."""
    group: dist.ProcessGroup | None
    """Their process group; None for all ranks."""
    control: dist.ProcessGroup
    """A gloo group of the same ranks, for tensors in host memory."""
    ranks: int


def affordable(wanted: int, probe: int, probe_seconds: float, budget: float) -> int:
    """Bytes of a message that takes ``budget`` seconds at the speed of the probe, from ``probe`` to ``wanted``.

    Args:
        probe: bytes of the message that took ``probe_seconds``.
    """
    return max(probe, min(wanted, int(probe * budget / max(probe_seconds, 1e-9))))


def measure_all(world: World, nbytes: int) -> list[Collective]:
    """Measures the collectives over all ranks. Collective."""
    part = Part("all", None, world.background, world.size)
    return [_measure(world, part, kind, nbytes) for kind in KINDS]


def measure_hosts(world: World, hosts: dict[str, list[int]], nbytes: int) -> list[Collective]:
    """Measures the collectives within each host of two ranks or more, all hosts at once. Collective over all ranks.

    Args:
        hosts: ranks by host, the same on all ranks.

    Returns:
        The measurements of this rank's host.
    """
    mine: Part | None = None
    for host, ranks in hosts.items():
        if len(ranks) < 2 or len(ranks) == world.size:
            continue
        group, control = dist.new_group(ranks), dist.new_group(ranks, backend="gloo")
        if isinstance(group, dist.ProcessGroup) and isinstance(control, dist.ProcessGroup) and world.rank in ranks:
            mine = Part(host, group, control, len(ranks))
    dist.barrier(group=world.background)
    return [_measure(world, mine, kind, nbytes) for kind in KINDS] if mine is not None else []


def measure_links(world: World, firsts: Sequence[tuple[str, int]], nbytes: int) -> list[Link]:
    """Measures the links between the first ranks of each two hosts, one direction after the other.

    Disjoint pairs send at the same time. Collective over all ranks.

    Args:
        firsts: host and first rank of each, the same on all ranks.

    Returns:
        The links that this rank sent over.
    """
    links, played = [], rounds(len(firsts))
    budget = min(1.0, LINKS_SECONDS / max(1, 2 * len(played)))
    for pairs in played:
        for sender, receiver in [*pairs, *((two, one) for one, two in pairs)]:
            if firsts[sender][1] == world.rank:
                links.append(_send(world, firsts[sender][0], *firsts[receiver], nbytes, budget))
            elif firsts[receiver][1] == world.rank:
                _receive(world, firsts[sender][1])
        dist.barrier(group=world.background)
    return links


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Arranges all pairs of ``count`` players in as few rounds as possible; a player is in one pair of a round at most.

    A tournament is set up like this: one player stays, and the others go round a table.
    """
    table: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    played = []
    for _ in range(len(table) - 1):
        faced = zip(table[: len(table) // 2], reversed(table[len(table) // 2 :]), strict=True)
        played.append([(min(a, b), max(a, b)) for a, b in faced if a is not None and b is not None])
        table = [table[0], table[-1], *table[1:-1]]
    return [pairs for pairs in played if pairs]


def _measure(world: World, part: Part, kind: str, nbytes: int) -> Collective:
    latency = statistics.median(_times(world, _call(world, part, kind, 4), 20, warm=3))
    probe = _slowest(part, min(_times(world, _call(world, part, kind, PROBE), 2, warm=1)))
    size = affordable(nbytes, PROBE, probe, COLLECTIVE_SECONDS / 2)
    count = max(1, min(REPEATS, int(COLLECTIVE_SECONDS / (probe * size / PROBE))))
    seconds = statistics.median(_times(world, _call(world, part, kind, size), count, warm=1 if count > 1 else 0))
    whole = _numel(size, part.ranks) * 4
    return Collective(kind, part.name, part.ranks, whole, _slowest(part, seconds), _slowest(part, latency))


def _call(world: World, part: Part, kind: str, nbytes: int) -> Callable[[], object]:
    values = torch.zeros(_numel(nbytes, part.ranks), device=world.device)
    if kind == "all_reduce":
        return lambda: dist.all_reduce(values, group=part.group)
    out = torch.empty(values.numel() // part.ranks, device=world.device)
    return lambda: _reduce_scatter(out, values, group=part.group)


def _numel(nbytes: int, ranks: int) -> int:
    """Number of elements of four bytes, the same for each rank."""
    return max(1, nbytes // 4 // ranks) * ranks


def _times(world: World, call: Callable[[], object], count: int, *, warm: int) -> list[float]:
    """Measures the seconds of each of ``count`` calls, after ``warm`` others."""
    taken = []
    for _ in range(warm + count):
        _synchronize(world)
        began = time.perf_counter()
        call()
        _synchronize(world)
        taken.append(time.perf_counter() - began)
    return taken[warm:]


def _slowest(part: Part, seconds: float) -> float:
    """Returns the longest time of all ranks, so that they agree on what follows."""
    carried = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(carried, dist.ReduceOp.MAX, group=part.control)
    return carried.item()


def _send(world: World, me: str, host: str, to: int, nbytes: int, budget: float) -> Link:
    latency = min(_sent(world, to, 4) for _ in range(5)) / 2
    probe = min(_sent(world, to, PROBE) for _ in range(2))
    size = affordable(nbytes, PROBE, probe, budget)
    seconds = min(_sent(world, to, size) for _ in range(2 if probe * size / PROBE < budget / 2 else 1))
    _tell(to, 0)
    return Link(me, host, size, seconds, latency)


def _sent(world: World, to: int, nbytes: int) -> float:
    """Measures the seconds from the first byte until the receiver says that it has all."""
    _tell(to, nbytes)
    values = torch.zeros(nbytes // 4, device=world.device)
    answer = torch.zeros(1)
    dist.recv(answer, to)  # its memory is there
    _synchronize(world)
    began = time.perf_counter()
    dist.send(values, to)
    dist.recv(answer, to)
    return time.perf_counter() - began


def _receive(world: World, sender: int) -> None:
    header, answer = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    while True:
        dist.recv(header, sender)
        if not (nbytes := int(header.item())):
            return
        values = torch.zeros(nbytes // 4, device=world.device)
        _synchronize(world)
        dist.send(answer, sender)
        dist.recv(values, sender)
        _synchronize(world)
        dist.send(answer, sender)


def _tell(to: int, nbytes: int) -> None:
    dist.send(torch.tensor([nbytes]), to)


def _synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
