"""A state that was saved and loaded again is where the optimizer's kernels look for it."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu import training
from benchmarks.gpu.told import Told

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
}


def show(told: Told) -> None:
    with training.to_the_bit():
        for kind, adamw in KINDS.items():
            for mode in ("none", "interval"):
                name = f"{kind}, {mode}"
                if told.tiny and kind == "capturable":
                    told.left_out(name, "torch has it on a GPU only")
                    continue
                told.attempt(name, lambda name=name, mode=mode, adamw=adamw: compare(told, name, mode, adamw))


def compare(told: Told, name: str, mode: str, adamw: dict[str, Any]) -> None:
    """Five steps, a load of its own state or none, and three steps more."""
    found = []
    for loads in (False, True):
        model = training.llama(told, layers=6)
        optimizer = training.grass(model, training.MODES[mode], adamw)
        training.train(told, model, optimizer, range(5))
        if loads:
            optimizer.load_state_dict(optimizer.state_dict())
        training.train(told, model, optimizer, range(5, 8))
        training.synchronize(told)
        found.append(training.weights(model))
        training.free(told, optimizer)
    told.check(name, all(map(torch.equal, *found)), apart=training.apart(*found))
