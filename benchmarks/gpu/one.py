"""The process of one part: `python -m benchmarks.gpu.one NAME --told FILE --seconds S [--tiny]`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from pathlib import Path

from benchmarks.document.machine import describe
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.told import Told


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("--told", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    told = Told(args.told, tiny=args.tiny, seconds=args.seconds)
    told.machine(describe())
    importlib.import_module(f"benchmarks.gpu.{PARTS[args.name].module}").show(told)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # what a part has found does not depend on how process groups end


if __name__ == "__main__":
    main()
