"""Decides where the states of the layers are, and takes the memory, on all ranks alike, before anything trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from grass_dist.config import GrassConfig
from grass_dist.ranks import Ranks, together
from grass_dist.states.layer_state import LayerState
from grass_dist.states.moving import IntervalStates, MovingStates, StreamedStates
from grass_dist.states.plan import Plan, make_plan, slot_count
from grass_dist.states.resident import ResidentStates
from grass_dist.states.slots import SlotPool
from grass_dist.states.store import LayerStateStore
from grass_dist.states.transfer import TransferEngine


def place(
    states: Sequence[LayerState[Any]],
    config: GrassConfig,
    ranks: Ranks,
    device: torch.device,
    *,
    resident: int,
    fallback: str | None = None,
    last_first: bool = True,
    inline: bool = False,
) -> ResidentStates | MovingStates:
    """Chooses the mode and takes the memory for it.

    Args:
        states: of all layers, which know their fields unless there is a ``fallback``.
        ranks: those that train one model together.
        device: that trains.
        resident: bytes of the states that never move, on this rank.
        fallback: why nothing can move here; see `make_plan`.
        last_first: see `MovingStates`.
        inline: see `TransferEngine`.

    Raises:
        ConfigError, GrassError: the states cannot be where the configuration wants them.
    """
    for state in states:
        state.lay_out(torch.bfloat16 if config.offload.host_dtype else None)
    sizes = [(state.layout.device_bytes, state.layout.host_bytes) for state in states]
    plan = make_plan(ranks, config, sizes, resident, device, fallback=fallback)
    if plan.mode == "none":
        return ResidentStates(states)
    return together(ranks, lambda: _build(plan, config, states, device, last_first=last_first, inline=inline))


def _build(
    plan: Plan,
    config: GrassConfig,
    states: Sequence[LayerState[Any]],
    device: torch.device,
    *,
    last_first: bool,
    inline: bool,
) -> MovingStates:
    """Allocates and pins all memory before training starts; pinning during a collective can block it.

    Raises:
        ConfigError, GrassError: this rank cannot have the memory; the other ranks do not know that yet.
    """
    offload = config.offload
    store = LayerStateStore([state.layout.host_bytes for state in states], device, offload.folder)
    transfers = TransferEngine(device, mapped=offload.folder is not None, chaos=offload.chaos, inline=inline)
    longest = max(state.layout.device_bytes for state in states)
    pool = SlotPool(slot_count(config, plan.mode, len(states)), longest, device, transfers.allocated)
    if plan.mode == "stream" and offload.slots < config.active_layers:
        return StreamedStates(states, pool, store, transfers, last_first=last_first)
    steps = offload.prefetch_steps if plan.mode == "interval" else 0
    return IntervalStates(states, pool, store, transfers, last_first=last_first, prefetch_steps=steps)
