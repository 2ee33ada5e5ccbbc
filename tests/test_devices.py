"""A model that is not on the current device, and states that are loaded: everything is where it belongs.

Streams, events and registered memory are those of `fake_cuda`; tensors on a GPU are fake ones of torch, which have a
device and no memory.
"""

from __future__ import annotations

import gc
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from grass_dist import GrassConfig, GrassError, GrassOptimizer, UnsupportedModel
from grass_dist.backends.base import device_of
from grass_dist.backends.fsdp2 import check_offloaded_weights
from grass_dist.backends.host_sums import HostSums
from grass_dist.backends.single import SingleBackend
from grass_dist.checkpoint import per_rank
from grass_dist.job.launchers import ProcessPlace
from grass_dist.job.seats import own_seat
from grass_dist.job.world import _take_device
from grass_dist.model.discovery import Unit
from grass_dist.model.sharding import Sharding
from grass_dist.ranks import Ranks
from grass_dist.states.plan import _free_device
from grass_dist.states.slots import SlotPool
from grass_dist.states.store import LayerStateStore
from grass_dist.states.transfer import TransferEngine
from grass_dist.states.unit_optimizer import UnitOptimizer
from tests.fake_cuda import FakeCuda, fake_cuda
from tests.offload_runs import make
from tests.tiny import take_steps, tiny

__all__ = ["fake_cuda"]

OTHER = torch.device("cuda:1")
"""Not the current device."""
CPU = torch.device("cpu")

# --- a model on another device than the current one


def test_copies_and_updates_are_queued_on_the_models_device(fake_cuda: FakeCuda):
    transfers = TransferEngine(OTHER)
    device, host = torch.zeros(64, dtype=torch.uint8), torch.ones(64, dtype=torch.uint8)
    slot = SlotPool(1, 64, CPU, transfers.allocated).take()
    came = transfers.to_device("layer", [(device, host)], [slot.free])
    updated = transfers.compute("update", lambda: None, [came])
    left = transfers.to_host("layer", [(device, host)], [updated, came])
    transfers.wait(left)
    left.wait()
    transfers.harvest()
    assert [name for name, _ in fake_cuda.calls].count("Stream") == 2
    assert {index for _, index in fake_cuda.calls} == {1} and fake_cuda.current == 0
    assert {"Stream", "current_stream", "wait"} <= {name for name, _ in fake_cuda.calls}


def test_mapped_memory_is_copied_on_a_stream_of_that_device(fake_cuda: FakeCuda):
    transfers = TransferEngine(OTHER, mapped=True)
    tensor = torch.zeros(64, dtype=torch.uint8)
    transfers.to_host("layer", [(tensor, tensor.clone())], [transfers.allocated(tensor)])
    del transfers
    gc.collect()  # the threads end
    assert fake_cuda.devices("Stream") == fake_cuda.devices("current_stream") == {1}


def test_host_memory_is_registered_and_released_on_that_device(fake_cuda: FakeCuda):
    store = LayerStateStore([100, 0, 5000], OTHER)
    assert fake_cuda.calls == [("synchronize", 1), ("register", 1)] * 2
    fake_cuda.calls.clear()
    del store
    gc.collect()
    assert fake_cuda.calls == [("synchronize", 1), ("unregister", 1)] * 2 and fake_cuda.current == 0


def test_the_sums_of_a_probe_are_registered_for_that_device(fake_cuda: FakeCuda):
    sums = HostSums({"a": torch.Size([3, 2]), "b": torch.Size([]), "c": torch.Size([0])}, OTHER)
    assert fake_cuda.calls == [("synchronize", 1), ("register", 1)]
    parts = torch.arange(6.0).view(3, 2), torch.full((3, 2), 10.0)
    assert sums.add("a", parts[0], last=False) is None and sums.add("b", torch.tensor(7.0), last=False) is None
    whole = sums.add("a", parts[1], last=True)
    assert whole is not None and torch.equal(whole, parts[0] + parts[1]) and sums.pending() == ["b"]


@pytest.mark.parametrize(("device", "expected"), [(OTHER, 1), (CPU, 0), (None, 0)])
def test_ranks_communicate_on_the_device_of_the_model(device, expected, fake_cuda: FakeCuda, monkeypatch):
    seen = []

    def gather(items: list[Any], item: Any, group: Any) -> None:
        seen.append(fake_cuda.current)
        items[:] = [item]

    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    monkeypatch.setattr(dist, "get_world_size", lambda group: 1)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    ranks = Ranks(object(), device)  # type: ignore[arg-type]
    assert ranks.gather_objects("x") == ["x"] and seen == [expected] and fake_cuda.current == 0
    assert ranks._wire_device() == torch.device("cuda", expected)


def test_the_device_of_a_model_is_that_of_its_parameters():
    with FakeTensorMode():
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ParameterList([torch.zeros(2, device=OTHER)])})
        assert device_of(model) == OTHER and device_of(model["a"]) == CPU
        assert SingleBackend(model, 1).ranks.device == OTHER


