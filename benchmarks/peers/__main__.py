"""All methods side by side: a learning rate for each by a search of equal size, then more seeds at the best.

    python -m benchmarks.peers --data math_train.json [--regime long] [--workers 2] [--methods full grass ...]
    python -m benchmarks.peers --table

Each training is a process with one core; what is done is not done again, so that it may be ended at any time and begun
again. Of three rates the middle one is tried first, then the high one, and the low one where the high one is worse. The
best rate has the lowest held-out loss with the first seed; answers are judged at that rate alone.

Regimes: ``short`` (60 steps), ``long`` (400, as the paper draws) and ``gpu`` (1000 steps of larger
batches, one rate and seed a method).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from operator import truediv
from pathlib import Path
from typing import Any

from benchmarks.peers.methods import METHODS
from benchmarks.peers.regimes import REGIMES, Regime
from benchmarks.peers.task import TESTS

SHORT = REGIMES["short"]
RESULTS, SEEDS = SHORT.results, SHORT.seeds


def file_of(folder: Path, method: str, lr: float, seed: int) -> Path:
    return folder / f"{method}_{lr:g}_{seed}.json"


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def wanted_rate(runs: list[dict[str, Any]], method: str, *, search: bool = True) -> tuple[float, bool]:
    """The rate to try next with the first seed, or else the best, and which of the two it is.

    The middle one first, then the high one; the low one only if the high one was worse.
    """
    low, middle, high = METHODS[method][1]
    if not search:
        return middle, True
    loss = {run["lr"]: run["held_out_loss"] for run in runs if run["method"] == method and run["seed"] == SEEDS[0]}
    for lr in (middle, high):
        if lr not in loss:
            return lr, False
    if not loss[high] < loss[middle] and low not in loss:  # a loss that is no number is worse
        return low, False
    return min((lr for lr in loss if not math.isnan(loss[lr])), key=lambda lr: loss[lr]), True


def best_rate(runs: list[dict[str, Any]], method: str, regime: Regime = SHORT) -> float | None:
    """None before it is known."""
    lr, known = wanted_rate(runs, method, search=regime.search)
    return lr if known else None


def missing(folder: Path, methods: Sequence[str], regime: Regime = SHORT) -> list[tuple[str, float, int, bool]]:
    """What can be done now, judging last: rates first, then seeds at the best."""
    runs = read(folder)
    judged = {(run["method"], run["lr"], run["seed"]) for run in runs if "accuracy" in run}
    next_rate, seeds, to_judge = [], [], []
    for method in methods:
        lr, known = wanted_rate(runs, method, search=regime.search)
        if not known:
            next_rate.append((method, lr, SEEDS[0], False))
            continue
        for one in ((method, lr, seed) for seed in regime.seeds):
            if not file_of(folder, *one).exists():
                seeds.append((*one, False))
            elif regime.questions and one not in judged:
                to_judge.append((*one, True))
    return next_rate + seeds + to_judge


def train(
    out: Path, method: str, lr: float, seed: int, args: argparse.Namespace, *, judge: bool, ranks: int = 1
) -> None:
    """One training, or the judging of one, in processes of one core each; what it came to is printed."""
    command = [sys.executable, *(["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else [])]
    command += ["-m", "benchmarks.peers.one", method, str(lr), str(seed)]
    command += ["--data", str(args.data), "--out", str(out), "--model", args.model, "--regime", args.regime]
    command += [*(["--steps", str(args.steps)] if args.steps else []), *(["--judge"] if judge else [])]
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


def run(one: tuple[str, float, int, bool], args: argparse.Namespace) -> None:
    method, lr, seed, judge = one
    train(file_of(args.out, method, lr, seed), method, lr, seed, args, judge=judge)


def work_off(args: argparse.Namespace) -> None:
    """Does what is missing, the first of it whenever a worker is free, until nothing is but what failed or is begun."""
    begun: set[tuple[str, float, int, bool]] = set()
    regime = REGIMES[args.regime]
    with ThreadPoolExecutor(args.workers) as pool:
        running: set[Future[None]] = set()
        while True:
            todo = [one for one in missing(args.out, args.methods, regime) if one not in begun]
            todo = todo[: args.workers - len(running)]
            begun.update(todo)
            running |= {pool.submit(run, one, args) for one in todo}
            if not running:
                return
            running = wait(running, return_when=FIRST_COMPLETED).not_done  # what has ended may make more possible


def at_best(runs: list[dict[str, Any]], method: str, regime: Regime = SHORT) -> list[dict[str, Any]]:
    """The trainings of a method at its best rate."""
    lr = best_rate(runs, method, regime)
    return [run for run in runs if run["method"] == method and run["lr"] == lr]


def table(runs: list[dict[str, Any]], times: dict[str, Any] | None = None, regime: Regime = SHORT) -> Iterator[str]:
    """Markdown; means over the seeds at the best rate, with the spread of the held-out loss.

    Args:
        times: what `benchmarks.peers.times` has written.
    """
    names = {"multiarith_test.json": "MultiArith", "addsub_test.json": "AddSub"}
    costs = ["step time over full", "gradients on the wire over full", "device MB", "host MB"]
    columns = ["", "lr", "seeds", "held-out loss", *(names[name] for name in TESTS), *costs]
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for method in METHODS:
        if not (at := at_best(runs, method, regime)):
            continue
        losses = [r["held_out_loss"] for r in at]
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        judged = [r["accuracy"] for r in at if "accuracy" in r]
        right = [f"{statistics.mean(a[name] for a in judged):.1%}" if judged else "" for name in TESTS]
        took = ""
        if times and method in times["seconds"]:
            took = f"{statistics.median(map(truediv, times['seconds'][method], times['seconds']['full'])):.2f}"
        sizes = [f"{at[0][key] / 1e6:.0f}" for key in ("device_bytes", "host_bytes")]
        cells = [method, f"{at[0]['lr']:g}", str(len(at)), f"{statistics.mean(losses):.4f}{spread}", *right]
        yield "| " + " | ".join([*cells, took, f"{at[0]['reduced_share']:.3f}", *sizes]) + " |"


def unfinished(runs: list[dict[str, Any]], regime: Regime = SHORT) -> Iterator[str]:
    """A sentence for each method whose rates, seeds or answers are not all there."""
    for method in regime.methods:
        at = at_best(runs, method, regime)
        judged = sum("accuracy" in run for run in at)
        if not at:
            yield f"Not finished: {method}, whose best rate is not known yet."
        elif min(judged if regime.questions else len(at), len(at)) < len(regime.seeds):
            yield f"Not finished: {method}, {len(at)} of {len(regime.seeds)} seeds trained, {judged} judged."


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="training problems; multiarith_test.json and addsub_test.json beside")
    parser.add_argument("--regime", choices=REGIMES, default="short")
    parser.add_argument("--steps", type=int, help="other than the regime's, to try it")
    parser.add_argument("--out", type=Path, help="of the results; the regime's folder of benchmarks/results by default")
    parser.add_argument("--model", default="packaged:smollm2-135m")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="the regime's by default")
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time, a core each")
    parser.add_argument("--table", action="store_true", help="only print what there is")
    args = parser.parse_args()
    args.out, args.methods = args.out or REGIMES[args.regime].results, args.methods or REGIMES[args.regime].methods
    if not args.table:
        if args.data is None:
            parser.error("--data names the training problems")
        args.out.mkdir(parents=True, exist_ok=True)
        work_off(args)
    print("\n".join(table(read(args.out), regime=REGIMES[args.regime])))
    if not args.table and (left := missing(args.out, args.methods, REGIMES[args.regime])):
        raise SystemExit(f"not done: {len(left)} trainings or judgings; the logs in {args.out} say why")


if __name__ == "__main__":
    main()
