"""Runs the benchmarks and makes docs/benchmarks.md and its plots again.

    python -m benchmarks.document --run all --data math_train.json      # hours on two cores; the comparison most of it
    python -m benchmarks.document --run throughput checkpoint           # these again, the others as they were
    python -m benchmarks.document                                       # no run, from the results that there are

A part writes its results to benchmarks/results, and what it ran on beside them. The parts run one after the other;
leave the machine alone meanwhile. GPUs are used where there are any.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.document.machine import remember
from benchmarks.document.page import RESULTS, write_page
from benchmarks.engines import BACKENDS, METHODS

ROOT = Path(__file__).parents[2]
SMALL = ["--rounds", "5", "--together", "3"]
ON_GPU = ["--random-llama", "1.5B", "--batch", "4", "--length", "1024"]


def methods_by(count: int) -> list[list[str]]:
    """Arguments that name so many methods at a time beside full fine-tuning."""
    names = [name for name in METHODS if name not in ("full", "grass-stream")]
    return [["--methods", "full", *names[first : first + count]] for first in range(0, len(names), count)]


def parts(device: str, data: Path | None) -> dict[str, list[list[str]]]:
    """Commands by part; each writes the result of that name."""
    gpus = torch.cuda.device_count()
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(gpus or 2)]
    alone = [*run[:-1], "1"]
    large = ON_GPU if gpus else []

    def to(part: str) -> list[str]:
        return ["--json", str(RESULTS / f"{part}_{device}.json")]

    trace = ["benchmarks/trace_overlap.py", *large, *to("trace_overlap")]
    found = {
        "throughput": [  # processes of few methods, since DeepSpeed does not let go of what ZeRO-3 has partitioned
            [*run, "-m", "benchmarks.throughput", *(large or SMALL), "--backends", backend, *some, *to("throughput")]
            for backend in BACKENDS
            for some in ([[]] if gpus else methods_by(3))
        ],
        "step_time": [[*run, "-m", "benchmarks.step_time", "--rounds", "14", *to("step_time")]],
        "offload": [[*run, "benchmarks/offload.py", *large, *to("offload")]],
        "offload_host_dtype": [
            [*run, "benchmarks/offload.py", "--host-dtype", "48", "--batch", "1", *to("offload_host_dtype")]
        ],
        "trace_overlap": [
            [*run, *trace, "--mode", "interval"],
            [*run, *trace],
            [*run, *trace, "--in-backward"],
            [*alone, *trace],
            [*alone, *trace, "--in-backward"],
        ],
        "checkpoint": [[*run, "benchmarks/checkpoint.py", *large, *to("checkpoint")]],
        "slow_link": [[sys.executable, "-m", "benchmarks.slow_link", *to("slow_link")]],
    }
    if data is not None:
        found["peers"] = [
            [sys.executable, "-m", "benchmarks.peers", "--data", str(data)],
            [sys.executable, "-m", "benchmarks.peers.besides", "--data", str(data)],
            [sys.executable, "-m", "benchmarks.peers.times", "--data", str(data), *to("peers_times")],
            [sys.executable, "-m", "benchmarks.peers.probe", "--data", str(data), *to("peers_probe")],
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", nargs="+", default=[], metavar="PART", help="all, or some of the parts")
    parser.add_argument("--data", type=Path, help="training problems of the comparison, which is left out without them")
    args = parser.parse_args()
    device = "gpu" if torch.cuda.is_available() else "cpu"
    known = parts(device, args.data)
    wanted = list(known) if args.run == ["all"] else args.run
    if unknown := [part for part in wanted if part not in known]:
        parser.error(f"--run {' '.join(unknown)}: use all or {', '.join(known)} (peers with --data)")
    failed = []
    for part in wanted:
        codes = [subprocess.run(command, cwd=ROOT).returncode for command in known[part]]
        if any(codes):
            failed.append(part)
        else:
            remember(RESULTS, part, device)
    write_page()
    if failed:
        raise SystemExit(f"failed, so that their results are those from before: {', '.join(failed)}")


if __name__ == "__main__":
    main()
