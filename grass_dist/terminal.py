"""Holds what every command of ``grass-dist`` does alike: tables, sizes, and the exit status of an error."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from grass_dist.errors import ConfigError, GrassError

try:
    import typer
except ImportError:
    raise SystemExit("The grass-dist command needs typer; run pip install 'grass-dist[train]'.") from None


def parse_size(option: str, text: str) -> int:
    """Reads a size such as 4GB (10^9 bytes) or 500MiB (2^20)."""
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(I?)B?\s*", text.upper(), re.ASCII)
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2] or " ")) if found else 0
    if size < 1:
        raise ConfigError(option, text, "this is no size", "write e.g. 4GB or 500MB")
    return size


def size(nbytes: float) -> str:
    """Writes bytes in decimal units, e.g. "16.8 MB"."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{_short(nbytes / factor)} {unit}"
    return f"{nbytes:.0f} bytes"


def speed(bytes_per_s: float) -> str:
    """Writes bytes/s, e.g. "1.2 GB/s"."""
    return f"{size(bytes_per_s)}/s"


def duration(seconds: float) -> str:
    """Writes seconds, e.g. "35 µs", "1.2 ms" or "3 s"."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if abs(seconds) >= factor or not seconds:
            return f"{_short(seconds / factor)} {unit}"
    return f"{_short(seconds * 1e6)} µs"


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 99.95 else f"{value:.0f}"


def console(width: int) -> Any:
    """Makes rich's console; where the output is no terminal, it has ``width`` columns."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else width)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, align_right: bool = False) -> Any:
    """Makes a table without the columns that are empty in all rows.

    Args:
        rows: cells; None and False are empty.
        align_right: aligns all columns but the first on the right.
    """
    from rich.table import Table
    from rich.text import Text

    shown = [["" if cell is None or cell is False else for_terminal(str(cell)) for cell in row] for row in rows]
    used = [i for i in range(len(columns)) if any(row[i] for row in shown)]
    made = Table(title=Text("\n".join(map(for_terminal, title.splitlines()))), title_justify="left")
    for i in used:
        made.add_column(columns[i], justify="right" if align_right and i else "left", overflow="fold")
    for row in shown:
        made.add_row(*(Text(row[i]) for i in used))
    return made


def warn(problem: str) -> None:
    typer.echo("\n".join(map(for_terminal, problem.splitlines())), err=True)


def for_terminal(text: str) -> str:
    """Returns ``text`` without characters by which a checkpoint from elsewhere could control the terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Turns an error that grass_dist raises on purpose into its sentence on stderr and exit status 1."""
    try:
        yield
    except GrassError as error:
        warn(str(error))
        raise typer.Exit(1) from None
