"""Makes the report of a run: pictures under ``RUN/plots`` and one self-contained page, ``RUN/report.html``."""

from __future__ import annotations

from pathlib import Path

from grass_dist.errors import GrassError
from grass_dist.regular_files import replace_file
from grass_dist.report.load import RunRecord, load_run

__all__ = ["RunRecord", "build_report", "load_run"]


def build_report(run_dir: Path) -> Path:
    """Draws the pictures of the run in ``run_dir`` and writes its page, through no link that lies there.

    Returns:
        The path of the page, ``run_dir/report.html``.

    Raises:
        GrassError: ``run_dir`` is not the folder of a run, a file in it is damaged or cannot be written, or
            matplotlib or jinja2 is not installed.
    """
    run = load_run(Path(run_dir))
    try:
        from grass_dist.report.page import render
        from grass_dist.report.plots import plot_all
    except ImportError as error:
        raise GrassError(
            f"the report needs {error.name}, which is not installed; run pip install 'grass-dist[train]'."
        ) from None
    page = run.folder / "report.html"
    try:
        html = render(run, plot_all(run, run.folder / "plots"))
        replace_file(page, html.encode("utf-8"))
    except OSError as error:
        raise GrassError(f"{error.filename or page}: the report cannot be written here; {error.strerror}.") from None
    return page
