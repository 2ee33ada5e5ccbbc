"""Fails when an interface of another library changes that grass_dist leans on without its being documented."""

import inspect

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from grass_dist.backends.fsdp2 import _alone, reduce_dtype
from tests.tiny import loss_of, tiny


def in_a_world_of_one(function):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return function()
    finally:
        dist.destroy_process_group()


def test_fsdp2_tells_its_reduce_dtype():
    def told(**policy):
        model = tiny()
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy))
        return reduce_dtype(model)

    def check():
        assert told() is None
        assert told(reduce_dtype=torch.float32) == torch.float32
        assert told(param_dtype=torch.bfloat16) == torch.bfloat16
        assert told(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) == torch.float32

    in_a_world_of_one(check)


def test_fsdp2_tells_which_modules_it_gathers_together():
    def check():
        model, mesh = tiny(), dist.device_mesh.init_device_mesh("cpu", (1,))
        for module in (*model.layers, [model.norm, model.head], model):
            fully_shard(module, mesh=mesh)
        sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        assert _alone(sharded, model) == [*model.layers, model] and len(sharded) == 8 + 2 + 1

    in_a_world_of_one(check)


def test_ddp_rests_when_it_is_told_not_to_synchronise():
    """DdpBackend sets `require_backward_grad_sync`, as DDP's own no_sync() does, for the length of a forward."""
    source = inspect.getsource(DistributedDataParallel.no_sync)
    assert "self.require_backward_grad_sync = False" in source

    def check():
        model = DistributedDataParallel(tiny())
        calls = []
        model.register_comm_hook(calls, lambda state, bucket: state.append(bucket) or torch.futures.Future())
        model.require_backward_grad_sync = False
        output = loss_of(model, 0)
        model.require_backward_grad_sync = True
        output.backward()
        return calls

    assert in_a_world_of_one(check) == []


def test_a_module_that_is_compiled_in_place_says_so():
    """`grass_dist.method.watch` puts no hooks on it."""
    module = torch.nn.Linear(2, 2)
    assert module._compiled_call_impl is None
    module.compile(backend="eager")
    assert module._compiled_call_impl is not None
    assert type(torch.compile(torch.nn.Linear(2, 2), backend="eager")).__name__ == "OptimizedModule"