def test_the_random_numbers_of_a_rank_are_of_its_models_device(fake_cuda: FakeCuda, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: asked.append(device) or torch.zeros(16).byte())
    per_rank.per_rank_pieces({"measured": {"rows": []}}, Ranks(None, OTHER))
    assert asked == [OTHER]


def test_a_rank_takes_the_gpu_of_its_number_and_sees_where_it_is(fake_cuda: FakeCuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: setattr(fake_cuda, "current", index))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"GPU-{index}"))
    device = _take_device(ProcessPlace("torchrun", 3, 1, 4))
    assert device == OTHER and fake_cuda.current == 1
    seat = own_seat(1, device)
    assert (seat.device, seat.visible) == ("GPU-1", ("GPU-0", "GPU-1"))
    with pytest.raises(GrassError, match=r"^rank 2 is number 2 on its host, which has 2 GPUs; "):
        _take_device(ProcessPlace("torchrun", 2, 2, 4))


def test_the_free_memory_is_that_of_the_device_of_the_model(fake_cuda: FakeCuda, monkeypatch):
    reserved, allocated, free = {OTHER: 70}, {OTHER: 30}, {OTHER: (1000, 5000)}
    monkeypatch.setattr(torch.cuda, "memory_reserved", reserved.__getitem__)
    monkeypatch.setattr(torch.cuda, "memory_allocated", allocated.__getitem__)
    monkeypatch.setattr(torch.cuda, "mem_get_info", free.__getitem__)
    assert _free_device(OTHER) == 1040 and _free_device(CPU) == 0


# --- memory that CUDA does not register


@pytest.mark.parametrize("binding", [True, False], ids=["cudaGetLastError", "a kernel"])
def test_a_failed_registration_leaves_no_error_for_other_kernels(binding, fake_cuda: FakeCuda, monkeypatch):
    if not binding:
        del fake_cuda.cudart.cudaGetLastError
        monkeypatch.setattr(torch, "zeros", fake_cuda.launch)
    fake_cuda.register_status = 2
    with pytest.raises(GrassError) as refusal:
        LayerStateStore([4096], OTHER)
    assert str(refusal.value) == (
        "4,096 bytes of host memory for a layer's state cannot be pinned (CUDA error 2); allow this process to lock "
        "that much, or use grass.offload.folder, or grass.offload.mode='none'."
    )
    assert not fake_cuda.pending and fake_cuda.calls[-1] == ("last error" if binding else "launch", 1)


class TwoRanks(Ranks):
    """As if there were another rank, which reports what is put into ``theirs``."""

    theirs: str | None = None

    def gather_objects(self, item: Any) -> list[Any]:
        return [item, (self.theirs, item[1])] if isinstance(item, tuple) else [item, item]


class OneOfTwo(SingleBackend):
    def __init__(self, model: nn.Module, accumulation_steps: int) -> None:
        super().__init__(model, accumulation_steps, Sharding(TwoRanks()))


@pytest.mark.parametrize("mine", [True, False], ids=["this rank", "the other rank"])
def test_a_rank_that_lacks_memory_for_the_probe_ends_all(mine, monkeypatch):
    def no_memory(shapes: Any, device: torch.device) -> None:
        raise GrassError("4,096 bytes of host memory cannot be pinned.")

    monkeypatch.setattr("grass_dist.construction.backend_for", OneOfTwo)
    config = GrassConfig(active_layers=2, probe_steps=2, offload={"mode": "none"})
    if mine:
        monkeypatch.setattr("grass_dist.backends.base.HostSums", no_memory)
        said = r"^4,096 bytes of host memory cannot be pinned\.$"
    else:
        monkeypatch.setattr(OneOfTwo, "set_trainable", set_after(OneOfTwo.set_trainable, "rank 1: 4,096 bytes"))
        said = r"^rank 1: 4,096 bytes$"
    with pytest.raises(GrassError, match=said) as refusal:
        GrassOptimizer(tiny(), torch.optim.AdamW, {}, config=config, gradient_accumulation_steps=2)
    assert refusal.value.on_every_rank


def set_after(method: Any, problem: str) -> Any:
    def changed(self: OneOfTwo, *args: Any, **kwargs: Any) -> None:
        method(self, *args, **kwargs)
        self.ranks.theirs = problem  # type: ignore[attr-defined]

    return changed


# --- models that are spread over devices


def test_layers_on_several_devices_are_refused_by_name():
    model = tiny()
    model.layers[5].up.to("meta")
    with pytest.raises(UnsupportedModel) as refusal:
        GrassOptimizer(model, torch.optim.AdamW, {}, config=GrassConfig(active_layers=2))
    assert str(refusal.value) == (
        "Parameters that train are on several devices (layers.0.norm.weight on cpu, layers.5.up.weight on meta); "
        "grass_dist trains layers that are all on one device of each rank: load the model without device_map, and if "
        "it does not fit there, shard it by fully_shard or ZeRO-3."
    )


