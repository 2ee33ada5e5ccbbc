"""Makes what a `Plan` says: host memory, slots, queues, and the mode over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grass_dist.config import GrassConfig
from grass_dist.states.moving import IntervalStates, Movable, MovingStates, StreamedStates
from grass_dist.states.plan import Plan, slot_count
from grass_dist.states.slots import SlotPool
from grass_dist.states.store import LayerStateStore
from grass_dist.states.transfer import TransferEngine


def build(
    plan: Plan,
    config: GrassConfig,
    states: Sequence[Movable],
    device: torch.device,
    *,
    last_first: bool = True,
    inline: bool = False,
) -> MovingStates:
    """Allocates and pins all memory before training starts; pinning during a collective can block it.

    Args:
        plan: with a mode that moves states.
        states: of all layers.
        last_first: see `MovingStates`.
        inline: see `TransferEngine`.

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
