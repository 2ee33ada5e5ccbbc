"""What an optimizer class keeps for a parameter, found out before it keeps it; and where it makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from grass_dist.errors import GrassError
from grass_dist.states.layout import Field

Kept = list[tuple[str, torch.Size, torch.dtype]]
Counts = Mapping[str, torch.Tensor]
Groups = list[dict[str, Any]]
Step = Callable[[Groups], Mapping[Any, Mapping[str, Any]]]
"""Takes one step over parameter groups, and gives the state that this leaves, by parameter."""


def kept_for(step: Step, group: Mapping[str, Any], like: torch.Tensor, *, elementwise: bool) -> Kept:
    """(key, shape, dtype) of each tensor that an optimizer keeps for a parameter like ``like``, as it makes them.

    Found by a step on a stand-in with a zero gradient. Step counts, and other tensors of one element, are left out. An
    elementwise optimizer gets a stand-in of six entries, any other one of the parameter's own shape.

    Raises:
        Exception: the optimizer cannot take such a step.
    """
    kept, plain = [], (torch.Tensor, nn.Parameter, type(torch.empty(0)))  # the planner's are fake
    for key, value in stepped(step, group, like, elementwise).items():
        if torch.is_tensor(value) and value.numel() > 1:
            if type(value) not in plain:
                raise TypeError(f"its {key} is {type(value).__name__}, which is no plain tensor")
            kept.append((key, like.shape if elementwise else value.shape, value.dtype))
    return kept


def counts_for(step: Step, group: Mapping[str, Any], like: torch.Tensor, *, elementwise: bool) -> Counts:
    """Step counts, and other tensors of one element, that an optimizer keeps for a parameter like ``like``, by key.

    Arguments are those of `kept_for`. A class that cannot take such a step is taken to keep them as those of torch do:
    on the parameter's device if it is capturable or fused, else in host memory.
    """
    try:
        made = stepped(step, group, like, elementwise)
    except Exception:
        return usual_counts(group, like)
    return {key: value for key, value in made.items() if torch.is_tensor(value) and value.numel() == 1}


def usual_counts(group: Mapping[str, Any], like: torch.Tensor) -> Counts:
    """What classes of torch keep."""
    on_device = group.get("capturable") or group.get("fused")
    return {"step": torch.zeros((), device=like.device if on_device else "cpu")}


def placed_count(value: torch.Tensor | float, key: str, made: Counts) -> torch.Tensor:
    """A copy of a loaded count, on the device and in the dtype that the optimizer class keeps it in.

    Args:
        value: a tensor of one element, or a number as older releases of torch kept it.
    """
    like = made[key]
    if not torch.is_tensor(value):
        return torch.full_like(like, value)
    return value.detach().to(device=like.device, dtype=like.dtype, copy=True)


def stepped(step: Step, group: Mapping[str, Any], like: torch.Tensor, elementwise: bool) -> Mapping[str, Any]:
    """The state of a stand-in after a step with a zero gradient; for the arguments see `kept_for`."""
    shape = torch.Size([2, 3]) if elementwise else like.shape
    stand_in = nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))
    stand_in.grad = torch.zeros_like(stand_in)
    return step([{**group, "params": [stand_in]}])[stand_in]


def field(name: str, key: str, shape: torch.Size, dtype: torch.dtype, *, rounds: bool = True) -> Field:
    """The field of state entry ``key`` of parameter ``name``; ``rounds``: host memory may round a moment."""
    return Field(f"{name}/{key}", shape, dtype, narrow=rounds and key != "master" and dtype == torch.float32)


Home = tuple[torch.Tensor, str, torch.Tensor]
"""(what the optimizer updates, key of its state, memory that this entry belongs in)."""


def made_in(homes: Iterable[Home], state: Mapping[Any, Mapping[str, Any]]) -> AbstractContextManager[object]:
    """While it lasts, an optimizer class makes the state of what has none yet in the memory that it belongs in."""
    free: dict[int, list[torch.Tensor]] = {}
    for target, _, memory in homes:
        if not state.get(target):
            free.setdefault(id(target), []).append(memory)
    return _MadeIn(free) if free else nullcontext()


def move_home(homes: Iterable[Home], state: Mapping[Any, dict[str, Any]]) -> None:
    """Puts what an optimizer class has made elsewhere into the memory that it belongs in."""
    misplaced = []
    for target, key, memory in homes:
        own = state.get(target, {})
        made = own.get(key)
        if torch.is_tensor(made) and made is not memory:
            if made.dtype != memory.dtype or made.shape != memory.shape or type(made) is not type(memory):
                raise GrassError(
                    f"The optimizer class has made a state {key} of {made.dtype} and shape {tuple(made.shape)}, where "
                    f"a trial had told {memory.dtype} and {tuple(memory.shape)}; use grass.offload.mode='none'."
                )
            if made.data_ptr() != memory.data_ptr():
                misplaced.append((memory, made.clone()))  # it may lie where another belongs
            own[key] = memory
    for memory, made in misplaced:
        memory.copy_(made)


class _MadeIn(TorchFunctionMode):
    """Gives out memory of ours instead of what `torch.zeros_like` and `full_like` would make for a parameter.

    That is what optimizer classes call. What they make in another way is for `move_home`.
    """

    def __init__(self, free: dict[int, list[torch.Tensor]]) -> None:
        super().__init__()
        self._free = free

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.zeros_like, torch.full_like) and args and (free := self._free.get(id(args[0]))):
            dtype, shape = kwargs.get("dtype") or args[0].dtype, args[0].shape
            at = next((i for i, memory in enumerate(free) if memory.dtype == dtype and memory.shape == shape), None)
            if at is not None:
                fill = 0 if func is torch.zeros_like else kwargs.get("fill_value", args[1] if len(args) > 1 else 0)
                return free.pop(at).fill_(fill)
        return func(*args, **kwargs)