def test_what_never_trains_may_be_on_another_device():
    model = tiny()
    model.head.to("meta")
    config = GrassConfig(active_layers=2, always_active=["embeddings"])
    optimizer = GrassOptimizer(model, torch.optim.AdamW, {}, config=config)
    assert [unit.name for unit in optimizer.grass.roles] == ["embeddings"] and not model.head.weight.requires_grad


class Mesh:
    device_type = "cuda"


@pytest.mark.parametrize("release", ["2.9.1", "2.12.1+cu130", "2.13.0.dev20260401"])
def test_sharded_host_weights_are_refused_with_unfinished_copies(release):
    version = torch.torch_version.TorchVersion(release)
    said = rf"CPUOffloadPolicy.* torch {re.escape(release)} .*install torch 2\.13 or later"
    with pytest.raises(UnsupportedModel, match=said):
        check_offloaded_weights([Mesh()], [CPU, CPU], version)  # type: ignore[list-item]
    check_offloaded_weights([Mesh()], [torch.device("cuda:0")], version)  # type: ignore[list-item]
    for later in ("2.13.0", "2.13.1+cpu", "2.14.0"):
        check_offloaded_weights([Mesh()], [CPU], torch.torch_version.TorchVersion(later))  # type: ignore[list-item]


# --- what is loaded


KINDS = [
    (torch.optim.AdamW, {}, "cpu"),
    (torch.optim.AdamW, {"foreach": True}, "cpu"),
    (torch.optim.AdamW, {"fused": True}, "cuda:1"),
    (torch.optim.AdamW, {"capturable": True}, "cuda:1"),
    (torch.optim.NAdam, {}, "cpu"),
    (torch.optim.NAdam, {"capturable": True}, "cuda:1"),
    (torch.optim.Adagrad, {}, "cpu"),
]


@pytest.mark.parametrize("comes_from", ["cpu", "cuda:1", "cuda:0"])
@pytest.mark.parametrize(("cls", "kwargs", "counts"), KINDS, ids=lambda part: getattr(part, "__name__", str(part)))
def test_a_loaded_state_is_on_the_device_that_its_class_uses(cls, kwargs, counts, comes_from):
    with FakeTensorMode(shape_env=ShapeEnv()):
        param = nn.Parameter(torch.zeros(4, 3, device=OTHER))
        unit = Unit("unit", 0, (("weight", param),))
        optimizer = UnitOptimizer(unit, [0], cls, kwargs, Sharding(Ranks()))
        stock = cls([nn.Parameter(torch.zeros(4, 3, device=OTHER))], **kwargs)
        groups = [{**{k: v for k, v in stock.param_groups[0].items() if k != "params"}, "params": [param]}]
        param.grad = torch.zeros_like(param)
        optimizer.step(groups)
        own = optimizer.state_of(0)
        assert own["step"].device == torch.device(counts)

        moved = {key: value.to(comes_from) for key, value in own.items()}
        optimizer.load_state([moved], groups)
        loaded = optimizer.state_of(0)
        assert {k: (v.device, v.dtype) for k, v in loaded.items()} == {k: (v.device, v.dtype) for k, v in own.items()}
        optimizer.step(groups)  # torch's fake tensors refuse what CUDA would crash on


def test_a_class_that_says_nothing_keeps_its_step_like_torchs():
    class Unwilling(torch.optim.AdamW):
        def step(self, closure=None):
            raise RuntimeError("a closure is needed")

    with FakeTensorMode():
        for kwargs, device in (({}, CPU), ({"capturable": True}, OTHER)):
            param = nn.Parameter(torch.zeros(4, 3, device=OTHER))
            unit = Unit("unit", 0, (("weight", param),))
            optimizer = UnitOptimizer(unit, [0], Unwilling, kwargs, Sharding(Ranks()))
            moment = torch.zeros(4, 3, device="cuda:0")
            optimizer.load_state(
                [{"step": torch.zeros((), device="cuda:0"), "exp_avg": moment}], [{"lr": 0.1, **kwargs}]
            )
            state = optimizer.state_of(0)
            assert (state["step"].device, state["exp_avg"].device) == (device, OTHER)


@pytest.mark.parametrize("mode", ["none", "interval"])
def test_how_the_user_has_an_optimizer_compute_survives_a_load(mode):
    trained = {}
    for name, kwargs in {"plain": {}, "fused": {"fused": True}, "looped": {"foreach": False}}.items():
        model, optimizer = make({"mode": mode}, kwargs={"lr": 1e-2, **kwargs})
        take_steps(model, optimizer, range(6))
        trained[name] = (model, optimizer, kwargs)
    for _, optimizer, _ in trained.values():
        for _, other, _ in trained.values():
            lr = optimizer.param_groups[0]["lr"] = 0.5
            other.load_state_dict(optimizer.state_dict())
            assert other.param_groups[0]["lr"] == lr
    for model, optimizer, kwargs in trained.values():
        flags = {key: optimizer.param_groups[0][key] for key in ("fused", "foreach")}
        assert flags == {"fused": None, "foreach": None, **kwargs}
        take_steps(model, optimizer, range(6, 8))
