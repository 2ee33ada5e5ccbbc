"""What a ZeRO optimizer's constructor does beside constructing, which a switch of layers must not do.

DeepSpeed constructs an optimizer once in a run, so its constructor takes its time: it empties the allocator's cache,
collects garbage, waits for the device and for the other ranks, moves what trains through pageable host memory, gathers
each parameter to put a hook on it, and makes a stream. A draw runs the constructor again, in the middle of training.

All names here are DeepSpeed's own and not documented: globals of the modules of its two classes, and methods of a
ZeRO-3 parameter. Checked on 0.19.8; `tests/test_zero_switch.py` fails when they change. Where a release lacks a name,
its constructor does there what it always did: a switch is slower, and right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from grass_dist.backends.zero.jit import accelerator

GLOBALS = {
    "deepspeed.runtime.zero.stage_1_and_2": ("empty_cache", "get_accelerator"),
    "deepspeed.runtime.zero.stage3": ("defragment", "get_accelerator", "dist"),
}
"""Names that are exchanged while an optimizer is constructed again, by module."""
STREAMS = ("reduction_stream", "reduce_and_partition_stream")
"""Attributes of stages 1 and 2, and of stage 3: the stream of the reductions, None on a CPU."""
GATHERING = ("all_gather", "partition")
"""Methods of a ZeRO-3 parameter that the constructor calls around the registration of its hook."""


@contextmanager
def nothing_but_constructing(zero: Any, params: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """While it lasts, DeepSpeed constructs ``zero`` again, or destroys it, and the host waits for nothing.

    What the stream of the reductions still uses may be freed: the compute waits for it, on the device.

    Args:
        params: those of ZeRO-3 that train next, none of which is gathered. DeepSpeed gathers them for torch before
            2.1, where a hook needs a graph.
    """
    import importlib

    stream = next((found for name in STREAMS if (found := vars(zero).get(name)) is not None), None)
    if stream is not None:
        accelerator().current_stream().wait_stream(stream)
    with ExitStack() as stack:
        for module, names in GLOBALS.items():
            own = vars(importlib.import_module(module))
            for name in (name for name in names if name in own):
                stack.callback(own.__setitem__, name, own[name])
                own[name] = _replacement(name, own[name], stream)
        for param in params:
            for name in GATHERING:
                stack.callback(setattr, param, name, getattr(param, name))
                setattr(param, name, _nothing)
        yield


def _replacement(name: str, original: Any, stream: Any) -> Any:
    if name == "get_accelerator":
        instead: dict[str, Any] = {"synchronize": _nothing, "empty_cache": _nothing}
        if stream is not None:  # torch hands out 32 streams in turn, so new ones would in the end be our own
            instead["Stream"] = lambda *_, **__: stream
        quick = _But(original(), instead)
        return lambda: quick
    if name == "dist":
        return _But(original, {"barrier": _nothing})
    return {"empty_cache": _nothing, "defragment": flatten}[name]


class _But:
    """An object, or a module, but for a few of its functions."""

    def __init__(self, original: Any, instead: dict[str, Callable[..., Any]]) -> None:
        self.original, self.instead = original, instead

    def __getattr__(self, name: str) -> Any:
        return self.instead[name] if name in self.instead else getattr(self.original, name)


def flatten(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """What DeepSpeed's ``defragment`` makes: ``tensors`` one after the other in one memory, of which they are views.

    It is made where they are, so that for a moment they are in memory twice; DeepSpeed takes them through the host.
    """
    sizes = [tensor.numel() for tensor in tensors]
    flat = torch.empty(sum(sizes), dtype=tensors[0].dtype, device=tensors[0].device)
    for tensor, part in zip(tensors, flat.split(sizes), strict=True):
        tensor.data = part.copy_(tensor.reshape(-1))
    return flat


def _nothing(*_: Any, **__: Any) -> None:
    pass
