"""States that come and go leave the same weights and states, to the bit, as states that stay."""

from __future__ import annotations

import pytest
import torch

from tests.offload_runs import make, outcome, run, same, train

MODES = [
    {"mode": "interval", "prefetch_steps": 0},
    {"mode": "interval", "prefetch_steps": 1, "chaos": 1},
    {"mode": "interval", "prefetch_steps": 2, "update_in_backward": True},
    {"mode": "stream", "slots": 2, "chaos": 2, "update_in_backward": True},
    {"mode": "stream", "slots": 3},
    {"mode": "none", "update_in_backward": True},
]
CASES = {
    "AdamW": {},
    "one layer": {"active_layers": 1},
    "five layers": {"active_layers": 5, "sampling_interval": 3},
    "all layers": {"active_layers": 8},
    "every step": {"sampling_interval": 1, "update_interval": 2},
    "not ahead": {"draw_ahead": 0},
    "masters": {"dtype": torch.bfloat16},
    "amsgrad": {"kwargs": {"lr": 1e-2, "amsgrad": True}},
    "SGD": {"cls": torch.optim.SGD, "kwargs": {"lr": 1e-2, "momentum": 0.9}},
    "Adagrad": {"cls": torch.optim.Adagrad, "kwargs": {"lr": 1e-2, "initial_accumulator_value": 0.1}},
    "Rprop": {"cls": torch.optim.Rprop},
    "NAdam": {"cls": torch.optim.NAdam, "dtype": torch.bfloat16},
    "Adafactor": {"cls": torch.optim.Adafactor},
}


@pytest.fixture(scope="module")
def resident():
    known = {}

    def get(case: str) -> list[torch.Tensor]:
        if case not in known:
            known[case] = run({"mode": "none"}, **CASES[case])
        return known[case]

    return get


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: " ".join(map(str, mode.values())))
@pytest.mark.parametrize("case", CASES)
def test_the_same_to_the_bit(case, mode, resident):
    assert same(run(mode, **CASES[case]), resident(case))
