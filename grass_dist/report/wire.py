"""Counts the bytes of a gradient reduction that go from rank to rank within a host, and over the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sent:
    """Bytes that all ranks together send."""

    within: float
    """Bytes to ranks of the same host."""
    across: float
    """Bytes to ranks of other hosts."""


def sent(reduced: float, hosts: Sequence[str], *, replicate: int, whole: bool) -> Sent:
    """Counts what rings send that go through the ranks in their order, as NCCL's do.

    A ring of n ranks sends (n - 1) / n of the bytes over each of its n links to reduce-scatter them, and as much again
    to gather the sums. Under HSDP the gradients are scattered in each shard group, and each shard is summed with those
    of the replicas, so that with a shard group on each host no rank sends more than its shard over the network.

    Args:
        reduced: bytes that each rank puts in.
        hosts: host of each rank.
        replicate: number of replicas of the sharded model (HSDP); 1 without replicas.
        whole: whether every rank ends with the whole sum (an all-reduce), as under DDP.
    """
    size, shard = len(hosts), len(hosts) // replicate
    within = across = 0.0

    def ring(ranks: Sequence[int], nbytes: float, passes: int) -> None:
        nonlocal within, across
        over_each = passes * nbytes * (len(ranks) - 1) / len(ranks)
        for rank, following in _links(ranks):
            if hosts[rank] == hosts[following]:
                within += over_each
            else:
                across += over_each

    for first in range(0, size, shard):
        ring(range(first, first + shard), reduced, 2 if whole else 1)
    if replicate > 1:
        for first in range(shard):
            ring(range(first, size, shard), reduced / shard, 2)
    return Sent(within, across)


def _links(ranks: Sequence[int]) -> Iterator[tuple[int, int]]:
    if len(ranks) > 1:
        yield from zip(ranks, [*ranks[1:], ranks[0]], strict=True)
