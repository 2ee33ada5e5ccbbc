"""An optimizer that is made by two ranks: what one of them passes wrongly, what is wrapped later, and what trains."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from grass_dist import GrassOptimizer
from integration_tests.support.scenarios import TWO, scenarios
from tests import update_rules as rules
from tests.tiny import loss_of, tiny

pytestmark = pytest.mark.timeout(420)

ALL: dict[str, Any] = {"active_layers": 4, "probe_steps": 0}
ODD = {"layers": 4, "width": 5, "vocab": 17}  # shards of different sizes


def wrapped(kind: str, model: nn.Module | None = None, **kwargs: Any) -> nn.Module:
    model = model or tiny(**ODD)
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, **kwargs)
    return model


def grass(model: Any, cls: Any = torch.optim.AdamW, kwargs: Any = None, **more: Any) -> GrassOptimizer:
    return GrassOptimizer(model, cls, kwargs, **{"config": ALL, **more})


def whole(model: nn.Module) -> list[torch.Tensor]:
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [weight.detach().clone() for weight in weights]


def train(model: nn.Module, rank: int, *optimizers: torch.optim.Optimizer, steps: int = 5) -> list[torch.Tensor]:
    for step in range(steps):
        loss_of(model, 2 * step + rank).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return whole(model)


def said(make: Callable[[], Any]) -> str:
    try:
        make()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


# --- one rank passes something wrong


def broken_observer(event: object) -> None:
    raise OSError("disk full")


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "config": ("active_layer=4: there is no such setting", {"config": {"active_layer": 4}}),
    "class": ("optimizer_class='AdamX': torch.optim has no optimizer of that name", {"cls": "AdamX"}),
    "closure": ("optimizer_class='LBFGS': its step() needs a closure", {"cls": torch.optim.LBFGS}),
    "mixing": ("optimizer_class='Adapting': its update of a parameter depends", {"cls": rules.Adapting}),
    "kwargs": ("optimizer_kwargs='3': it is no mapping", {"kwargs": 3}),
    "learning rate": ("Invalid learning rate: -1.0", {"kwargs": {"lr": -1.0}}),
    "params": ("params='number 0 of group 0 of shape (3,)'", {"params": [nn.Parameter(torch.zeros(3))]}),
    "params type": ("params[0]='1': entry 0 is a int", {"params": [1]}),
    "micro-batches": ("gradient_accumulation_steps=0: is below 1", {"gradient_accumulation_steps": 0}),
    "true micro-batches": (
        "gradient_accumulation_steps=True: is no whole number",
        {"gradient_accumulation_steps": True},
    ),
    "states": ("shard_states='no': is neither True nor False", {"shard_states": "no"}),
    "observers": ("observers='5': it is no list", {"observers": 5}),
    "model": ("model='None': it is no nn.Module", {"model": None}),
    "observer": ("disk full", {"observers": [broken_observer]}),
}


def wrong_on_rank_1(rank: int, world_size: int, kind: str) -> dict[str, Any]:
    sentences = {}
    model = wrapped(kind)
    flags = [p.requires_grad for p in model.parameters()]
    for case, (_, arguments) in WRONG.items():
        sentences[case] = said(lambda given=arguments: grass(**{"model": model, **(given if rank == 1 else {})}))
    plain = wrapped(kind)
    return {
        "sentences": sentences,
        "as before": [p.requires_grad for p in model.parameters()] == flags,
        "ours": train(model, rank, grass(model)),
        "stock": train(plain, rank, torch.optim.AdamW(plain.parameters())),
    }


@scenarios(TWO(wrong_on_rank_1, "ddp"), TWO(wrong_on_rank_1, "fsdp2"))
def test_a_bad_argument_on_one_rank_is_told_on_all(runs):
    for case, (sentence, _) in WRONG.items():
        first, second = runs[0]["sentences"][case], runs[1]["sentences"][case]
        assert first.startswith("GrassError: rank 1: ") and sentence in first, (case, first)
        assert sentence in second and "\n" not in first + second, (case, second)
    for run in runs:
        assert run["as before"] and all(map(torch.allclose, run["ours"], run["stock"]))


def refused_on_both(rank: int, world_size: int) -> dict[str, str]:
    def sparse() -> nn.Module:
        model = tiny(**ODD)
        model.layers[1].table = nn.Embedding(4, 5, sparse=True)
        return model

    def ignoring() -> nn.Module:
        model = tiny(**ODD)
        return wrapped("fsdp2", model, ignored_params={*model.norm.parameters()})

    layers = lambda model: [p for n, p in model.named_parameters() if "layers." in n]  # noqa: E731
    return {
        "ignored": said(lambda: grass(ignoring())),
        "sparse": said(lambda: grass(wrapped("ddp", sparse()), torch.optim.SGD)),
        "others": said(lambda: grass(ddp := wrapped("ddp"), params=layers(ddp))),
    }


@scenarios(TWO(refused_on_both))
def test_what_would_not_be_averaged_is_refused(runs):
    assert runs[0] == runs[1]
    assert "norm.weight" in runs[0]["ignored"] and "ignored_params" in runs[0]["ignored"]
    assert runs[0]["sparse"].startswith("UnsupportedModel: module.layers.1.table.weight will have sparse gradients: ")
    assert runs[0]["others"].startswith("ConfigError: params='module.embed.weight, ")


# --- wrapped after the optimizer was made


def wrapped_later(rank: int, world_size: int) -> tuple[dict[str, str], list[str]]:
    sentences, told = {}, io.StringIO()
    logging.getLogger("grass_dist").addHandler(logging.StreamHandler(told))
    for kind in ("ddp", "fsdp2"):
        for probe in (0, 2):
            model = tiny(**ODD)
            optimizer = grass(model, config={"active_layers": 2, "probe_steps": probe})
            if kind == "ddp":
                trained = DistributedDataParallel(model, find_unused_parameters=True)
            else:
                trained = wrapped(kind, model)
            sentences[f"{kind} {probe}"] = said(lambda m=trained, o=optimizer: train(m, rank, o, steps=1))
    return sentences, [line for line in told.getvalue().splitlines() if "wrapped in nothing" in line]


@scenarios(TWO(wrapped_later))
def test_a_model_that_is_wrapped_later_is_refused_on_all(runs):
    (first, told), (second, not_told) = runs
    assert first == second
    assert len(told) == 4 and "each of the 2 ranks trains it alone" in told[0] and not not_told
    for case, sentence in first.items():
        what = "is inside a DistributedDataParallel" if "ddp" in case else "fully_shard was called after GrassOptimizer"
        assert sentence.startswith("UnsupportedModel: ") and what in sentence


# --- what trains


def as_stock(rank: int, world_size: int, kind: str, cls: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for shard_states in (True, False):
        model, plain = wrapped(kind), wrapped(kind)
        ours, stock = grass(model, cls, shard_states=shard_states), cls(plain.parameters())
        out[f"ours {shard_states}"] = train(model, rank, ours)
        out["stock"] = train(plain, rank, stock)
        state = ours.state_dict()["state"].values()
        out[f"entries {shard_states}"] = sum(v.numel() for own in state for v in own.values() if torch.is_tensor(v))
        out["groups"] = [{k: v for k, v in o.param_groups[0].items() if k != "params"} for o in (ours, stock)]
    return out


@scenarios(
    *(TWO(as_stock, kind, cls) for kind in ("ddp", "fsdp2") for cls in (rules.Lion, rules.Halving, rules.Counting))
)
def test_a_class_of_ones_own_trains_as_stock(runs):
    for run in runs:
        for shard_states in (True, False):
            assert all(map(torch.equal, run[f"ours {shard_states}"], runs[0]["stock"]))
        assert run["groups"][0] == run["groups"][1]
    parts, entire = (sum(run[f"entries {shard_states}"] for run in runs) for shard_states in (True, False))
    assert parts <= entire


def two_optimizers(rank: int, world_size: int) -> dict[str, Any]:
    """The layers by GRASS under FSDP2, and what is outside of them by another optimizer; a norm is ignored."""
    out = {}
    for ours in (True, False):
        model = tiny(**ODD)
        model.norm.requires_grad_(False)
        wrapped("fsdp2", model, ignored_params={*model.norm.parameters()})
        layers = list(model.layers.parameters())
        rest = [*model.embed.parameters(), *model.head.parameters()]
        first = grass(model, params=layers) if ours else torch.optim.AdamW(layers)
        out["ours" if ours else "stock"] = train(model, rank, first, torch.optim.SGD(rest, lr=0.1))
    return out


@scenarios(TWO(two_optimizers))
def test_a_second_optimizer_trains_beside_grass_under_fsdp2(runs):
    for run in runs:
        assert all(map(torch.equal, run["ours"], runs[0]["stock"]))
