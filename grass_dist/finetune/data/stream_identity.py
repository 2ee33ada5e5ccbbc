"""Tells two streams of examples apart before they are read, by their files and their first rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from grass_dist.errors import ConfigError, shorten
from grass_dist.finetune.data.config import DataConfig, read_part
from grass_dist.finetune.data.rows import files_to_train_on

FIRST_ROWS = 100
"""Number of rows of the stream that are compared word by word."""
_BLOCK, _BLOCKS = 4096, 256
"""Bytes of a block, and number of blocks that are read of all files together: the first and last of each, at least."""


def stream_identity(config: DataConfig, rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Identifies a stream by names, sizes and a sample of its files, and by the first rows as they are taught.

    For a dataset of the Hub that is streamed only the rows are known.

    Args:
        rows: the rows of the stream, in their order in the files.

    Raises:
        ConfigError: a file cannot be read.
    """
    rows_hash = hashlib.sha256()
    for row in islice(rows, FIRST_ROWS):
        parts = [read_part(part, spec, row) for part, spec in config.parts.items()]
        # Messages may hold an image itself.
        rows_hash.update(json.dumps(parts, default=lambda value: type(value).__name__).encode())
    found = {"first rows of the stream": rows_hash.hexdigest()[:16]}
    files = sorted(files_to_train_on(config).items())
    if not files:
        return found
    sizes = [(name, file.stat().st_size) for name, file in files]
    content = hashlib.sha256()
    for _, file in files:
        try:
            _add_sample(content, file, max(2, _BLOCKS // len(files)))
        except OSError as error:
            raise ConfigError("data.name", str(file), f"it cannot be read ({error.strerror})", "repair it") from None
    named = shorten(", ".join(f"{name} ({size} bytes)" for name, size in sizes), 200)
    return {
        "files of the stream": f"{named} {_digest(sizes)}",
        **found,
        "content of the stream's files (a sample)": content.hexdigest()[:16],
    }


def written_at(config: DataConfig) -> str:
    """Returns a digest of when the files of a stream were last written to; "" without files, or if it is no stream.

    It is not one of the things that must be equal: a copy of a file may have another time.
    """
    files = files_to_train_on(config) if config.streaming else {}
    return _digest(sorted((name, file.stat().st_mtime_ns) for name, file in files.items())) if files else ""


def _add_sample(total: Any, file: Path, blocks: int) -> None:
    """Adds blocks at equal distances, from the first to the last."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        for block in range(blocks):
            opened.seek(max(0, size - _BLOCK) * block // (blocks - 1))
            total.update(opened.read(_BLOCK))
            if size <= _BLOCK:
                return


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]
