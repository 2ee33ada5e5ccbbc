"""All methods side by side: a learning rate for each by a search of equal size, then more seeds at the best.

    python -m benchmarks.peers --data math_train.json [--workers 2] [--methods full grass ...]
    python -m benchmarks.peers --table

Each training is a process with one core; what is done is not done again. The best rate has the lowest held-out loss;
answers are judged at that rate alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.peers.methods import METHODS
from benchmarks.peers.task import TESTS

RESULTS = Path(__file__).parents[1] / "results" / "peers"
SEEDS = (0, 1, 2)


def file_of(folder: Path, method: str, lr: float, seed: int) -> Path:
    return folder / f"{method}_{lr:g}_{seed}.json"


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def best_rate(runs: list[dict[str, Any]], method: str) -> float | None:
    """Of the first seed's trainings; None before all rates are tried."""
    tried = {run["lr"]: run["held_out_loss"] for run in runs if run["method"] == method and run["seed"] == SEEDS[0]}
    return min(tried, key=lambda lr: tried[lr]) if tried.keys() >= set(METHODS[method][1]) else None


def missing(folder: Path, methods: list[str]) -> list[tuple[str, float, int, bool]]:
    """What can be done now, judging last: rates first, then seeds at the best."""
    runs = read(folder)
    best = {method: lr for method in methods if (lr := best_rate(runs, method)) is not None}
    wanted = [(method, METHODS[method][1][number], SEEDS[0]) for number in (1, 0, 2) for method in methods]
    wanted += [(method, lr, seed) for seed in SEEDS[1:] for method, lr in best.items()]
    judged = {(run["method"], run["lr"], run["seed"]) for run in runs if "accuracy" in run}
    trained = [(method, lr, seed) for seed in SEEDS for method, lr in best.items()]
    return [(*one, False) for one in wanted if not file_of(folder, *one).exists()] + [
        (*one, True) for one in trained if file_of(folder, *one).exists() and one not in judged
    ]


def run(one: tuple[str, float, int, bool], args: argparse.Namespace) -> None:
    method, lr, seed, judge = one
    out = file_of(args.out, method, lr, seed)
    command = [sys.executable, "-m", "benchmarks.peers.one", method, str(lr), str(seed)]
    command += ["--data", str(args.data), "--out", str(out), "--model", args.model, *(["--judge"] if judge else [])]
    log = out.with_suffix(".log")
    with log.open("w") as said:
        code = subprocess.run(command, stdout=said, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    if code:
        print(f"{method} {lr:g} {seed}: failed, see {log}", flush=True)
        return
    log.unlink()
    told = json.loads(out.read_text())
    result = told["accuracy"] if judge else f"held-out loss {told['held_out_loss']:.4f}"
    print(f"{time.strftime('%H:%M')} {method} {lr:g} {seed}: {result}", flush=True)


def table(runs: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown; means over the seeds at the best rate, with the spread of the held-out loss."""
    names = [name.removesuffix("_test.json") for name in TESTS]
    columns = ["", "lr", "seeds", "held-out loss", *names, "gradients on the wire", "device MB", "host MB"]
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for method in METHODS:
        if (lr := best_rate(runs, method)) is None:
            continue
        at = [r for r in runs if r["method"] == method and r["lr"] == lr and "accuracy" in r]
        if not at:
            continue
        losses = [r["held_out_loss"] for r in at]
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        right = [f"{statistics.mean(r['accuracy'][name] for r in at):.1%}" for name in TESTS]
        costs = [
            f"{at[0]['reduced_share']:.3f}",
            f"{at[0]['device_bytes'] / 1e6:.0f}",
            f"{at[0]['host_bytes'] / 1e6:.0f}",
        ]
        cells = [method, f"{lr:g}", str(len(at)), f"{statistics.mean(losses):.4f}{spread}", *right, *costs]
        yield "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="training problems; multiarith_test.json and addsub_test.json beside")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--model", default="packaged:smollm2-135m")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time, a core each")
    parser.add_argument("--table", action="store_true", help="only print what there is")
    args = parser.parse_args()
    if not args.table:
        if args.data is None:
            parser.error("--data names the training problems")
        args.out.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(args.workers) as pool:
            before: list[Any] = []
            while (todo := missing(args.out, args.methods)) and todo != before:
                before = todo
                list(pool.map(lambda one: run(one, args), todo))
    print("\n".join(table(read(args.out))))


if __name__ == "__main__":
    main()
