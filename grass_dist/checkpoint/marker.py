"""``grass.json``: says of a checkpoint in the format of Trainer or Accelerate that its run is of GRASS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grass_dist.checkpoint.files import read_json, write_json
from grass_dist.errors import CheckpointError
from grass_dist.method.controller import GrassController
from grass_dist.version import __version__

MARKER = "grass.json"
_FORMAT = "grass_dist marker"
_FIELDS = {"step": int, "phase": str, "round": int, "active_layers": list, "config": dict, "grass_dist": str}


def write_marker(folder: Path, grass: GrassController) -> None:
    """Writes the settings of a run and where it is. Call it on one rank.

    Raises:
        OSError: the file cannot be written.
    """
    about = {
        "format": _FORMAT,
        "grass_dist": __version__,
        "step": grass.step,
        "phase": grass.phase,
        "round": grass.round,
        "active_layers": [grass.numbers[layer] for layer in grass.active_layers] if grass.phase == "train" else [],
        "config": grass.config.model_dump(mode="json"),
    }
    write_json(folder / MARKER, about)


def newest_marked(folder: Path) -> Path:
    """The newest of the checkpoints in a Trainer's ``output_dir`` that have a marker; ``folder`` itself without one."""
    marked = [file.parent for file in folder.glob(f"checkpoint-*/{MARKER}") if file.parent.name[11:].isdecimal()]
    return max(marked, key=lambda found: int(found.name[11:]), default=folder)


def read_marker(folder: Path) -> dict[str, Any] | None:
    """What `write_marker` wrote; None if the folder has no such file.

    Raises:
        CheckpointError: the file is damaged, or not of this package.
    """
    file = folder / MARKER
    if not file.exists():
        return None
    about = read_json(file)
    whole = isinstance(about, dict) and about.get("format") == _FORMAT
    if not whole or not all(type(about.get(name)) is kind for name, kind in _FIELDS.items()):
        raise CheckpointError(f"{file} is damaged, or was not written by grass_dist.")
    return about
