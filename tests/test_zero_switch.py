"""A ZeRO optimizer that is constructed again does nothing but construct, and DeepSpeed still has what this leans on."""

from __future__ import annotations

import importlib
import inspect
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

os.environ.setdefault("DS_ACCELERATOR", "cpu")
deepspeed = pytest.importorskip("deepspeed")

from grass_dist.backends.zero import switching  # noqa: E402
from grass_dist.backends.zero.private import stock_classes  # noqa: E402


def test_the_names_that_a_switch_exchanges_are_there():
    for module, names in switching.GLOBALS.items():
        own = vars(importlib.import_module(module))
        assert all(callable(own.get(name)) or inspect.ismodule(own.get(name)) for name in names)
    stage12, stage3 = map(inspect.getsource, stock_classes())
    assert (
        "empty_cache()" in stage12 and "self.reduction_stream = " in stage12 and "get_accelerator().Stream()" in stage12
    )
    assert "get_accelerator().synchronize()" in stage12[stage12.index("def destroy") :][:600]
    assert "self.lp_param_buffer = defragment(parameter_partitions)" in stage3 and "dist.barrier()" in stage3
    assert "self.reduce_and_partition_stream = " in stage3


def test_a_hook_needs_no_gathered_parameter():
    """The constructor gathers each parameter for it, which older releases of torch needed."""
    from deepspeed.runtime.zero import stage3
    from deepspeed.utils.torch import register_grad_hook

    made = inspect.getsource(stage3.DeepSpeedZeroOptimizer_Stage3.create_reduce_and_remove_grad_hooks)
    assert made.index("param.all_gather()") < made.index("register_grad_hook(") < made.index("param.partition()")
    param, seen = nn.Parameter(torch.empty(0)), []
    register_grad_hook(param, lambda own: seen.append(own.grad.clone()))
    param.data = torch.ones(3)  # as DeepSpeed gathers it
    (param * 2).sum().backward()
    assert [grad.tolist() for grad in seen] == [[2.0] * 3]


def test_flat_memory_is_as_deepspeed_makes_it():
    from deepspeed.runtime.zero.utils import defragment

    ours, theirs = ([torch.arange(float(size)) for size in (3, 0, 5)] for _ in range(2))
    flat, other = switching.flatten(ours), defragment(theirs)
    assert torch.equal(flat, other) and flat.device == other.device and flat.dtype == other.dtype
    for own, like in zip(ours, theirs, strict=True):
        assert torch.equal(own, like) and own.shape == like.shape
        assert own.data_ptr() - flat.data_ptr() == like.data_ptr() - other.data_ptr() or not own.numel()


def test_all_is_as_it_was_after_a_switch_that_fails(monkeypatch):
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    waited: list[Any] = []
    stream: Any = SimpleNamespace(name="reductions")
    current = SimpleNamespace(wait_stream=waited.append)
    monkeypatch.setattr(switching, "accelerator", lambda: SimpleNamespace(current_stream=lambda: current))
    param: Any = SimpleNamespace(all_gather=lambda: "gathered", partition=lambda: "cut")
    zero = SimpleNamespace(reduction_stream=stream)

    def names():
        return [vars(module).copy() for module in (stage3, stage_1_and_2)]

    def fail():
        with switching.nothing_but_constructing(zero, [param]):
            assert waited == [stream], "the compute waits for the reductions before their memory is freed"
            assert param.all_gather() is None and param.partition(has_been_updated=False) is None
            for module in (stage3, stage_1_and_2):
                accelerator = module.get_accelerator()
                assert accelerator.synchronize() is None and accelerator.Stream() is stream
                assert accelerator.device_name() == "cpu"
            assert stage3.dist.barrier() is None and callable(stage3.dist.all_reduce)
            assert stage_1_and_2.empty_cache() is None and stage3.defragment is switching.flatten
            raise ValueError

    before = names()
    with pytest.raises(ValueError):
        fail()
    assert names() == before and (param.all_gather(), param.partition()) == ("gathered", "cut")
