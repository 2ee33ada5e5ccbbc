"""Work that all ranks do or none: an error on one is an error on all, in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grass_dist.errors import CheckpointError
from grass_dist.ranks import Ranks


def together(ranks: Ranks, work: Callable[[], Any]) -> Any:
    """Does ``work`` on every rank. If it fails on one rank, all ranks raise.

    Raises:
        CheckpointError: the error of the first rank that failed, in one sentence.
    """
    result, problem = None, None
    try:
        result = work()
    except CheckpointError as error:
        problem = (str(error), False)
    except Exception as error:
        problem = (sentence(error), ranks.world_size > 1)
    for rank, other in enumerate(ranks.gather_objects(problem)):
        if other:
            text, of_rank = other  # type: ignore[misc]
            raise CheckpointError(f"rank {rank}: {text}" if of_rank else text).everywhere()
    return result


def sentence(error: BaseException) -> str:
    """The error in one line, without a traceback."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the file system'}: {error.strerror}"
    return " ".join(str(error).split())[:300] or type(error).__name__
