"""``python -m grass_dist.doctor``: the same as ``grass-dist doctor``, in the form that launchers start."""

from __future__ import annotations

import sys

import typer

from grass_dist.doctor.program import doctor

if __name__ == "__main__":
    # deepspeed passes --local_rank to whatever it starts, and LOCAL_RANK too
    sys.argv[1:] = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    typer.run(doctor)
