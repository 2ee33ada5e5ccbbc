"""Counts the bytes of a gradient reduction that go from rank to rank within a host, and over the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Sent:
    """Bytes that all ranks together send."""

    within: float
    """Bytes to ranks of the same host."""
    across: float
    """Bytes to ranks of other hosts."""


def sent(
    reduced: float, hosts: Sequence[str] | np.ndarray, *, replicate: int, whole: bool, gathered: float = 0.0
) -> Sent:
    """Counts what rings send that go through the ranks in their order, as NCCL's do.

    A ring of n ranks sends (n - 1) / n of the bytes over each of its n links to reduce-scatter them, and as much again
    to gather the sums. Under HSDP the gradients are scattered in each shard group, and each shard is summed with those
    of the replicas, so that with a shard group on each host no rank sends more than its shard over the network.

    Args:
        reduced: bytes that each rank puts in.
        hosts: host of each rank.
        replicate: number of replicas of the sharded model (HSDP); 1 without replicas.
        whole: whether every rank ends with the whole sum (an all-reduce), as under DDP.
        gathered: bytes that each rank gets from its shard group besides.
    """
    hosts, size = np.asarray(hosts), len(hosts)
    ranks, group = np.arange(size), size // replicate
    over_each = ((2 if whole else 1) * reduced + gathered) * (group - 1) / group
    over_replicas = 2 * reduced / group * (replicate - 1) / replicate
    within = across = 0.0
    for following, nbytes in (
        (ranks // group * group + (ranks + 1) % group, over_each),
        ((ranks + group) % size, over_replicas),
    ):
        same = int((hosts == hosts[following]).sum())
        within, across = within + same * nbytes, across + (size - same) * nbytes
    return Sent(within, across)
