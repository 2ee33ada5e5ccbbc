#!/usr/bin/env python
"""Step time of GRASS over full fine-tuning between two hosts whose link is slow, and what the bytes predict.

    python -m benchmarks.slow_link [--rate 200mbit] [--json FILE]        # as root: the hosts are network namespaces

Two ranks on each host train a Llama of 19 MB under FSDP2, HSDP (a replica on each host) and ZeRO-2: all eight layers,
and two of them by GRASS. What a host sends is read from its interface. Where the link is the limit, a step lasts
as long as its bytes, so the ratio of the bytes of whole steps is that of their times; that of the gradients is
shown beside it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from integration_tests.support.hosts import Hosts, why_not
from integration_tests.support.traffic import BACKENDS, run_apart


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rate", default="200mbit", help="of each host's link, as tc writes it")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if (reason := why_not()) is not None:
        raise SystemExit(reason)
    with Hosts(2) as hosts, tempfile.TemporaryDirectory() as folder:
        for host in hosts:
            host.slow(args.rate)
        found = run_apart(hosts, Path(folder), timeout=600)["grass1"]
    print(f"{'':8}{'full':>10}{'GRASS':>10}{'time':>8}{'bytes of a step':>18}{'of gradients':>14}")
    for backend in BACKENDS:
        full, grass = found[f"{backend} full"], found[f"{backend} grass"]
        time, whole, gradients = (grass[key] / full[key] for key in ("seconds", "sent_in_step", "sent"))
        seconds = f"{full['seconds']:>8.3f} s{grass['seconds']:>8.3f} s"
        print(f"{backend:8}{seconds}{time:>8.3f}{whole:>18.3f}{gradients:>14.3f}")
    if args.json:
        args.json.write_text(json.dumps({"rate": args.rate, "ranks": 4, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
