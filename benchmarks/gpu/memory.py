"""What clipping takes beside the gradients, and whether memory grows over 100 steps."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu import training
from benchmarks.gpu.told import Told

MIB = 2**20
STEPS = 100


def show(told: Told) -> None:
    model = training.llama(told, layers=6, width=2048, inner=8192, vocabulary=32000, small=(4, 256, 704, 8192))
    optimizer = training.grass(model, training.MODES["interval"])
    training.train(told, model, optimizer, range(9))
    training.loss(model, training.batch(told, model, 0)).backward()
    entries = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
    extra = beside(told, lambda: optimizer.clip_grad_norm_(1.0))
    told.check("clipping takes less than 1 MB", extra < MIB, bytes=extra, entries_of_gradients=entries)
    optimizer.step()
    optimizer.zero_grad()
    if told.tiny:
        training.train(told, model, optimizer, range(10, 30))
        told.left_out("no growth over 100 steps", "it needs the allocator of a GPU")
        return
    told.attempt("no growth over 100 steps", lambda: steady(told, model, optimizer, "no growth over 100 steps"))
    half = max(optimizer.state_bytes // 2 // optimizer.grass.config.active_layers, MIB)
    whole = torch.cuda.get_device_properties(0).total_memory
    allowed = torch.cuda.max_memory_reserved() + half
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / whole))
    name = "no retries with half a state to spare"
    told.attempt(name, lambda: steady(told, model, optimizer, name))


def beside(told: Told, work: Callable[[], object]) -> int:
    """Most bytes that ``work`` allocates on the device at a time."""
    if not told.tiny:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    held = most = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


def steady(told: Told, model: torch.nn.Module, optimizer: object, name: str) -> None:
    """100 steps, 25 switches: what the allocator has asked the device for after the first switches and at the end."""
    seen = []
    for at in range(0, STEPS, 4):
        training.train(told, model, optimizer, range(at, at + 4))  # type: ignore[arg-type]
        stats = torch.cuda.memory_stats()
        seen.append([stats[key] for key in ("reserved_bytes.all.current", "num_device_alloc", "num_alloc_retries")])
    reserved, asked, retries = (end - start for start, end in zip(seen[3], seen[-1], strict=True))
    told.check(name, reserved == 0 and retries == 0, grown_bytes=reserved, device_allocations=asked, retries=retries)
