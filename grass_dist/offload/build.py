"""Makes what a `Plan` says: host memory, slots, queues, and the mode over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grass_dist.config import GrassConfig
from grass_dist.offload.moving import IntervalStates, Movable, MovingStates, StreamedStates
from grass_dist.offload.plan import Plan
from grass_dist.offload.slots import SlotPool
from grass_dist.offload.store import LayerStateStore
from grass_dist.offload.transfer import TransferEngine


def build(
    plan: Plan,
    config: GrassConfig,
    states: Sequence[Movable],
    device: torch.device,
    *,
    last_first: bool = True,
    inline: bool = False,
) -> MovingStates:
    """All memory is had here, pinned where it is host memory, so that none is asked for while training communicates.

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
    if plan.mode == "stream" and offload.slots < config.active_layers:
        pool = SlotPool(offload.slots, longest, device)
        return StreamedStates(states, pool, store, transfers, last_first=last_first)
    pool = SlotPool(config.active_layers, longest, device)
    steps = offload.prefetch_steps if plan.mode == "interval" else 0
    return IntervalStates(states, pool, store, transfers, last_first=last_first, prefetch_steps=steps)
