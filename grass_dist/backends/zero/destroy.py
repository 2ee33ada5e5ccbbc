"""`engine.destroy`: gives the model back, so that another engine may train it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

from grass_dist.backends.zero.narrow import NarrowZero
from grass_dist.backends.zero.private import ENGINE_HOOKS

Flags = Sequence[tuple[nn.Parameter, bool]]


def flags_of(model: nn.Module) -> Flags:
    """What trains in the model, for `add_destroy`; taken before an engine is made of it."""
    return [(param, param.requires_grad) for param in model.parameters()]


def add_destroy(engine: Any, flags: Flags) -> None:
    """Has the engine's `destroy` do what DeepSpeed's does and, besides, put the model back as it was.

    Hooks of the method and of the engine are off, ``requires_grad`` is what ``flags`` say, no gradient is left, and
    the model may be given to `initialize` again. Its weights stay; at ZeRO-3 they stay in shards, as with DeepSpeed.
    A second call does nothing: DeepSpeed makes one when the engine is collected, and the model may have another by
    then.
    """
    stock = engine.destroy
    zero: NarrowZero = engine.optimizer
    destroyed = False

    @functools.wraps(stock)
    def destroy() -> None:
        nonlocal destroyed
        if destroyed:
            return
        destroyed = True
        try:
            stock()
        finally:
            zero.reads.remove(param for param, _ in flags)
            zero.grass.detach()
            for name in ENGINE_HOOKS:
                if (hook := getattr(engine, name, None)) is not None:
                    hook.remove()
            for param, flag in flags:
                param.requires_grad_(flag)
                param.grad = None

    engine.destroy = destroy
