"""Counts what would make the host wait for the device in backward, clipping and update, between two draws."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import training
from benchmarks.gpu.told import Told

ASKS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select", "aten::equal")
"""Operators whose result the host has to have."""
INTERVAL = 20
STEPS = 8


def show(told: Told) -> None:
    training.join_alone(told)
    for mode in training.MODES:
        told.attempt(mode, lambda mode=mode: count(told, mode))


def count(told: Told, mode: str) -> None:
    """Under FSDP2, in steps that neither draw nor switch."""
    model = training.shard(told, training.llama(told, layers=8))
    every = {"sampling_interval": INTERVAL, "update_interval": INTERVAL}
    # On the CPU a fused update: the others read their count of steps, which on a GPU is in host memory.
    adamw = {"fused": True} if told.tiny else {}
    optimizer = training.grass(model, training.MODES[mode], adamw, sampler="grass", probe_steps=2, **every)
    training.train(told, model, optimizer, range(6))
    clips = not optimizer.grass.config.offload.update_in_backward
    ids = training.batch(told, model, 0)
    training.synchronize(told)
    with waits(told) as found:
        for _ in range(STEPS):
            with found.away():  # the model's own
                value = training.loss(model, ids)
            value.backward()
            if clips:
                optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
    told.check(
        mode, not found.places, a_step=sum(found.places.values()) / STEPS, where=dict(found.places.most_common(8))
    )
    del model
    training.free(told, optimizer)


class Found(TorchDispatchMode):
    """Attributes:
    places: how often the host has waited, by the place in the library that did so.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device.type
        self.places: Counter[str] = Counter()
        self.counts = True

    def note(self, what: str) -> None:
        if self.counts:
            self.places[f"{what} in {place()}"] += 1

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        self.counts = False
        try:
            yield
        finally:
            self.counts = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split(".")[0] in ASKS and args[0].device.type == self.device:
            self.note(func.name())
        return func(*args, **(kwargs or {}))


def place() -> str:
    """The last line of the library, or of torch if the library is not in the stack."""
    stack = [frame for frame in traceback.extract_stack()[:-2] if "benchmarks/gpu" not in frame.filename]
    ours = [frame for frame in stack if "grass_dist" in frame.filename]
    last = (ours or stack)[-1]
    return f"{'/'.join(Path(last.filename).parts[-2:])}:{last.lineno}"


@contextlib.contextmanager
def waits(told: Told) -> Iterator[Found]:
    """Counts operators that ask the device, calls that wait for it, and what CUDA's own check finds."""
    found = Found(training.device(told))
    with contextlib.ExitStack() as stack:
        if not told.tiny:
            for owner, name in (
                (torch.cuda, "synchronize"),
                (torch.cuda, "empty_cache"),
                (torch.cuda.Stream, "synchronize"),
                (torch.cuda.Event, "synchronize"),
            ):
                stack.enter_context(counted(owner, name, found))
            stack.enter_context(checked(found))
        stack.enter_context(found)
        yield found


@contextlib.contextmanager
def counted(owner: Any, name: str, found: Found) -> Iterator[None]:
    stock: Callable[..., Any] = getattr(owner, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        found.note(f"{owner.__name__}.{name}")
        return stock(*args, **kwargs)

    setattr(owner, name, noted)
    try:
        yield
    finally:
        setattr(owner, name, stock)


@contextlib.contextmanager
def checked(found: Found) -> Iterator[None]:
    """torch's own check, which also sees copies from memory that is not pinned. It warns, and we count."""

    def shown(message: Any, *args: Any, **kwargs: Any) -> None:
        if "synchroniz" in str(message):
            found.note("a synchronising operation")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = shown
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
