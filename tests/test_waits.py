"""The host waits for the device at refreshes and draws alone.

On the CPU nothing waits, so the calls that would wait on a GPU are counted. `tests/late_cuda.py` has the waits of
copies and events.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from grass_dist import GrassConfig, GrassOptimizer
from grass_dist.backends.base import HookedBackend
from grass_dist.config import OffloadConfig
from grass_dist.finetune.feed import StepData
from grass_dist.finetune.run_torch import TorchRun
from grass_dist.finetune.steps import train_step
from grass_dist.record.speed import Positions
from grass_dist.states import plan
from tests.fake_cuda import FakeCuda, fake_cuda
from tests.offload_runs import make
from tests.tiny import Tiny, loss_of

__all__ = ["fake_cuda"]

ANSWERS = {"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "nonzero", "equal"}
"""Functions of a tensor whose answer the host needs. Those of torch that need one dispatch one of `ANSWERING`."""
ANSWERING = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal"}
ANSWERING |= {"aten::masked_select", "aten::unique_dim", "aten::_unique2", "aten::allclose"}
OF_CUDA = ("synchronize", "empty_cache", "ipc_collect", "memory_stats")
COPIES = {"aten::copy_", "aten::_to_copy"}


class Asked(TorchFunctionMode):
    """Counts calls from Python whose answer the host needs."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ANSWERS:
            self._waits[name] += 1
        return func(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Counts in `counts` what would make the host wait for a GPU: answers, and copies between devices that wait."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._asked = Asked(self.counts)
        for name in OF_CUDA:
            patch.setattr(torch.cuda, name, lambda *_, name=name: self.counts.update([f"torch.cuda.{name}"]))

    def __enter__(self) -> Any:
        self._asked.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._asked.__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.name().partition(".")[0]
        if name in ANSWERING:
            self.counts[name] += 1
        result = func(*args, **kwargs)
        if name in COPIES:
            source = args[1] if name == "aten::copy_" else args[0]
            if (source.device.type == "cuda") != (result.device.type == "cuda"):  # fake tensors are never pinned
                self.counts[f"{name} {source.device} -> {result.device}"] += 1
        return result


def counted(waits: Waits, model: Any, optimizer: Any, step: int, *, clip: bool = True) -> Counter[str]:
    """What waits in a step, its backward included."""
    loss = loss_of(model, step)
    waits.counts.clear()
    with waits:
        loss.backward()
        if clip:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    return +waits.counts


MODES: list[dict[str, Any]] = [
    {"mode": "none"},
    {"mode": "interval"},
    {"mode": "interval", "prefetch_steps": 0},
    {"mode": "stream", "slots": 2},
    {"mode": "stream", "slots": 2, "update_in_backward": True},
    {"mode": "none", "update_in_backward": True},
    {"mode": "interval", "weights": "host"},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offload", MODES, ids=str)
def test_nothing_waits_between_draws(offload, dtype, monkeypatch):
    # The fused class of the CPU reads its step counts as that of a GPU does; others ask for them on the host.
    model, optimizer = make(offload, dtype=dtype, kwargs={"lr": 1e-2, "fused": True})
    waits, draws, grass = Waits(monkeypatch), 0, optimizer.grass
    for step in range(24):
        before = grass.step
        found = counted(waits, model, optimizer, step, clip=not offload.get("update_in_backward"))
        schedule = grass.schedule
        due = schedule.draw_due(before + 1) or schedule.refresh_due(before + 1) or schedule.probe_ends(before + 1)
        draws += schedule.draw_due(before + 1)
        assert due or not found, f"step {step}: {found}"
        assert not schedule.refresh_due(before + 1) or found, "a refresh is not seen to wait"
    assert draws >= 3


def test_what_waits_is_counted(monkeypatch):
    waits = Waits(monkeypatch)
    some = torch.tensor([1.0, 0.0])
    with waits:
        _ = some[0].item(), some.tolist(), some.nonzero(), bool(some[0] > 0), torch.equal(some, some)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    told = {"item", "tolist", "nonzero", "__bool__", "torch.cuda.synchronize", "torch.cuda.empty_cache"}
    assert told <= set(waits.counts)
    with FakeTensorMode():
        there, host = torch.zeros(2, device="cuda:1"), torch.zeros(2)
        waits.counts.clear()
        with waits:
            _ = there.to("cpu"), host.to("cuda:1", non_blocking=True), there.double(), host.double()
        assert sum(waits.counts.values()) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kwargs", [{"foreach": True}, {"fused": True}, {"capturable": True}, {}], ids=str)
def test_no_step_on_a_gpu_copies_to_the_host(kwargs, dtype, fake_cuda: FakeCuda, monkeypatch):
    """torch's fake tensors raise where a value is asked for, and have a device."""
    monkeypatch.setattr(plan, "_free_device", lambda device: 1 << 30)
    with FakeTensorMode():
        model = Tiny()
        for module in model.modules():
            for name, param in module._parameters.items():
                made = param if param is None else nn.Parameter(torch.zeros(param.shape, dtype=dtype, device="cuda:1"))
                module._parameters[name] = made
        settings: Any = {"active_layers": 3, "probe_steps": 0, "sampling_interval": 50, "update_interval": 50}
        config = GrassConfig(**settings, offload=OffloadConfig(mode="none"))
        optimizer = GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2, **kwargs}, config=config)
        waits, backend = Waits(monkeypatch), optimizer.grass.backend
        assert isinstance(backend, HookedBackend)
        for _ in range(4):
            waits.counts.clear()
            with waits:
                for unit in optimizer.grass.trainable_units():  # without a GPU autograd has no thread for one
                    for slot, (_, param) in enumerate(unit.params):
                        param.grad = torch.ones_like(param)
                        backend._on_hook(unit.name, slot, param)
                optimizer.clip_grad_norm_(1.0)
                optimizer.step()
                optimizer.zero_grad()
            host_counts = not (kwargs.get("fused") or kwargs.get("capturable"))  # torch has them in host memory
            assert set(+waits.counts) <= ({"item", "aten::_local_scalar_dense"} if host_counts else set())


@pytest.mark.parametrize("clip", [1.0, None])
def test_the_program_waits_once_a_step(clip, monkeypatch):
    """For the loss, the norm, whether both are finite, the tokens and the flags, in one transfer before the update."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    world: Any = SimpleNamespace(device=torch.device("cpu"), size=1, rank=0, during=lambda what: nullcontext())
    task: Any = SimpleNamespace(
        targets=lambda batch: torch.tensor(batch["ids"].numel()),
        loss=lambda model, batch: model(batch["ids"]).float().square().sum(),
    )
    model, optimizer = make({"mode": "interval"}, kwargs={"lr": 1e-2, "fused": True})
    run, waits, seen = TorchRun(model, optimizer, clip, world), Waits(monkeypatch), 0
    for step in range(24):
        before, schedule = optimizer.grass.step, optimizer.grass.schedule
        data = StepData([{"ids": torch.full((2, 6), step % 16)}], Positions(12, 0, 72))
        waits.counts.clear()
        with waits:
            result = train_step(run, data, task, world, step + 1, lambda: [1.0, 2.0])
        if not (schedule.draw_due(before + 1) or schedule.refresh_due(before + 1) or schedule.probe_ends(before + 1)):
            seen += 1
            assert not {name: times for name, times in waits.counts.items() if name != "tolist"}
            assert waits.counts["tolist"] == 1
        assert result.applied and result.loss > 0 and result.tokens == 12 and result.flags == [1.0, 2.0]
        assert (result.grad_norm is None) == (clip is None or before < 2)
    assert seen > 10
