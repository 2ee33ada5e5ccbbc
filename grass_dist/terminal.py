"""What every command of ``grass-dist`` does alike: sizes, sentences, and the exit status of an error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

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


def warn(problem: str) -> None:
    typer.echo("\n".join(map(printable, problem.splitlines())), err=True)


def printable(text: str) -> str:
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
