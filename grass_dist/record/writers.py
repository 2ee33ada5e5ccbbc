"""Writes the record of a run: each writer takes down every event in its own way."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from grass_dist.regular_files import open_regular

_LONGEST_LINE = 2**24


class Writer(Protocol):
    """Takes down events. `EventLog` guards it: what it raises is told once, and costs the run nothing."""

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Writes one event after ``step`` steps."""
        ...

    def close(self) -> None: ...


class JsonLines:
    """Writes a line of metrics.jsonl for each event, at once; floats that are not finite become null.

    A line that does not fit on the disk is left out as a whole, and the next one is tried again.

    Args:
        keep: number of bytes of an earlier record that stay, after which it goes on.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self._file = path.open("ab", buffering=0)
        self._file.truncate(keep := min(keep, os.fstat(self._file.fileno()).st_size))
        self._nbytes = keep

    @property
    def nbytes(self) -> int:
        """Returns the bytes of the record up to now, which are on the disk then; a resumed run goes on after them."""
        with contextlib.suppress(OSError):  # as in `write`
            os.fsync(self._file.fileno())
        return self._nbytes

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        line = {"event": event, "step": step, **{name: _plain(value) for name, value in values.items()}}
        data = json.dumps(line, allow_nan=False).encode() + b"\n"
        if self._file.write(data) != len(data):
            self._file.truncate(self._nbytes)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._nbytes += len(data)

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Writes scalars of each event into TensorBoard's files, and the importance and probability of each layer.

    Args:
        step: the step with which the run begins; what an earlier run has of later steps is not shown.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                self._board.add_scalar(f"{event}/{name}", value, step)
        if event == "refresh":
            for layer, (m, x) in enumerate(zip(values["importances"], values["probabilities"], strict=True)):
                self._board.add_scalar(f"importance/layer_{layer:02d}", m, step)
                self._board.add_scalar(f"probability/layer_{layer:02d}", x, step)

    def close(self) -> None:
        self._board.close()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def length_until(path: Path, step: int) -> int:
    """Returns the bytes of the lines with which a record begins, up to the first of a later step or of its end.

    A line that is damaged ends them too. Without the file it is 0.
    """
    length = 0
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError), open_regular(path) as record:
        while (line := record.readline(_LONGEST_LINE)).endswith(b"\n"):
            event = json.loads(line)
            if not isinstance(event, dict) or event.get("event") == "end" or not 0 <= event["step"] <= step:
                break
            length += len(line)
    return length
