"""Runs ``grass-dist doctor`` as ``python -m grass_dist.doctor``, which launchers can start."""

from __future__ import annotations

import sys

from grass_dist.cli import app

if __name__ == "__main__":
    # deepspeed passes --local_rank to whatever it starts, and LOCAL_RANK too
    given = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    app(["doctor", *given], prog_name="grass-dist")
