"""One update of several units: one call of the optimizer class, instead of one for each unit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from grass_dist.states.layer_state import materialize
from grass_dist.states.unit_optimizer import ParamState, UnitOptimizer, stepping_over
from grass_dist.states.update_rule import ELEMENTWISE, step_unseen

MOST_AT_ONCE = 1 << 24
"""Entries of several layers and roles that are updated by one call, unless one of them has more by itself.

An update of all at once needs memory for all: fp32 gradients of 16-bit weights, and what a foreach implementation
computes in between, 4 bytes an entry each. So it takes no more than that of the largest unit does, or 64 MiB each.
Larger units keep a device busy for longer than their operators take to launch.
"""

ALIGNED = 16
"""Entries to which each gradient in fp32 is aligned, 64 bytes, for kernels that load several at once."""


def update_together(units: Sequence[UnitOptimizer], groups: Sequence[dict[str, Any]]) -> None:
    """One update of each unit with the hyperparameters of the user's ``groups``.

    The classes of torch that work entry by entry are given several units at once, with the state and the step count of
    each parameter: the numbers are the same to the bit. Any other class is given one unit after the other.
    """
    joint: list[UnitOptimizer] = []
    for unit in units:
        if not unit.has_state:
            unit.create(groups)
        joint += [unit] if _can_join(unit) else []
    for unit in units:
        if unit not in joint:
            unit.step(groups)
    for together in _in_runs(joint):
        _update(together, groups) if len(together) > 1 else together[0].step(groups)


def _can_join(unit: UnitOptimizer) -> bool:
    return type(unit.inner) in ELEMENTWISE and all(own.plain for own in unit.targets)


def _in_runs(units: Sequence[UnitOptimizer]) -> Iterator[list[UnitOptimizer]]:
    sizes = [sum(own.target.numel() for own in unit.targets) for unit in units]
    most, run, total = max([MOST_AT_ONCE, *sizes]), list[UnitOptimizer](), 0
    for unit, size in zip(units, sizes, strict=True):
        if total + size > most:
            yield run
            run, total = [], 0
        run, total = [*run, unit], total + size
    if run:
        yield run


def _update(units: Sequence[UnitOptimizer], groups: Sequence[dict[str, Any]]) -> None:
    targets = [own for unit in units for own in unit.targets]
    joined: dict[int, dict[str, Any]] = {}
    state: dict[Any, dict[str, Any]] = {}
    for unit in units:
        unit.follow_groups(groups)
        assert unit.inner is not None
        for group in unit.inner.param_groups:
            whole = joined.setdefault(group["user_group"], {**group, "params": []})
            whole["params"] += group["params"]
        state.update((own.target, unit.inner.state[own.target]) for own in unit.targets)
    low = [own for own in targets if own.master is not None]
    for own in targets:
        if own.master is None:
            own.take_gradient()
    _widen_gradients(low)
    first = units[0].inner
    assert first is not None
    with stepping_over(first, list(joined.values()), state), materialize(targets, state):
        step_unseen(first)
    for own in targets:
        own.state = state[own.target]
        own.end_update()
    if low:
        torch._foreach_copy_([own.view for own in low], [own.target.detach() for own in low])


def _widen_gradients(targets: Sequence[ParamState]) -> None:
    """Gives masters the gradients of their weights: one memory, and one operator, for all of one device."""
    found: dict[torch.device, list[tuple[ParamState, torch.Tensor]]] = {}
    for own in targets:
        own.target.grad = None
        if (grad := own.gradient()) is not None:
            found.setdefault(own.device, []).append((own, grad))
    for device, pairs in found.items():
        sizes = [math.ceil(grad.numel() / ALIGNED) * ALIGNED for _, grad in pairs]
        flat = torch.empty(sum(sizes), dtype=torch.float32, device=device)
        wide = [
            part.narrow(0, 0, grad.numel()).view(grad.shape)
            for part, (_, grad) in zip(flat.split(sizes), pairs, strict=True)
        ]
        torch._foreach_copy_(wide, [grad for _, grad in pairs])
        for (own, _), grad in zip(pairs, wide, strict=True):
            own.target.grad = grad
