"""The folders of a run's checkpoints: their names, which is the newest, and how old ones go.

A folder with the name of a checkpoint is complete, so none is changed or removed under that name: it is renamed first.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

CHECKPOINTS = "checkpoints"
"""Folder of all checkpoints, in that of a run."""

_FOLDER = re.compile(r"step-(\d{6,12})")


def folder_name(step: int) -> str:
    return f"step-{step:06d}"


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint's folder; None if it is none by its name."""
    found = _FOLDER.fullmatch(folder.name)
    return int(found[1]) if found else None


def checkpoints_in(parent: Path) -> list[Path]:
    """Folders of checkpoints by their names, the newest first."""
    if not parent.is_dir():
        return []
    found = [(step, path) for path in parent.iterdir() if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def prune(parent: Path, keep: int) -> None:
    """Removes all but the newest ``keep`` checkpoints, the oldest first."""
    for path in reversed(checkpoints_in(parent)[keep:]):
        put_away(path)
        clear(parent)


def put_away(path: Path) -> None:
    """Takes a checkpoint its name; `clear` removes it."""
    gone = path.with_name(f".{path.name}.removing")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)


def clear(parent: Path, unfinished: str = "removing") -> None:
    """Removes what was put away; with "writing" what saves have left that did not come to their end."""
    for path in parent.glob(f".step-*.{unfinished}"):
        shutil.rmtree(path, ignore_errors=True)


def sweep(parent: Path, start_step: int) -> None:
    """Before a run begins: removes what a killed one has left, since maybe no other save follows.

    Checkpoints of later steps than the run begins with are those of another course, or damaged: left in their place
    they would be taken for the newest. They are set aside under another name.
    """
    for path in checkpoints_in(parent):
        if (step_of(path) or 0) > start_step:
            aside = path.with_name(f"left-at-{start_step}.{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    clear(parent)
    clear(parent, "writing")
