"""A copy into memory that the compute still uses must wait for it: one slot by hand, then a whole training."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu import training
from benchmarks.gpu.told import Told
from grass_dist.states.slots import SlotPool
from grass_dist.states.store import LayerStateStore
from grass_dist.states.transfer import TransferEngine


def show(told: Told) -> None:
    told.attempt("a slot by hand", lambda: by_hand(told))
    told.attempt("a training", lambda: trained(told))


def by_hand(told: Told) -> None:
    """On a GPU with a kernel that starts late; else on the stand-in, under twenty orders of events."""
    if not told.tiny:
        equal, reused = one_slot(training.device(told), 4 * 2**20, lambda: training.sleep(600))
        told.check("a slot by hand", equal and reused, equal=equal, same_memory=reused)
        return
    from tests.late_cuda import DEVICE, late_cuda

    found = []
    for seed in range(20):
        with late_cuda(seed):
            found.append(one_slot(DEVICE, 256, lambda: None))
    told.check("a slot by hand", all(all(each) for each in found), orders=len(found))


def one_slot(device: torch.device, size: int, late: Any) -> tuple[bool, bool]:
    """A kernel reads memory that the host has freed, and a state comes into a slot made of it.

    Returns:
        Whether the kernel has read what was there before, and whether the slot got that memory.
    """
    store, transfers = LayerStateStore([size], device), TransferEngine(device)
    store[0].fill_(0)
    x, y = (torch.full((size,), value, dtype=torch.uint8, device=device) for value in (1, 7))
    torch.cuda.synchronize(device)
    address = x.data_ptr()
    late()
    y.copy_(x)
    del x
    slot = SlotPool(1, size, device, transfers.allocated).take()
    reused = slot.flat.data_ptr() == address
    transfers.to_device("layer", [(slot.flat, store[0])], [slot.free])
    torch.cuda.synchronize(device)
    return bool(y.eq(1).all()), reused


def trained(told: Told) -> None:
    """0.3B, bf16, two layers in turn, the compute 200 ms late at each update: to the bit as where no state moves."""
    with training.to_the_bit():
        theirs = run(told, "none", fill=False)
        for mode in ("interval", "stream"):
            for fill in (False, True):
                name = f"{mode}{', new memory filled' * fill}, late compute"
                told.attempt(name, lambda mode=mode, fill=fill, name=name: compare(told, mode, fill, name, theirs))


def compare(told: Told, mode: str, fill: bool, name: str, theirs: list[torch.Tensor]) -> None:
    ours = run(told, mode, fill=fill)
    apart = training.apart(ours, theirs)
    told.check(name, all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), apart=apart)


def run(told: Told, mode: str, *, fill: bool) -> list[torch.Tensor]:
    """The weights after 40 steps. On the CPU copies come as late, and in any order, as their events allow."""
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
    late = mode != "none"
    model = training.llama(told, layers=12)
    offload = training.MODES[mode] | ({"chaos": 3} if told.tiny and late else {})
    optimizer = training.grass(model, offload)
    for step in range(16 if told.tiny else 40):
        training.loss(model, training.batch(told, model, step)).backward()
        if late and not told.tiny:
            training.sleep(200)
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    training.synchronize(told)
    found = training.weights(model)
    training.free(told, optimizer)
    return found
