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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="training problems")
    parser.add_argument("--model", default="packaged:smollm2-135m")
    parser.add_argument("--workers", type=int, default=2, help="trainings of one rank at a time, a core each")
    parser.add_argument("--only", choices=("tried", "ranks"))
    args = parser.parse_args()

    runs = read(RESULTS)
    rates = {method: best_rate(runs, method) for method in ON_TWO}
    if unknown := [method for method, lr in rates.items() if lr is None]:
        parser.error(f"the best rates of {', '.join(unknown)} are not known: first python -m benchmarks.peers")

    def begin(folder: Path, method: str, lr: float, seed: int, ranks: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        out = file_of(folder, method, lr, seed)
        if not out.exists():
            train(out, method, lr, seed, args, judge=False, ranks=ranks)
            weights_of(out).unlink(missing_ok=True)

    if args.only != "ranks":
        with ThreadPoolExecutor(args.workers) as pool:
            for seed in SEEDS:
                for name in TRIED:
                    pool.submit(begin, TRIED_RESULTS, name, rates["grass"], seed, 1)
    if args.only != "tried":
        for method in ON_TWO:
            begin(RANKS_RESULTS, method, rates[method], SEEDS[0], 2)


if __name__ == "__main__":
    main()
