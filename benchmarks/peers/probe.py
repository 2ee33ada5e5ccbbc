"""What a probe finds on the comparison's task: python -m benchmarks.peers.probe --data FILE --json FILE

Importances over their mean, and how many layers the probabilities amount to, exp(entropy), by temperature.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from benchmarks.peers.methods import grass
from benchmarks.peers.one import step
from benchmarks.peers.regimes import REGIMES
from benchmarks.peers.task import batches, load_model, load_tokenizer, training_data
from grass_dist.method.importance import effective_layers, sampling_probabilities


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="packaged:smollm2-135m")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model)
    regime = REGIMES["short"]
    method = grass("grass")(model, 3e-4, regime, 0)
    data = training_data(args.data, tokenizer)
    for _, batch in zip(range(regime.probe), batches(data, tokenizer, 0, regime.batch), strict=False):
        step(method, batch)
    found = np.array(method.optimizer.grass.importances)  # type: ignore[attr-defined]
    layers = {}
    for temperature in (1.0, 0.5, 0.3, 0.1):
        layers[str(temperature)] = effective_layers(sampling_probabilities(found, temperature=temperature))
    told = {"importances over their mean": (found / found.mean()).tolist(), "effective layers": layers}
    args.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
