"""Tests with the oldest versions that are claimed, in a folder of their own in front of the installed packages.

    python -m integration_tests.floors [core] [enable] [deepspeed]

``core``: numpy and pydantic, which grass_dist needs. ``enable``: transformers, accelerate and trl, which it takes as it
finds them. ``deepspeed``: its oldest release. Without an argument, all three. The releases that only they need are
named too, since nothing is installed along.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

FLOORS = {
    "core": (
        "numpy==1.26.4 pydantic==2.11.4 pydantic_core==2.33.2 "
        "pandas==2.3.3 pyarrow==21.0.0 scipy==1.16.3 matplotlib==3.10.9 contourpy==1.3.3",
        "tests --ignore=tests/test_layout.py --ignore=tests/test_launchers.py",
    ),
    "enable": (
        "transformers==4.57.0 accelerate==1.11.0 trl==0.24.0 "
        "huggingface_hub==0.36.2 tokenizers==0.22.2 datasets==4.1.1",
        # The default of use_reentrant, and the folder of TensorBoard, are those of transformers 5.
        "tests/test_trainer.py tests/test_trainer_probe.py tests/test_trainer_report.py "
        "--deselect tests/test_trainer.py::test_tensorboard_shows_importances_over_the_layers "
        "--deselect tests/test_trainer.py::test_recomputing_of_frozen_layers_needs_a_release_that_can",
    ),
    "deepspeed": ("deepspeed==0.16.9", "integration_tests/test_zero.py integration_tests/test_trainer.py"),
}


def run(packages: str, tests: str) -> int:
    """The exit status of pytest over ``tests``, with ``packages`` in front."""
    with tempfile.TemporaryDirectory() as folder:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        subprocess.run([*install, *packages.split()], check=True)
        path = os.pathsep.join([folder, os.getcwd()])
        command = [sys.executable, "-m", "pytest", "-q", "-rf", *tests.split()]
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}).returncode


def main() -> int:
    failed = [name for name in sys.argv[1:] or FLOORS if run(*FLOORS[name])]
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
