"""What `GrassOptimizer` takes, what it refuses, and that a model is as it was afterwards."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from grass_dist import ConfigError, GrassConfig, GrassError, GrassOptimizer, UnsupportedModel
from tests.tiny import loss_of, take_steps, tiny

ALL: dict[str, Any] = {"active_layers": 8, "probe_steps": 0}
LR = {"lr": 1e-2}


def grass(model: nn.Module, optimizer_class: Any = torch.optim.AdamW, kwargs: Any = LR, **more: Any) -> GrassOptimizer:
    return GrassOptimizer(model, optimizer_class, kwargs, **{"config": GrassConfig(active_layers=2), **more})


def same_weights(ours: nn.Module, theirs: nn.Module) -> bool:
    return all(map(torch.equal, ours.parameters(), theirs.parameters()))


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# --- in which forms arguments are taken


def decay(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if p.ndim == 2], "weight_decay": 0.1},
        {"params": ((n, p) for n, p in named if p.ndim == 1), "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("groups", [nn.Module.named_parameters, decay], ids=["names", "groups with names"])
def test_named_parameters_train_as_with_the_stock_optimizer(groups):
    model, plain = tiny(), tiny()
    ours, stock = grass(model, params=groups(model), config=ALL), torch.optim.AdamW(groups(plain), **LR)
    take_steps(model, ours, range(4))
    take_steps(plain, stock, range(4))
    assert same_weights(model, plain)
    assert [g["param_names"] for g in ours.param_groups] == [g["param_names"] for g in stock.param_groups]
    ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert [g["param_names"] for g in ours.param_groups] == [g["param_names"] for g in stock.param_groups]


@pytest.mark.parametrize(
    ("given", "kwargs"),
    [("AdamW", LR), (partial(torch.optim.AdamW, **LR), None), (partial(partial(torch.optim.AdamW, lr=3.0)), LR)],
    ids=["name", "partial", "partial, and an argument that replaces its own"],
)
def test_a_class_may_be_named_or_partial(given, kwargs):
    model, plain = tiny(), tiny()
    take_steps(model, grass(model, given, kwargs, config=ALL), range(3))
    take_steps(plain, torch.optim.AdamW(plain.parameters(), **LR), range(3))
    assert same_weights(model, plain)


WRONG: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "config": (
        lambda model: grass(model, config={"active_layer": 2}),
        "active_layer=2: there is no such setting; did you mean 'active_layers'",
    ),
    "config type": (lambda model: grass(model, config=2), "config='int': it is neither a GrassConfig nor a dict"),
    "class name": (
        lambda model: grass(model, "Adamw"),
        "optimizer_class='Adamw': torch.optim has no optimizer of that name; did you mean 'AdamW'",
    ),
    "no class": (lambda model: grass(model, torch.optim), "optimizer_class=.*: it is no class of optimizers; pass"),
    "an optimizer": (
        lambda model: grass(model, torch.optim.SGD(model.parameters())),
        "optimizer_class=.*: it is no class of optimizers",
    ),
    "partial": (lambda model: grass(model, partial(torch.optim.AdamW, 0.1)), "optimizer_class=.*pass them by name"),
    "kwargs": (lambda model: grass(model, kwargs=0.1), r"optimizer_kwargs='0\.1': it is no mapping of arguments"),
    "one tensor": (
        lambda model: grass(model, params=next(model.parameters())),
        "params='Parameter': it is no list of parameters or groups",
    ),
    "not a parameter": (lambda model: grass(model, params=[1]), r"params\[0\]='1': entry 0 is a int and no parameter"),
    "a set": (lambda model: grass(model, params=[{"params": set(model.parameters())}]), r"params\[0\]='a set': "),
    "a stranger": (
        lambda model: grass(model, params=[*model.named_parameters(), ("critic", nn.Parameter(torch.zeros(3)))]),
        r"params='critic of shape \(3,\)': the model that GrassOptimizer was given has no such parameters",
    ),
    "micro-batches": (
        lambda model: grass(model, gradient_accumulation_steps=None),
        "gradient_accumulation_steps=None: is no whole number; use 1 or more",
    ),
    "true micro-batches": (
        lambda model: grass(model, gradient_accumulation_steps=True),
        "gradient_accumulation_steps=True: is no whole number; use 1 or more",
    ),
    "states": (
        lambda model: grass(model, shard_states="no"),
        "shard_states='no': is neither True nor False; use one of them",
    ),
    "observers": (
        lambda model: grass(model, observers=5),
        "observers='5': it is no list; pass a list of functions of one argument, the event",
    ),
    "no observer": (lambda model: grass(model, observers=[print, 5]), r"observers\[1\]='5': it cannot be called; pass"),
    "learning rate": (lambda model: grass(model, kwargs={"lr": -1.0}), "Invalid learning rate"),
    "closure": (
        lambda model: grass(model, torch.optim.LBFGS),
        r"optimizer_class='LBFGS': its step\(\) needs a closure that computes the loss again",
    ),
    "layers": (lambda model: grass(model, config={"active_layers": 9}), "active_layers=9: the model has 8 layers"),
    "offload": (
        lambda model: grass(model, torch.optim.Adafactor, config={"active_layers": 2, "offload": {"folder": "/proc"}}),
        "offload.folder=",
    ),
    "observer": (
        lambda model: grass(model, config={**ALL, "active_layers": 7}, observers=[lambda event: 1 / 0]),
        "division by zero",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_refusal_is_one_sentence_and_leaves_the_model_alone(case):
    model, plain = tiny(), tiny()
    model.layers[3].requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    make, sentence = WRONG[case]
    with pytest.raises(Exception, match=sentence) as refusal:
        make(model)
    assert "\n" not in str(refusal.value)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    model.layers[3].requires_grad_(True)
    take_steps(model, grass(model, config=ALL), range(3))
    take_steps(plain, torch.optim.AdamW(plain.parameters(), **LR), range(3))
    assert same_weights(model, plain)


def test_what_is_no_model_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"model='\[\]': it is no nn\.Module; pass the model, wrapped as it trains"):
        grass([])  # type: ignore[arg-type]


def test_a_model_without_memory_is_refused_in_words():
    with torch.device("meta"):
        model = tiny()
    with pytest.raises(
        UnsupportedModel, match=r"have no memory \(layers\.0\.\S+ is on the meta device\): call model\.to"
    ):
        grass(model)


# --- parameters that GRASS does not train


def test_another_optimizer_trains_what_was_not_passed():
    model, plain = tiny(), tiny()

    def two(model: nn.Module, make: Callable[[Any], Any]) -> list[Any]:
        rest = [p for n, p in model.named_parameters() if not n.startswith("layers.")]
        return [make(list(model.layers.parameters())), torch.optim.SGD(rest, lr=0.1)]

    ours = two(model, lambda params: grass(model, params=params, config=ALL))
    theirs = two(plain, lambda params: torch.optim.AdamW(params, **LR))
    for step in range(4):
        for trained, optimizers in ((model, ours), (plain, theirs)):
            loss_of(trained, step).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert same_weights(model, plain) and not torch.equal(model.head.weight, tiny().head.weight)


@pytest.mark.parametrize("probe", [0, 6])
def test_what_is_unfrozen_later_is_frozen_again_and_said(probe, caplog):
    def trained(unfreeze: bool) -> nn.Module:
        model = tiny()
        model.norm.requires_grad_(False)  # by the user, before the start
        config = GrassConfig(active_layers=2, probe_steps=probe, sampling_interval=3, update_interval=3)
        optimizer = grass(model, config=config)
        for step in range(6):
            if unfreeze:
                model.requires_grad_(True)
            loss_of(model, step).backward()
            optimizer.step()
            on = {name.split(".")[1] for name, p in model.layers.named_parameters("layers") if p.requires_grad}
            assert {int(number) for number in on} == set(optimizer.grass.active_layers)
            assert not model.norm.weight.requires_grad
            assert all(p.requires_grad or p.grad is None for p in model.parameters())
            optimizer.zero_grad()
        return model

    with caplog.at_level(logging.WARNING, "grass_dist"):
        assert same_weights(trained(unfreeze=True), trained(unfreeze=False))
    told = [record.message for record in caplog.records if "unfrozen" in record.message]
    assert len(told) == 1 and "parameters of the optimizer were unfrozen before step 1 and are frozen again" in told[0]


ROUNDS = {"active_layers": 2, "sampling_interval": 3, "update_interval": 3}
FIXED = {"sampler": "fixed", "fixed_layers": (3, 6)}


@pytest.mark.parametrize(("probe", "at", "draw"), [(0, 1, 3), (0, 3, 6), (2, 1, 2)])
@pytest.mark.parametrize("mode", ["none", "interval"])
def test_what_is_frozen_later_stays_frozen_until_a_draw_refuses(mode, probe, at, draw):
    model = tiny()
    optimizer = grass(model, config={**ROUNDS, "draw_ahead": 0, "probe_steps": probe, "offload": {"mode": mode}})
    take_steps(model, optimizer, range(at))
    layer = optimizer.grass.active_layers[0]
    frozen = model.layers[layer].up.weight.requires_grad_(False)
    before = frozen.detach().clone()
    take_steps(model, optimizer, range(at, draw - 1))
    with pytest.raises(
        GrassError, match=rf"^1 parameters .* after it was made \(layers\.{layer}\.up\.weight\), .*before"
    ):
        take_steps(model, optimizer, range(draw - 1, draw))
    assert torch.equal(frozen, before) and not frozen.requires_grad


def test_a_layer_frozen_between_draw_and_switch_is_refused():
    model = tiny()
    optimizer = grass(model, config={**ROUNDS, "probe_steps": 0, "draw_ahead": 1, **FIXED})
    take_steps(model, optimizer, range(2))  # layers are drawn after two steps, and switched to after three
    frozen = model.layers[3].norm.weight.requires_grad_(False)
    before = frozen.detach().clone()
    take_steps(model, optimizer, range(2, 4))
    with pytest.raises(GrassError, match=r"\(layers\.3\.norm\.weight\)"):
        take_steps(model, optimizer, range(4, 5))
    assert torch.equal(frozen, before)


def test_a_state_is_not_loaded_over_what_was_frozen_later():
    model = tiny()
    optimizer = grass(model)
    state = optimizer.state_dict()
    model.layers[2].requires_grad_(False)
    bool(optimizer.state)  # as torch's distributed checkpoint asks, which shows every parameter
    with pytest.raises(GrassError, match=r"6 parameters .* \(layers\.2\.norm\.weight, "):
        optimizer.load_state_dict(state)
    assert not any(p.requires_grad for p in model.layers[2].parameters())


@pytest.mark.parametrize("kind", ["plain", "ddp", "fsdp2"])
@pytest.mark.parametrize("offload", [{"mode": "none"}, {"mode": "stream", "slots": 2}], ids=str)
def test_a_model_outlives_its_optimizer(kind, offload, one_rank):
    model = tiny()
    model.layers[3].requires_grad_(False)
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (1,))
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh)
    elif kind == "ddp":
        model = DistributedDataParallel(model)
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    config = GrassConfig(active_layers=3, probe_steps=1, sampling_interval=2, update_interval=2, offload=offload)
    for _ in range(2):  # and another optimizer may follow
        optimizer = grass(model, config=config)
        take_steps(model, optimizer, range(4))
        assert [p.requires_grad for p in model.parameters()] != flags
        del optimizer
        gc.collect()
        assert [p.requires_grad for p in model.parameters()] == flags
        assert [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()] == hooks


# --- made in another order, or sharded in another way


def sharded(model: nn.Module, **kwargs: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, **kwargs)
    return model


@pytest.mark.parametrize("probe", [0, 2])
@pytest.mark.parametrize("later", ["ddp", "ddp of more", "fully_shard", "assigned"])
def test_a_model_that_is_wrapped_later_is_refused(later, probe, one_rank):
    model = tiny()
    optimizer = grass(model, config=GrassConfig(active_layers=2, probe_steps=probe))
    trained: Any = model
    if later.startswith("ddp"):
        whole = model if later == "ddp" else nn.Sequential(model)
        trained = DistributedDataParallel(whole, find_unused_parameters=True)
        sentence = r"inside a DistributedDataParallel, which was made after the optimizer .*: call GrassOptimizer\(Dist"
    elif later == "fully_shard":
        trained = sharded(model)
        sentence = (
            r"^fully_shard was called after GrassOptimizer was made, so \d+ parameters .*make the optimizer after"
        )
    else:
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        sentence = r"^Something has replaced parameters of the model after GrassOptimizer was made, so "
    before = [p.detach().clone() for p in optimizer._trained]
    loss_of(trained, 0).backward()
    with pytest.raises(UnsupportedModel, match=sentence):
        optimizer.step()
    assert all(map(torch.equal, before, optimizer._trained))


def test_an_old_wrapper_that_nobody_uses_is_no_matter(one_rank):
    model, plain = tiny(), tiny()
    wrapper = DistributedDataParallel(model)
    wrapper.itself = [wrapper]  # type: ignore[assignment]
    other = DistributedDataParallel(tiny())
    del wrapper
    take_steps(model, grass(model, config=ALL), range(2))
    take_steps(plain, torch.optim.AdamW(plain.parameters(), **LR), range(2))
    assert same_weights(model, plain) and other is not None


def test_ignored_parameters_are_named_and_may_be_frozen(one_rank):
    def ignoring() -> nn.Module:
        model = tiny()
        return sharded(model, ignored_params={*model.norm.parameters()})

    with pytest.raises(
        UnsupportedModel, match=r"2 parameters are not sharded .* \(norm\.weight, \.\.\.\).* ignored_params"
    ):
        grass(ignoring())
    model, plain = ignoring(), tiny()
    for frozen in (model, plain):
        frozen.norm.requires_grad_(False)
    ours = grass(model, config=ALL)
    take_steps(model, ours, range(3))
    take_steps(plain, torch.optim.AdamW(plain.parameters(), **LR), range(3))
    assert all(
        torch.equal(p.full_tensor() if hasattr(p, "full_tensor") else p, q)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True)
    )
    assert len(ours.holdings().weights()) == len(list(model.parameters()))


def test_shards_may_be_columns(one_rank):
    model, plain = sharded(tiny(), shard_placement_fn=lambda param: Shard(param.ndim - 1)), tiny()
    ours = grass(model, config=ALL)
    take_steps(model, ours, range(3))
    take_steps(plain, torch.optim.AdamW(plain.parameters(), **LR), range(3))
    assert all(torch.equal(p.full_tensor(), q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
