"""Memory for states and for the sums of a probe is allocated before training, and switches allocate none."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grass_dist import GrassConfig, GrassOptimizer
from tests.offload_runs import make
from tests.tiny import loss_of, take_steps, tiny

SWITCHES = 100
MAKES = ("aten::empty", "aten::zeros", "aten::full", "aten::empty_like", "aten::zeros_like", "aten::empty_strided")


class Allocated(TorchDispatchMode):
    """Counts what is allocated: (dtype, bytes) of each new memory of some size."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[torch.dtype, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name().partition(".")[0] in MAKES:
            self.counts[result.dtype, result.nbytes] += 1
        return result


@pytest.mark.parametrize("offload", [{"mode": "interval"}, {"mode": "stream", "slots": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundred_switches_allocate_no_memory_for_states(offload, dtype):
    model, optimizer = make(offload, dtype=dtype, sampling_interval=2, update_interval=2, draw_ahead=1, probe_steps=0)
    take_steps(model, optimizer, range(20))
    pool = optimizer._states.pool
    slots = {slot.flat.data_ptr() for slot in pool._free}
    slots |= {place.slot.flat.data_ptr() for place in optimizer._states._places if place.slot is not None}
    held, rounds = optimizer._states.device_bytes, optimizer.grass.round
    with Allocated() as allocated:
        take_steps(model, optimizer, range(20, 20 + 2 * SWITCHES))
    assert optimizer.grass.round == rounds + SWITCHES and optimizer._states.device_bytes == held
    assert not [key for key in allocated.counts if key[0] == torch.uint8], "slots and host buffers are bytes"
    after = {slot.flat.data_ptr() for slot in pool._free}
    after |= {place.slot.flat.data_ptr() for place in optimizer._states._places if place.slot is not None}
    assert after == slots


def test_sums_of_a_probe_are_there_before_it_and_gone_after():
    model = tiny()
    settings: Any = {"active_layers": 2, "probe_steps": 3, "sampling_interval": 2, "update_interval": 2}
    config = GrassConfig(**settings)
    optimizer = GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=config, gradient_accumulation_steps=2)
    backend: Any = optimizer.grass.backend
    gone = weakref.ref(backend._sums._store)
    address = backend._sums._store[0].data_ptr()
    for step in range(3):
        with Allocated() as allocated:
            for micro in range(2):
                loss_of(model, 2 * step + micro).backward()
        assert not [key for key in allocated.counts if key[0] == torch.uint8]
        assert backend._sums._store[0].data_ptr() == address
        optimizer.step()
    gc.collect()
    assert backend._sums is None and gone() is None  # its memory is released, and unpinned: `tests/test_devices.py`
