"""Ranks compare what must be equal before any work, so that a mistake on one ends all of them with one sentence."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from grass_dist.backends.base import Ranks
from grass_dist.errors import GrassError, RanksDisagree, shorten

log = logging.getLogger("grass_dist")


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
