"""What the comparison leaves open: GRASS with other settings, and the methods on two ranks instead of one.

    python -m benchmarks.peers.besides --data math_train.json [--workers 2] [--only tried|ranks]

All at the best rates of the comparison, which come first; what is done is not done again.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.peers.__main__ import RESULTS, SEEDS, best_rate, file_of, read, train
from benchmarks.peers.methods import TRIED
from benchmarks.peers.one import weights_of

TRIED_RESULTS, RANKS_RESULTS = RESULTS.with_name("peers_tried"), RESULTS.with_name("peers_ranks")
ON_TWO = ("full", "lora16", "badam", "galore", "lisa", "grass")


def trained(folder: Path, method: str, lr: float, seed: int, *, args: argparse.Namespace, ranks: int = 1) -> bool:
    """Whether its result is there, by now if not before."""
    folder.mkdir(parents=True, exist_ok=True)
    out = file_of(folder, method, lr, seed)
    if not out.exists():
        train(out, method, lr, seed, args, judge=False, ranks=ranks)
        weights_of(out).unlink(missing_ok=True)
    return out.exists()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="training problems")
    parser.add_argument("--model", default="packaged:smollm2-135m")
    parser.add_argument("--workers", type=int, default=2, help="trainings of one rank at a time, a core each")
    parser.add_argument("--only", choices=("tried", "ranks"))
    parser.set_defaults(regime="short", steps=None)
    args = parser.parse_args()

    runs = read(RESULTS)
    rates = {method: lr for method in ON_TWO if (lr := best_rate(runs, method)) is not None}
    if unknown := [method for method in ON_TWO if method not in rates]:
        parser.error(f"the best rates of {', '.join(unknown)} are not known: first python -m benchmarks.peers")

    tried = [(TRIED_RESULTS, name, rates["grass"], seed) for seed in SEEDS for name in TRIED]
    on_two = [(RANKS_RESULTS, method, rates[method], SEEDS[0]) for method in ON_TWO]
    done = []
    if args.only != "ranks":
        with ThreadPoolExecutor(args.workers) as pool:
            done += pool.map(lambda one: trained(*one, args=args), tried)
    if args.only != "tried":
        done += [trained(*one, args=args, ranks=2) for one in on_two]
    if not all(done):
        raise SystemExit(f"not done: {done.count(False)} trainings; the logs beside their results say why")


if __name__ == "__main__":
    main()
