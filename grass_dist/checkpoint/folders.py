"""The folders of a run's checkpoints: their names, which one is the newest, how old ones are removed or kept.

A folder with the name of a checkpoint is complete, so it is renamed before anything in it is changed or removed. A
reader holds a checkpoint by a shared lock on its manifest; renaming one needs the exclusive lock.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grass_dist.checkpoint import disk
from grass_dist.errors import CheckpointError
from grass_dist.regular_files import open_regular

CHECKPOINTS = "checkpoints"
"""The folder of all checkpoints, in the folder of a run."""
MANIFEST = "checkpoint.json"

_FOLDER = re.compile(r"step-(\d{6,12})")


def folder_name(step: int) -> str:
    return f"step-{step:06d}"


def step_of(folder: Path) -> int | None:
    """The step in the name of a checkpoint's folder; None if the name is not that of a checkpoint."""
    found = _FOLDER.fullmatch(folder.name)
    return int(found[1]) if found else None


def checkpoints_in(parent: Path) -> list[Path]:
    """The folders that have the name of a checkpoint, the newest first."""
    if not parent.is_dir():
        return []
    found = [(step, path) for path in parent.iterdir() if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def hold(folder: Path) -> int | None:
    """Keeps a checkpoint from being removed until the descriptor that is returned is closed.

    Returns:
        The descriptor; None if there is no manifest to lock, because the checkpoint is not whole.

    Raises:
        CheckpointError: it is being removed.
    """
    try:
        with open_regular(folder / MANIFEST) as stream:
            descriptor = os.dup(stream.fileno())
    except OSError:
        return None
    if disk.lock(descriptor, fcntl.LOCK_SH) and disk.is_at(descriptor, folder / MANIFEST):
        return descriptor
    os.close(descriptor)
    raise CheckpointError(f"{folder} is being removed, or written again, by the run that it belongs to.")


@contextmanager
def unread(folder: Path) -> Iterator[bool]:
    """Yields whether nobody reads a checkpoint. If so, nobody can begin to read it inside the block."""
    try:
        descriptor = os.open(folder / MANIFEST, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # damaged: nobody reads it
        yield True
        return
    try:
        yield disk.lock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


def prune(parent: Path, keep: int) -> None:
    """Removes all but the newest ``keep`` checkpoints, oldest first. One that is being read stays for now."""
    for path in reversed(checkpoints_in(parent)[keep:]):
        if put_away(path):
            clear(parent)


def put_away(path: Path) -> bool:
    """Gives a checkpoint a hidden name, unless somebody reads it; `clear` removes it.

    Returns:
        Whether it was renamed.
    """
    with unread(path) as free:
        if free:
            path.rename(_unused(path, "removing"))
    return free


def clear(parent: Path, unfinished: str = "removing") -> None:
    """Removes folders that were put away or, with "writing", that unfinished saves have left."""
    for path in parent.glob(f".step-*.{unfinished}"):
        disk.remove(path)


def check_sweep(parent: Path, start_step: int) -> None:
    """Checks that `sweep` can do its work.

    Raises:
        CheckpointError: somebody reads a checkpoint that `sweep` has to set aside.
    """
    for path in _later(parent, start_step):
        with unread(path) as free:
            if not free:
                raise CheckpointError(
                    f"{path} is being read by another process, and has to be set aside because the run goes on from "
                    f"step {start_step}: start again when that has ended."
                )


def sweep(parent: Path, start_step: int) -> None:
    """Removes what a killed run has left, before a run begins: perhaps no other save follows.

    Checkpoints of later steps than ``start_step`` are damaged or from a course that the run leaves. Under their names
    they would count as the newest, so they are set aside under other names.
    """
    for path in _later(parent, start_step):
        aside = path.with_name(f"left-at-{start_step}.{path.name}")
        disk.remove(aside)
        path.rename(aside)
    clear(parent)
    clear(parent, "writing")


def _later(parent: Path, start_step: int) -> list[Path]:
    return [path for path in checkpoints_in(parent) if (step_of(path) or 0) > start_step]


def _unused(path: Path, ending: str) -> Path:
    """A hidden name that is free, also where an earlier folder could not be removed."""
    names = (f".{path.name}{more}.{ending}" for more in ("", *(f".{n}" for n in range(1, 1000))))
    return next(free for name in names if not os.path.lexists(free := path.with_name(name)))
