"""Fine-tunes that are killed at a moment drawn at random, and go on: each to the bit as one that nobody disturbed.

    python -m integration_tests.kills --at moments --kills 30 [--seed 0]    # or: make soak
    python -m integration_tests.kills --at moments --kills 1 --first 17     # that one again, with --keep its files
    python -m integration_tests.kills --kills 200 [--seed 0]                # at random times: see kill_times.py

Two ranks run `integration_tests.support.mortal`, and one of them dies by SIGKILL in the middle of something. The other
must end by itself, with one sentence that names the dead. Then the run goes on, started again, which some do not
survive either, or by torchrun's own restart. It must end with the weights, checkpoints and record of the undisturbed
run, and leave nothing behind. Prints a line for each kill; the exit code is 1 if anything differs or a kill did not
happen.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
import time
from pathlib import Path

from integration_tests.support.kill_times import soak
from integration_tests.support.killed_runs import Runs, drawn, play


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--at", choices=["times", "moments"], default="times", help="times: see kill_times.py")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder, kept afterwards with all files of the runs")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # not without the ends of what has been started
    wrong, began = 0, time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kills")))
        if args.at == "times":
            return 1 if soak(folder, args.kills, args.seed, args.first).wrong else 0
        runs = Runs(folder)
        for number in range(args.first, args.first + args.kills):
            case, started = drawn(runs, args.seed, number), time.monotonic()
            found = play(runs, case)
            wrong += bool(found)
            said = "; ".join(found) or "the same"
            print(f"{number}: {case.described(runs)}: {said}; {time.monotonic() - started:.1f} s", flush=True)
    print(f"{args.kills} kills, {wrong} with something wrong, {(time.monotonic() - began) / 60:.1f} min")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
