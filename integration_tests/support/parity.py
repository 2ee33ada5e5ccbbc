"""The measure of every backend: the trajectory of one process with an AdamW for each layer."""

from __future__ import annotations

import pytest
import torch


def check_parity(runs: list[dict], reference: dict) -> None:
    """``runs`` of all ranks, of `train_grass` or `train_zero`, are ``reference``, of `run_reference`."""
    first = runs[0]
    assert all(run["active"] == reference["active"] for run in runs)
    worst = max((first["params"][n] - p).abs().max().item() for n, p in reference["params"].items())
    print(f"worst parameter difference {worst:.1e}")  # shown by pytest -rP
    assert worst <= 5e-6
    for run in runs:  # whole parameters: gathered from shards, or each replica's own
        assert run["params"].keys() == reference["params"].keys()
        assert all(torch.equal(run["params"][n], p) for n, p in first["params"].items())
        assert all(
            a == pytest.approx(b, nan_ok=True, rel=0)
            for a, b in zip(run["importances"], first["importances"], strict=True)
        )
        assert run["norms"] == first["norms"]
    for ours, theirs in zip(first["importances"], reference["importances"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, nan_ok=True)
    norm = max(abs(a - b) for a, b in zip(first["norms"], reference["norms"], strict=True))
    print(f"worst norm difference {norm:.1e}")
    losses = [sum(run["losses"][i] for run in runs) / len(runs) for i in range(len(first["losses"]))]
    assert losses == pytest.approx(reference["losses"], abs=1e-4)
    assert norm <= 3e-6  # fp32 sums in another order, which differ from processor to processor
    assert sum(run["frozen_moved"] for run in runs) == 0
    assert sum(run["frozen_grads"] for run in runs) == 0
