"""Saving in DeepSpeed's own files: what `engine.save_checkpoint` writes, described so that any run can load it."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grass_dist.backends.zero.private import ENGINE_SCRIPT, ENGINE_WRITER, deepspeed_version
from grass_dist.backends.zero.whole import complete
from grass_dist.checkpoint import files
from grass_dist.checkpoint.deepspeed_files import MODEL_FILE, TAG, read_file
from grass_dist.checkpoint.loading import DEEPSPEED_LAYOUT
from grass_dist.checkpoint.pieces import Piece, UnitPieces
from grass_dist.checkpoint.saving import Snapshot, take_snapshot, together
from grass_dist.checkpoint.zero_run import ZeroHoldings
from grass_dist.errors import CheckpointError
from grass_dist.ranks import Ranks


def save_deepspeed(engine: Any, ranks: Ranks, step: int, extra: Mapping[str, Any]) -> Snapshot:
    """A snapshot that DeepSpeed writes; called on every rank, after an optimizer step, as `take_snapshot` is.

    DeepSpeed writes what the run holds at that time, and communicates: so the snapshot is to be written before
    training goes on, on the main thread. Layers that never trained get their masters now, as for
    `engine.save_checkpoint`; the description has no state of them.

    Args:
        ranks: over whose group that is written which is not DeepSpeed's.
        extra: as for `take_snapshot`.

    Raises:
        CheckpointError: the engine writes its files in a way that is not known here.
    """
    if getattr(getattr(engine, ENGINE_WRITER), "is_decoupled", bool)():
        raise CheckpointError(
            "DeepSpeed writes its checkpoints in the background here, and they must be whole when they are listed: "
            'leave "checkpoint": {"writer": …} out of the ds_config.'
        )
    holdings = _Described(engine)
    snapshot = take_snapshot(holdings, ranks, step, extra)
    complete(engine.optimizer)

    def write(folder: Path) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise CheckpointError(
                "DeepSpeed's format cannot be written in the background, since DeepSpeed communicates."
            )
        _write(engine, folder / files.DEEPSPEED)
        (folder / files.TENSORS).mkdir(exist_ok=True)

    def write_tensors(folder: Path) -> None:
        together(ranks, lambda: write(folder))
        snapshot.write_tensors(folder)

    return dataclasses.replace(
        snapshot,
        kind="deepspeed",
        state={**snapshot.state, DEEPSPEED_LAYOUT: holdings.layout().model_dump()},
        write_tensors=write_tensors,
        nbytes=0,
        versions={**snapshot.versions, "deepspeed": deepspeed_version()},
    )


class _Described(ZeroHoldings):
    """`Holdings` that describe all their tensors and hold none: DeepSpeed writes those."""

    def weights(self) -> list[Piece]:
        return [Piece(p.key, p.numel, p.start, p.tensor, writes=False) for p in super().weights()]

    def states(self) -> Iterator[UnitPieces]:
        return (UnitPieces(unit.name, [], unit.entries) for unit in super().states())


def _write(engine: Any, folder: Path) -> None:
    """
    Raises:
        CheckpointError, OSError, RuntimeError: this rank's files were not written, or cannot be read again.
    """
    problems: list[Exception] = []
    with (
        _told_later(getattr(engine, ENGINE_WRITER), "save", problems),
        _told_later(engine, ENGINE_SCRIPT, problems),
    ):
        engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
    if problems:
        raise problems[0]
    rank = engine.grass.backend.ranks.rank
    mine = [f"*zero_pp_rank_{rank}_mp_rank_00_*_states.pt", *([MODEL_FILE] if rank == 0 else [])]
    for file in (file for pattern in mine for file in (folder / TAG).glob(pattern)):
        read_file(file)
    if rank == 0:
        (folder / "latest").write_text(TAG)


@contextmanager
def _told_later(owner: Any, method: str, problems: list[Exception]) -> Iterator[None]:
    """DeepSpeed ends a save with a barrier: a rank that raised before it would leave the others there."""
    stock: Callable[..., Any] = getattr(owner, method)

    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return stock(*args, **kwargs)
        except Exception as error:
            problems.append(error)

    own = vars(owner).get(method)
    setattr(owner, method, guarded)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, method)
        else:
            setattr(owner, method, own)
