"""Work on a checkpoint that all ranks do, or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from grass_dist import ranks as all_ranks
from grass_dist.errors import CheckpointError
from grass_dist.ranks import Ranks

T = TypeVar("T")


def together(ranks: Ranks, work: Callable[[], T]) -> T:
    """Does ``work`` on every rank; see `grass_dist.ranks.together`.

    Raises:
        CheckpointError: on every rank, with the sentence of the first that failed.
    """
    return all_ranks.together(ranks, work, raise_as=CheckpointError)
