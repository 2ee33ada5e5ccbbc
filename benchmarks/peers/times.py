"""Step times of all methods of the comparison: python -m benchmarks.peers.times --data FILE --json FILE

In one process with one core they take turns step by step on the same batches, in an order that rotates. Each first
takes as many steps as a probe lasts. Ratios are formed within a round.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from benchmarks.peers.methods import METHODS
from benchmarks.peers.one import step
from benchmarks.peers.regimes import REGIMES
from benchmarks.peers.task import batches, load_model, load_tokenizer, training_data


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="packaged:smollm2-135m")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(args.model)
    data = training_data(args.data, tokenizer)
    made = {}
    regime = REGIMES["short"]
    for name in regime.methods:
        make, (_, rate, _) = METHODS[name]
        model = load_model(args.model)
        made[name] = make(model, rate, regime, 0)
    names = list(made)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = batches(data, tokenizer, 0, regime.batch)
    for number in range(-regime.probe - 1, args.rounds):
        batch = next(order)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = time.perf_counter()
            step(made[name], batch)
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    args.json.write_text(json.dumps({"torch": torch.__version__, "seconds": seconds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
