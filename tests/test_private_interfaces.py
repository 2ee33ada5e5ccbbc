"""Fails when an interface of another library changes that grass_dist leans on without its being documented."""

import inspect

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from grass_dist import GrassConfig, GrassOptimizer
from grass_dist.backends.ddp import comm_hooks
from grass_dist.backends.fsdp2 import _alone, forget_unreduced, reduce_dtype
from grass_dist.backends.scaling import asking_scaler
from grass_dist.model.backward import at_end_of_backward, in_backward
from grass_dist.states.update_rule import step_unseen
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


def test_ddp_tells_which_hooks_it_would_call(caplog):
    def check() -> tuple[list[str], int]:
        model = DistributedDataParallel(tiny())
        assert comm_hooks(model) == []
        optimizer = GrassOptimizer(model, torch.optim.SGD, {"lr": 0.1}, config=GrassConfig(active_layers=1))
        model.register_comm_hook(None, allreduce_hook)
        for step in range(2):
            loss_of(model, step).backward()
            optimizer.step()
        return comm_hooks(model), caplog.text.count("communication hook allreduce_hook")

    assert in_a_world_of_one(check) == (["allreduce_hook"], 1)


def test_the_flag_that_ddp_s_forward_leaves_decides_on_buffers():
    """DdpBackend sets `require_forward_param_sync` after a forward, as DDP does where it synchronises."""

    def check() -> list[bool]:
        bare = tiny()
        bare.register_buffer("count", torch.zeros(()))
        model, told = DistributedDataParallel(bare), []
        for sync in (True, False):
            model.require_backward_grad_sync = sync
            loss_of(model, 0)
            told += [model.require_forward_param_sync, model.will_sync_module_buffers()]
        model.require_forward_param_sync = True
        return [*told, model.will_sync_module_buffers()]

    assert in_a_world_of_one(check) == [True, True, False, False, True]


def test_a_module_that_is_compiled_in_place_says_so():
    """`grass_dist.method.watch` puts no hooks on it."""
    module = torch.nn.Linear(2, 2)
    assert module._compiled_call_impl is None
    module.compile(backend="eager")
    assert module._compiled_call_impl is not None
    assert type(torch.compile(torch.nn.Linear(2, 2), backend="eager")).__name__ == "OptimizedModule"


def test_the_step_of_a_class_is_within_what_calls_the_hooks():
    class Mine(torch.optim.SGD):
        def step(self, closure=None):
            return "mine"

    own = Mine.step
    assert not hasattr(own, "hooked")
    Mine([torch.nn.Parameter(torch.zeros(1))])
    assert Mine.step is not own and Mine.step.hooked and Mine.step.__wrapped__ is own
    seen = []
    handle = register_optimizer_step_pre_hook(lambda *_: seen.append(1))
    try:
        optimizer = Mine([torch.nn.Parameter(torch.zeros(1))])
        step_unseen(optimizer)
        assert seen == []
        assert optimizer.step() == "mine" and seen == [1]
    finally:
        handle.remove()


@pytest.mark.parametrize("policy", [{}, {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}], ids=str)
def test_fsdp2_forgets_gradients_that_it_has_not_reduced(policy):
    def grads(*, dropped):
        model, mesh = tiny(), dist.device_mesh.init_device_mesh("cpu", (1,))
        modules = [*model.layers, model]
        for module in modules:
            fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy))
        if dropped:
            model.set_requires_gradient_sync(False)
            loss_of(model, 1).backward()
            assert all(p.grad is None for p in model.parameters())
            forget_unreduced(modules)
            model.set_requires_gradient_sync(True)
        loss_of(model, 0).backward()
        return [p.grad.to_local().clone() for p in model.parameters()]

    def check():
        assert all(map(torch.equal, grads(dropped=True), grads(dropped=False)))

    in_a_world_of_one(check)


def test_a_scaler_shows_itself_before_it_unscales():
    shown = []

    class Asked(torch.optim.SGD):
        @property
        def _step_supports_amp_scaling(self):
            shown.append((asking_scaler(), param.grad.item()))
            return False

    param = torch.nn.Parameter(torch.ones(()))
    optimizer, scaler = Asked([param]), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(param * 3).backward()
    scaler.step(optimizer)
    assert shown == [(scaler, 12.0)] and param.grad == 3
    assert optimizer._step_supports_amp_scaling is False and shown[1][0] is None


def test_autograd_tells_of_the_backward_that_runs():
    told = []
    x = torch.ones(2, requires_grad=True)
    y = x.exp()

    def hook(_):
        told.append(in_backward())
        at_end_of_backward(lambda: told.append("end"))

    y.register_hook(hook)
    x.register_hook(lambda _: told.append("after"))
    assert not in_backward()
    y.sum().backward()
    assert told == [True, "after", "end"] and not in_backward()


def test_many_tensors_take_one_operator():
    tensors = [torch.ones(3, dtype=torch.bfloat16), torch.full((2, 2), 2.0, dtype=torch.bfloat16)]
    norms = torch._foreach_norm(tensors, 2.0, dtype=torch.float64)
    assert [norm.dtype for norm in norms] == [torch.float64] * 2
    torch.testing.assert_close(torch.stack(list(norms)), torch.tensor([3.0**0.5, 4.0], dtype=torch.float64))
    wide = [torch.empty_like(tensor, dtype=torch.float32) for tensor in tensors]
    torch._foreach_copy_(wide, tensors)
    torch._foreach_mul_(tensors, torch.tensor(0.5))
    assert [tensor.flatten()[0].item() for tensor in (*wide, *tensors)] == [1.0, 2.0, 0.5, 1.0]
