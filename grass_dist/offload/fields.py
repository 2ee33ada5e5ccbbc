"""What an optimizer class keeps for a parameter, found out before it keeps it; and where it is born."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from grass_dist.offload.layout import Field

Kept = list[tuple[str, torch.Size, torch.dtype]]


def kept_for(
    optimizer_class: type[torch.optim.Optimizer],
    kwargs: Mapping[str, Any],
    group: Mapping[str, Any],
    like: torch.Tensor,
    *,
    elementwise: bool,
) -> Kept:
    """(key, shape, dtype) of each tensor that the class keeps for a parameter like ``like``, in the order of birth.

    Found by a step of the class on a stand-in with a zero gradient. Step counts, and other tensors of one element, are
    left out. An elementwise class gets a stand-in of six entries, any other one of the parameter's own shape.

    Raises:
        Exception: the class cannot take such a step.
    """
    shape = torch.Size([2, 3]) if elementwise else like.shape
    stand_in = nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))
    stand_in.grad = torch.zeros_like(stand_in)
    optimizer = optimizer_class([{**group, "params": [stand_in]}], **kwargs)
    optimizer.step()
    kept = []
    for key, value in optimizer.state[stand_in].items():
        if torch.is_tensor(value) and value.numel() > 1:
            kept.append((key, like.shape if elementwise else value.shape, value.dtype))
    return kept


def field(name: str, key: str, shape: torch.Size, dtype: torch.dtype) -> Field:
    """The field of state entry ``key`` of parameter ``name``."""
    return Field(f"{name}/{key}", shape, dtype, narrow=key != "master" and dtype == torch.float32)


class BornIn(TorchFunctionMode):
    """While it lasts, what an optimizer class makes for a parameter is made in memory that there is.

    Classes make their state with `torch.zeros_like` or `full_like`. What is made in another way is found elsewhere
    afterwards, and has to be copied.

    Args:
        views: for the parameter with this id, what to give out, in the order of birth.
    """

    def __init__(self, views: Mapping[int, Sequence[torch.Tensor]]) -> None:
        super().__init__()
        self._left = {key: list(tensors) for key, tensors in views.items()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.zeros_like, torch.full_like) and args and (left := self._left.get(id(args[0]))):
            view = left[0]
            wanted = kwargs.get("dtype") or args[0].dtype
            if view.dtype == wanted and view.shape == args[0].shape:
                fill = 0 if func is torch.zeros_like else kwargs.get("fill_value", args[1] if len(args) > 1 else 0)
                return left.pop(0).fill_(fill)
        return func(*args, **kwargs)
