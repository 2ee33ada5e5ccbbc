"""`save_checkpoint` and `load_checkpoint`, for a training loop of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from grass_dist.checkpoint.loading import load, newest_good, open_checkpoint
from grass_dist.checkpoint.pieces import Holdings
from grass_dist.checkpoint.saving import take_snapshot, write_snapshot
from grass_dist.errors import CheckpointError
from grass_dist.ranks import say, world


@runtime_checkable
class SupportsHoldings(Protocol):
    """A `GrassOptimizer`, which this module cannot import."""

    def holdings(self) -> Holdings: ...


def save_checkpoint(
    folder: str | Path,
    optimizer: Any,
    step: int,
    *,
    keep: int = 3,
    extra: Mapping[str, Any] | None = None,
    add_files: Callable[[Path], None] | None = None,
) -> Path:
    """Saves weights, optimizer states, the method and torch's generators, after an ``optimizer.step()``.

    Called on every rank. A save that fails leaves nothing, and the earlier ones as they were. To write in the
    background, use `grass_dist.checkpoint.saving.Saver`.

    Args:
        folder: of all checkpoints, on a file system that the ranks share; this one is ``step-NNNNNN`` in it.
        optimizer: a `GrassOptimizer`, or an engine of `grass_dist.initialize`.
        keep: newest checkpoints that stay.
        extra: what else there is to be saved (the scheduler, the place in the data), as JSON can hold it.
        add_files: writes further files into the new checkpoint; called on rank 0.

    Raises:
        CheckpointError: on every rank: it cannot be written.
    """
    holdings, ranks = _holdings(optimizer), world()
    snapshot = take_snapshot(holdings, ranks, step, extra or {})
    return write_snapshot(Path(folder), snapshot, ranks, keep, add_files)


def load_checkpoint(folder: str | Path, optimizer: Any) -> tuple[int, dict[str, Any]] | None:
    """Goes on from a checkpoint, whatever the ranks and the wrapper were. Called on every rank.

    Args:
        folder: one checkpoint, or the folder of all, whose newest good one is taken.
        optimizer: as for `save_checkpoint`, built as it was then: the same model, parameter groups and method.

    Returns:
        Its step and ``extra``; None if the folder has no checkpoint yet.

    Raises:
        CheckpointError: on every rank: it is damaged, or of another run. Nothing has been changed.
    """
    holdings, ranks, path = _holdings(optimizer), world(), Path(folder)
    if (path / "checkpoint.json").exists():
        found = open_checkpoint(path, ranks)
    else:
        found = newest_good(path, ranks, lambda problem: say(ranks, problem))
    if found is None:
        return None
    with found:
        load(found, holdings)
    return found.step, found.state.run


def _holdings(optimizer: Any) -> Holdings:
    if isinstance(optimizer, SupportsHoldings):
        return optimizer.holdings()
    if hasattr(optimizer, "grass") and hasattr(optimizer, "module"):
        from grass_dist.checkpoint.zero_run import ZeroHoldings

        return ZeroHoldings(optimizer)
    raise CheckpointError(f"{type(optimizer).__name__} is neither a GrassOptimizer nor an engine of initialize.")
