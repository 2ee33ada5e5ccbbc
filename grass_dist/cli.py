"""The ``grass-dist`` command. What a subcommand needs is imported inside it, so that ``--help`` is quick."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated

from grass_dist.errors import GrassError

try:
    import typer
except ImportError:
    raise SystemExit("The grass-dist command needs typer; run pip install 'grass-dist[train]'.") from None

app = typer.Typer(
    name="grass-dist",
    help="Fine-tune a language model a few layers at a time, chosen by their gradients (GRASS).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"grass-dist {metadata.version('grass-dist')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options before the subcommand."""


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, e.g. runs/demo.")]) -> None:
    """Write RUN/report.html, one self-contained page, and its pictures under RUN/plots."""
    with _one_sentence_errors():
        from grass_dist.report import build_report

        typer.echo(build_report(run))


@contextmanager
def _one_sentence_errors() -> Iterator[None]:
    """Turns an error that grass_dist raises on purpose into its sentence on stderr and exit status 1."""
    try:
        yield
    except GrassError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
