"""`save_checkpoint`, `load_checkpoint` and `AsyncCheckpointer`, for a training loop of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self, cast, runtime_checkable

import torch.distributed as dist

from grass_dist.checkpoint.folders import checkpoints_in
from grass_dist.checkpoint.loading import load, newest_good, open_checkpoint
from grass_dist.checkpoint.pieces import Holdings
from grass_dist.checkpoint.saving import Saver, write_snapshot
from grass_dist.checkpoint.snapshot import Snapshot
from grass_dist.checkpoint.together import together
from grass_dist.checkpoint.zero_run import ZeroHoldings
from grass_dist.errors import CheckpointError
from grass_dist.ranks import Ranks, say, world


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

    Called on every rank. A save that fails leaves nothing, and the earlier checkpoints as they were. Training waits
    until the checkpoint is written; with `AsyncCheckpointer` it goes on.

    Args:
        folder: of all checkpoints, on a file system that the ranks share; this one is ``step-NNNNNN`` in it.
        optimizer: a `GrassOptimizer`, or an engine of `grass_dist.initialize`.
        keep: how many of the newest checkpoints stay.
        extra: further state (the scheduler, the place in the data), as JSON can hold it.
        add_files: writes further files into the new checkpoint; called on rank 0.

    Raises:
        CheckpointError: on every rank: it cannot be written.
    """
    snapshot = Snapshot.take(_holdings(optimizer), step, extra)
    return write_snapshot(Path(folder), snapshot, world(), keep, add_files)


class AsyncCheckpointer:
    """Saves the same checkpoints as `save_checkpoint` while training goes on: a thread writes them, one at a time.

    It is constructed on every rank, and each method is called on every rank at the same step. A ``with`` block waits at
    its end for the last checkpoint; without one, call `wait` before the program ends. The copies that are written take
    as much host memory as this rank's part of a checkpoint, once.

    Over the wire: the thread has a gloo process group of its own, which the constructor makes.

    Args:
        folder: as for `save_checkpoint`, and so are ``optimizer``, ``keep`` and ``add_files``.
    """

    def __init__(
        self,
        folder: str | Path,
        optimizer: Any,
        *,
        keep: int = 3,
        add_files: Callable[[Path], None] | None = None,
    ) -> None:
        self._folder, holdings = Path(folder), _holdings(optimizer)
        group = cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if dist.is_initialized() else None
        ranks = Ranks(group)
        self._saver = Saver(self._folder, holdings, ranks, keep=keep, background=True, add_files=add_files)

    def save(self, step: int, *, extra: Mapping[str, Any] | None = None) -> None:
        """Begins the checkpoint ``step-NNNNNN``, after an ``optimizer.step()``.

        It returns as soon as weights and states are copied to host memory. If an earlier save is under way, it waits
        for that one first.

        Raises:
            CheckpointError: on every rank: the earlier checkpoint could not be written. This one is not begun.
        """
        self.wait()
        self._saver.save(step, extra or {})

    def wait(self) -> None:
        """Waits until the checkpoint that is under way, if there is one, is written.

        Raises:
            CheckpointError: on every rank: it could not be written. It is raised once.
        """
        if (saved := self._saver.outcome()) and saved.error:
            raise saved.error

    def latest(self) -> Path | None:
        """The folder of the newest complete checkpoint, the same on all ranks; None if there is none yet.

        Raises:
            CheckpointError: on every rank: the folder cannot be read.
        """
        ranks = world()  # the thread may be communicating in its own group
        found = together(ranks, lambda: checkpoints_in(self._folder)[:1] if ranks.rank == 0 else None)
        return next(iter(ranks.gather_objects(found)[0] or ()), None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif (saved := self._saver.outcome()) and saved.error:  # the error of the block is the one that is raised
            say(world(), str(saved.error))


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
        return ZeroHoldings(optimizer)
    raise CheckpointError(f"{type(optimizer).__name__} is neither a GrassOptimizer nor an engine of initialize.")
