"""Saves in DeepSpeed's own files: `engine.save_checkpoint` writes them, and a description lets any run load them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from grass_dist.backends.zero.private import ENGINE_SCRIPT, ENGINE_WRITER, deepspeed_version
from grass_dist.checkpoint import files
from grass_dist.checkpoint.deepspeed_files import MODEL_FILE, TAG, read_file
from grass_dist.checkpoint.pieces import Holdings, Piece, UnitPieces
from grass_dist.checkpoint.snapshot import HostCopies, Snapshot
from grass_dist.checkpoint.together import together
from grass_dist.checkpoint.zero_run import ZeroHoldings
from grass_dist.errors import CheckpointError
from grass_dist.ranks import Ranks


@dataclass(frozen=True, eq=False)
class DeepSpeedSnapshot(Snapshot):
    """A snapshot that DeepSpeed writes.

    DeepSpeed writes the state that the engine has at that time, and communicates. So the snapshot must be written
    before training goes on, on the main thread. ``pieces`` are generators and measurements, which DeepSpeed leaves out.
    """

    kind = "deepspeed"
    in_background = False

    engine: Any

    @classmethod
    def take(
        cls, holdings: Holdings, step: int, extra: Mapping[str, Any] | None = None, copies: HostCopies | None = None
    ) -> Self:
        """Does what `Snapshot.take` does, for an engine. Layers that never trained get their masters now, as for
        `engine.save_checkpoint`; the description has no state of theirs.

        Raises:
            CheckpointError: the engine writes its files in the background.
        """
        assert isinstance(holdings, ZeroHoldings)
        engine = holdings.engine
        if getattr(getattr(engine, ENGINE_WRITER), "is_decoupled", bool)():
            raise CheckpointError(
                "DeepSpeed writes its checkpoints in the background here, and they must be whole when they are listed: "
                'leave "checkpoint": {"writer": …} out of the ds_config.'
            )
        described = _Described(engine)
        plain = Snapshot.take(described, step, extra)
        engine.optimizer.complete()
        state = {**plain.state, "deepspeed": described.layout().model_dump()}
        return cls(**{**vars(plain), "state": state}, engine=engine)

    def write_tensors(self, folder: Path, ranks: Ranks) -> None:
        together(ranks, lambda: self._let_deepspeed_write(folder / files.DEEPSPEED))
        super().write_tensors(folder, ranks)

    def _let_deepspeed_write(self, folder: Path) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise CheckpointError(
                "DeepSpeed's format cannot be written in the background, since DeepSpeed communicates."
            )
        folder.mkdir(exist_ok=True)
        _write(self.engine, folder)

    @property
    def nbytes(self) -> int:
        return 0

    @property
    def versions(self) -> dict[str, str]:
        return {"deepspeed": deepspeed_version()}


class _Described(ZeroHoldings):
    """`Holdings` that describe all their tensors and save none of them, since DeepSpeed does."""

    def weights(self) -> list[Piece]:
        return [Piece(p.key, p.numel, p.start, p.tensor, writes=False) for p in super().weights()]

    def states(self) -> Iterator[UnitPieces]:
        return (UnitPieces(unit.name, [], unit.entries) for unit in super().states())


def _write(engine: Any, folder: Path) -> None:
    """Has DeepSpeed write its files, and reads those of this rank.

    Raises:
        CheckpointError, OSError, RuntimeError: this rank's files were not written, or cannot be read.
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
    """Collects what a method raises. DeepSpeed ends a save with a barrier, where the other ranks would wait."""
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
