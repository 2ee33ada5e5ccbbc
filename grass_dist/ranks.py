"""Ranks, their collectives, and what they compare before any work: a mistake on one ends all with one sentence."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist

from grass_dist.errors import GrassError, RanksDisagree, shorten

log = logging.getLogger("grass_dist")


class Ranks:
    """Processes that must agree, and the collectives that they agree by.

    Args:
        group: None is a process alone.
        device: of this rank's model, which need not be the current device; None where no model is known.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | None = None) -> None:
        self.group, self.device = group, device

    @property
    def world_size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of ``tensor`` over the group, by one all-reduce, on the tensor's own device."""
        if self.group is None:
            return tensor
        carried = tensor.to(self._wire_device())
        dist.all_reduce(carried, group=self.group)
        return carried.to(tensor.device)

    def gather_bytes(self, payload: bytes) -> list[bytes]:
        """``payload`` of every rank, in rank order; of the same length on all of them."""
        if self.group is None:
            return [payload]
        mine = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(self._wire_device())
        theirs = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(theirs, mine, group=self.group)
        return [bytes(row) for row in torch.stack(theirs).tolist()]

    def gather_objects(self, item: object) -> list[object]:
        """``item`` of every rank, in rank order."""
        if self.group is None:
            return [item]
        items: list[object] = [None] * self.world_size
        wire = self._wire_device()  # torch puts the bytes of objects on the current device
        with torch.cuda.device(wire) if wire.type == "cuda" else nullcontext():
            dist.all_gather_object(items, item, group=self.group)
        return items

    def _wire_device(self) -> torch.device:
        """Where the small tensors of these collectives are: under NCCL on the GPU that this rank's model is on."""
        if "nccl" not in dist.get_backend(self.group):
            return torch.device("cpu")
        on_gpu = self.device is not None and self.device.type == "cuda"
        return self.device if on_gpu else torch.device("cuda", torch.cuda.current_device())  # type: ignore[return-value]


def world() -> Ranks:
    """All processes of the job."""
    return Ranks(dist.group.WORLD if dist.is_initialized() else None)


def say(ranks: Ranks, sentence: str) -> None:
    """Tells the user, once for all ranks; seen without any set-up of logging."""
    if ranks.rank == 0:
        log.warning(sentence)


def agree_at_start(ranks: Ranks, problem: Exception | None, fingerprint: Mapping[str, Any]) -> None:
    """Raises on every rank if one has a problem, or if ``fingerprint`` differs between two of them.

    Over the wire: one all-gather of the fingerprints, a few kB each.

    Raises:
        GrassError: another rank has a problem; the message says which and what. This rank's own is raised as it is.
        RanksDisagree: names the first entry that differs and the ranks' values.
    """
    shown = {name: repr(value) for name, value in fingerprint.items()}
    reports = ranks.gather_objects((str(problem) if problem else None, shown))
    if problem is not None:
        if isinstance(problem, GrassError):
            problem.on_every_rank = True
        raise problem
    raise_if_ranks_differ(reports)


def raise_if_ranks_differ(reports: list[Any]) -> None:
    """Judges the (problem or None, {name: value as text}) of all ranks, in rank order; equal on every rank."""
    for rank, (problem, _) in enumerate(reports):
        if problem:
            error = GrassError(f"rank {rank}: {problem}")
            error.on_every_rank = True
            raise error
    first = reports[0][1]
    for rank, (_, shown) in enumerate(reports):
        for name, value in shown.items():
            if value != first.get(name):
                here, there = shorten(value, 120), shorten(str(first.get(name)), 120)
                raise RanksDisagree(
                    f"{name} is {here} on rank {rank} and {there} on rank 0; "
                    "start all ranks with the same configuration, model and versions."
                )
