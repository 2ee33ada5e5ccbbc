"""The ``doctor`` command, for ``grass-dist doctor`` and for ``python -m grass_dist.doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grass_dist.errors import ConfigError
from grass_dist.terminal import one_sentence_errors, parse_size


def doctor(
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all of it as JSON.")] = None,
    folder: Annotated[Path, typer.Option(help="Folder whose disk is tried, e.g. where checkpoints go.")] = Path(),
    interface: Annotated[str | None, typer.Option(help="Network interface of gloo and NCCL, e.g. eth0.")] = None,
    size: Annotated[str, typer.Option(help="Largest message that is measured.")] = "16MB",
    timeout: Annotated[float, typer.Option(help="Seconds for meeting, and for each collective.")] = 60,
) -> None:
    """Find out what is wrong with a cluster, and how fast it is: run it under any launcher before a fine-tune.

    For example torchrun --nnodes 2 ... -m grass_dist.doctor, or srun python -m grass_dist.doctor.
    """
    from grass_dist.doctor.command import DoctorOptions, diagnose

    with one_sentence_errors():
        if not 1 <= timeout <= 86_400:
            raise ConfigError("--timeout", timeout, "it is no number of seconds up to a day", "use e.g. 60")
        code = diagnose(DoctorOptions(json_file, folder, interface, parse_size("--size", size), timeout))
    raise typer.Exit(code)
