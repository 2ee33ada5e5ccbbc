"""Counts the operators that a piece of code launches, and the memory that they take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """Counts each operator within it by name, but for views and a profiler's ranges, which launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @property
    def number(self) -> int:
        return sum(self.counts.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.namespace != "profiler":
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def peak_bytes(job: Callable[[], object]) -> int:
    """Most bytes that tensors made within ``job`` take at a time, as torch's profiler sees it."""
    with profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        job()
    held = most = 0
    profiler: Any = found.profiler
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
