"""An optimizer that trains all layers at every step is the stock one, to the bit, or is refused: on many ranks.

Each rank has other batches, and no shape is a multiple of the ranks: some have no entry of a parameter at all.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import swa_utils

from grass_dist import GrassOptimizer, MuonAdamW
from grass_dist.states.update_rule import ELEMENTWISE
from integration_tests.support.scenarios import FOUR, Spawn, scenarios
from tests.contract_cases import (
    CASES,
    CLASSES,
    MODES,
    Case,
    Weights,
    all_layers,
    attempt,
    cases_of,
    counted,
    outcome,
    refusal_of,
    unexpected,
)
from tests.test_contract import ADAMW, LOOPS, SCHEDULERS, grouped, scheduled
from tests.test_optimizer_state import EDITS, give_other_memory
from tests.tiny import Tiny, loss_of, tiny

THREE = Spawn(3, timeout=1400)
ALONE = Spawn(3)  # of the tests that are skipped without a package: a shared spawn would run theirs all the same
SIZES = {"layers": 3, "width": 4, "vocab": 17}
STEPS = 4

NOT_OF_DTENSORS = ("does not have a sharding strategy", "in-place operations that require placement changes")
"""What torch says where a class steps by an operation that DTensors do not have."""


def exact(grad: torch.Tensor) -> torch.Tensor:
    """Rounds to multiples of 3/2^16, so that the third of it, and the sum of three ranks' thirds, have no rounding.

    The stock DDP reduces several layers in a bucket, and the all-reduce of gloo adds the ranks' entries in an order
    that depends on their place in the bucket. Without this a difference in the last bit would say nothing.
    """
    if grad.layout != torch.strided:
        return grad
    return (grad * (2**16 / 3)).round() * (3 / 2**16)


def wrapped(model: Tiny, wrapper: str, world_size: int) -> nn.Module:
    if wrapper == "ddp":
        for param in model.parameters():
            if param.requires_grad:
                param.register_hook(exact)
        return DistributedDataParallel(model, find_unused_parameters=True)
    shape = (2, world_size // 2) if wrapper == "hsdp" else (world_size,)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def local(model: nn.Module) -> Weights:
    return [(p.to_local() if isinstance(p, DTensor) else p).detach() for p in model.parameters()]


class Cells:
    """The outcomes of cases on a rank, under one wrapper."""

    def __init__(self, rank: int, world_size: int, wrapper: str) -> None:
        self.rank, self.world_size, self.wrapper = rank, world_size, wrapper
        self.told: list[tuple[str, str, str | None, str | None]] = []  # class, outcome, row of REFUSALS, what is wrong

    def train(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Weights:
        for step in range(STEPS):
            loss_of(model, 10 * step + self.rank).backward()
            optimizer.step()
            optimizer.zero_grad()
        return local(model)

    def model(self, case: Case) -> nn.Module:
        return wrapped(case.model(**SIZES), self.wrapper, self.world_size)

    def add(self, case: Case, modes: Sequence[str]) -> None:
        def made(optimizer: Callable[[nn.Module], Any]) -> Callable[[], Any]:
            return lambda: (model := self.model(case), optimizer(model))

        stock, beside = attempt(made(case.stock), self.train), ""
        if case.kind in ELEMENTWISE and any(words in str(stock) for words in NOT_OF_DTENSORS):
            # What is elementwise is given the shards here, as plain tensors.
            stock, beside = attempt(made(partial(OnShards, case)), self.train), ", where stock takes no DTensors"
        for mode in modes:
            for shard_states in (True, False) if self.wrapper == "ddp" else (True,):
                ours = partial(case.ours, mode=mode, shard_states=shard_states)
                found = outcome(made(ours), self.train, stock) + beside
                wrong = unexpected(case, found, moves=mode != "none", wrapper=self.wrapper)
                self.told.append((case.name, found, refusal_of(case, self.wrapper), wrong and f"{mode}: {wrong}"))


class OnShards:
    """The stock optimizer over this rank's shards as plain tensors."""

    def __init__(self, case: Case, model: nn.Module) -> None:
        params = [p for p in model.parameters() if isinstance(p, DTensor) and p.requires_grad]
        self.pairs = [(p, nn.Parameter(p.detach().to_local())) for p in params]
        self.inner = case.kind([shard for _, shard in self.pairs], **case.kwargs())

    def step(self) -> None:
        for param, shard in self.pairs:
            shard.grad = cast(DTensor, param.grad).to_local()
        self.inner.step()

    def zero_grad(self) -> None:
        for param, _ in self.pairs:
            param.grad = None


def matrix(rank: int, world_size: int, wrapper: str, modes: Sequence[str] = tuple(MODES), **only: Any) -> list[Any]:
    """What became of each cell.

    Args:
        only: ``names`` of classes, and the ``most`` cases of each.
    """
    cells = Cells(rank, world_size, wrapper)
    for name in only.get("names", CLASSES):
        for case in list(cases_of(name))[: only.get("most")]:
            cells.add(case, modes)
    return cells.told


def counts_of(runs: Sequence[list[Any]], cells: int, classes: int) -> None:
    """Asserts that every cell has an outcome that may be, and prints how many have which."""
    for told in runs:
        assert not (faults := [wrong for *_, wrong in told if wrong]), "\n".join(faults)
        assert len(told) == cells and len({name for name, *_ in told}) == classes
    for name in dict.fromkeys(name for name, *_ in runs[0]):
        print(f"{name}: {counted([found for kind, found, *_ in runs[0] if kind == name])}")
    print(f"all: {counted([found for _, found, *_ in runs[0]])}")


BOTH = ("none", "in the backward")


@scenarios(THREE(matrix, "fsdp2", BOTH, most=1), THREE(matrix, "ddp", BOTH, most=1))
def test_each_class_is_stock_or_refused_on_uneven_ranks(runs, request):
    ddp = "ddp" in request.node.name
    counts_of(runs, len(CLASSES) * 2 * (1 + ddp), len(CLASSES))


@pytest.mark.long
@scenarios(THREE(matrix, "ddp", ("none",), names=("AdamW",)))
def test_every_flag_of_adamw_is_stock_under_ddp(runs):
    """Fused ones too, whose states are whole on each rank."""
    counts_of(runs, len(list(cases_of("AdamW"))) * 2, 1)


SOME = ("AdamW", "Adagrad", "Adafactor")


@pytest.mark.long
@scenarios(FOUR(matrix, "hsdp", names=SOME, most=1))
def test_each_class_is_stock_or_refused_under_hsdp(runs):
    counts_of(runs, len(SOME) * len(MODES), len(SOME))


def every_flag(runs: Sequence[list[Any]], wrapper: str, modes: int) -> None:
    counts_of(runs, len(CASES) * modes * (1 + (wrapper == "ddp")), len(CLASSES))
    rows = {row for case in CASES if (row := refusal_of(case, wrapper))}
    for told in runs:
        assert {row for _, found, row, _ in told if found.startswith("refused")} == rows


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("runs", "wrapper"), [(THREE(matrix, w, BOTH), w) for w in ("fsdp2", "ddp")], indirect=["runs"], ids=str
)
def test_every_flag_is_stock_or_refused_on_uneven_ranks(runs, wrapper):
    every_flag(runs, wrapper, len(BOTH))


@pytest.mark.long
@pytest.mark.timeout(3700)
@pytest.mark.parametrize(
    ("runs", "wrapper"), [(Spawn(3, timeout=3600)(matrix, w), w) for w in ("fsdp2", "ddp")], indirect=["runs"], ids=str
)
def test_every_flag_in_every_mode_on_uneven_ranks(runs, wrapper):
    every_flag(runs, wrapper, len(MODES))


# --- fewer layers than all


def fewer(rank: int, world_size: int, wrapper: str, name: str, mode: str) -> dict[str, Any]:
    """γ = 2 of 4, beside a stock optimizer for each layer and role, of which the drawn layers' step."""
    cells, case = Cells(rank, world_size, wrapper), Case(name, {})
    wide = {**SIZES, "layers": 4}
    model, plain = (wrapped(case.model(**wide), wrapper, world_size) for _ in range(2))
    config = all_layers(4, mode).model_copy(update={"active_layers": 2})
    optimizer = GrassOptimizer(model, case.kind, config=config)
    inner = plain.module if isinstance(plain, DistributedDataParallel) else plain
    each = [case.kind(part.parameters()) for part in [*inner.layers, inner.embed, inner.norm, inner.head]]
    drawn = []
    for step in range(8):
        drawn.append(optimizer.grass.active_layers)
        for kind in (model, plain):
            loss_of(kind, 10 * step + cells.rank).backward()
        optimizer.step()
        optimizer.zero_grad()
        for index, stock in enumerate(each):
            if index >= 4 or index in drawn[-1]:
                stock.step()
        plain.zero_grad()
    return {"drawn": drawn, "equal": [torch.equal(a, b) for a, b in zip(local(model), local(plain), strict=True)]}


@scenarios(
    THREE(fewer, "fsdp2", "AdamW", "interval"),
    THREE(fewer, "fsdp2", "Adagrad", "in the backward"),
    THREE(fewer, "fsdp2", "NAdam", "none"),
    THREE(fewer, "ddp", "AdamW", "stream"),
    THREE(fewer, "ddp", "Adafactor", "interval"),
    pytest.param(FOUR(fewer, "hsdp", "AdamW", "stream"), marks=pytest.mark.long),
)
def test_fewer_layers_are_an_optimizer_for_each(runs):
    for run in runs:
        assert all(run["equal"]) and len(set(run["drawn"])) > 2


# --- averages and copies of a wrapped model


def averaged(rank: int, world_size: int) -> dict[str, Any]:
    """torch's average of the module inside of DDP, and copies of both, which train on for themselves."""
    told = {}
    for kind in ("stock", *MODES):
        cells, case = Cells(rank, world_size, "ddp"), Case("AdamW", {})
        model = cells.model(case)
        optimizer = case.stock(model) if kind == "stock" else case.ours(model, kind)
        average = swa_utils.AveragedModel(cast(nn.Module, model.module))
        seen = []
        for step in range(4):
            loss_of(model, 10 * step + rank).backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(cast(nn.Module, model.module))
            for other in (copy.deepcopy(model.module), copy.deepcopy(model)):
                other = cast(nn.Module, other)
                loss_of(other, step).backward()
                seen += [p.grad for p in other.parameters()]
        told[kind] = [*seen, *local(average), *local(model)]
    return {kind: all(map(torch.equal, told[kind], told["stock"])) for kind in told}


@scenarios(THREE(averaged))
def test_averages_and_copies_of_the_model_are_those_of_stock(runs):
    assert runs == [dict.fromkeys(["stock", *MODES], True)] * 3


# --- schedulers, and loops that do more than a step


class OnRanks:
    """What the loops of one process need of a rank under a wrapper."""

    def __init__(self, rank: int, world_size: int, wrapper: str) -> None:
        self.rank, self.world_size, self.wrapper = rank, world_size, wrapper

    def made(self, mode: str | None, cls: Any, kwargs: dict[str, Any], *, groups: bool = False) -> tuple[Any, Any]:
        model = wrapped(tiny(**SIZES), self.wrapper, self.world_size)
        params = grouped(model) if groups else None
        if mode is None:
            return model, cls(params or model.parameters(), **kwargs)
        return model, GrassOptimizer(model, cls, kwargs, config=all_layers(3, mode), params=params)

    def loss_of(self, model: nn.Module, number: int) -> torch.Tensor:
        return loss_of(model, 10 * number + self.rank)

    def outcome(self, run: Callable[[], list[Any]]) -> list[Any]:
        """What a run gives as this rank's plain values; or the type of the error with which it ends."""
        try:
            return flat(run())
        except Exception as error:
            return [f"{type(error).__name__}: {error}"]


def flat(told: Any) -> list[Any]:
    if isinstance(told, list | tuple):
        return [value for one in told for value in flat(one)]
    if isinstance(told, DTensor):
        told = told.full_tensor() if told.ndim == 0 else told.to_local()
    return [told.detach().clone() if torch.is_tensor(told) else told]


def differ(ours: list[Any], stock: list[Any]) -> bool:
    same = [torch.equal(a, b) if torch.is_tensor(b) else a == b for a, b in zip(ours, stock, strict=False)]
    return len(ours) != len(stock) or not all(same)


def scheduled_on_ranks(rank: int, world_size: int, wrapper: str) -> list[str]:
    """Schedulers with which something differs from the stock optimizer: never stopped, or resumed in the middle."""
    own, odd = OnRanks(rank, world_size, wrapper), []
    for name, make in SCHEDULERS.items():
        runs = [
            scheduled(mode, make, torch.optim.AdamW, ADAMW, resume, own.made, own.loss_of, copy.deepcopy)
            for mode, resume in ((None, False), ("none", False), ("interval", True))
        ]
        stock, *ours = map(flat, runs)
        odd += [f"{name} {number}" for number, run in enumerate(ours) if differ(run, stock)]
    return odd


@pytest.mark.integration
@scenarios(THREE(scheduled_on_ranks, "fsdp2"), pytest.param(THREE(scheduled_on_ranks, "ddp"), marks=pytest.mark.long))
def test_schedulers_drive_it_as_stock_and_resume_on_ranks(runs):
    assert runs == [[]] * 3


NO_COPIES = "AssertionError: FSDP does not support deepcopy"
STOCK_FAILS = {"Copies": NO_COPIES, "Swa": NO_COPIES, "Ema": NO_COPIES, "Pickles": "PicklingError"}
"""Loops that stock itself cannot run under FSDP2, with the beginning of what is said."""

INFINITE_NORM = "Clipping"
"""One of its ways is the infinity norm, which stock cannot compute on the one rank that has no entry of a parameter."""

ROUNDED = ("ddp", "Accumulation")
"""Without `no_sync` stock divides the sum of the micro-batches by the ranks, and the thirds of it are rounded."""


def is_near(found: list[Any], stock: list[Any]) -> bool:
    return all(
        torch.allclose(a, b, atol=1e-6) if torch.is_tensor(b) else a == b for a, b in zip(found, stock, strict=True)
    )


def looped_on_ranks(rank: int, world_size: int, wrapper: str) -> dict[str, str]:
    """The loops that are not those of stock, with what is said instead of equal."""
    own, told = OnRanks(rank, world_size, wrapper), {}
    for kind in LOOPS:
        if wrapper != "ddp" and kind.__name__ == INFINITE_NORM:
            continue
        stock = looped(own, kind, None)
        if wrapper != "ddp" and (words := STOCK_FAILS.get(kind.__name__)):
            if not str(stock[0]).startswith(words):
                told[f"{kind.__name__} of stock"] = f"{stock[0]!s:.200}"
            continue
        for mode in kind.modes:
            found = looped(own, kind, mode)
            if not is_near(found, stock) if (wrapper, kind.__name__) == ROUNDED else differ(found, stock):
                told[f"{kind.__name__} {mode}"] = f"{found[0]!s:.200} for {stock[0]!s:.200}"
    return told


def looped(own: OnRanks, kind: Any, mode: str | None) -> list[Any]:
    loop = kind()
    loop.made, loop.loss_of, loop.through = own.made, own.loss_of, copy.deepcopy
    return own.outcome(partial(loop.run, mode))


@pytest.mark.integration
@scenarios(THREE(looped_on_ranks, "fsdp2"), pytest.param(THREE(looped_on_ranks, "ddp"), marks=pytest.mark.long))
def test_a_loop_of_a_user_is_that_of_stock_on_ranks(runs):
    assert runs == [{}] * 3


@pytest.mark.long
@pytest.mark.timeout(1500)
@scenarios(FOUR(looped_on_ranks, "hsdp"))
def test_a_loop_of_a_user_is_that_of_stock_under_hsdp(runs):
    assert runs == [{}] * 4


@pytest.mark.long
@pytest.mark.timeout(1500)
@scenarios(FOUR(matrix, "hsdp", ("none", "stream"), most=1))
def test_every_class_is_stock_or_refused_under_hsdp(runs):
    counts_of(runs, len(CLASSES) * 2, len(CLASSES))


# --- edits of states


def edited_on_ranks(rank: int, world_size: int, wrapper: str) -> list[str]:
    """Edits of states by a user, after which the weights are not those of the stock optimizer."""
    own, odd = OnRanks(rank, world_size, wrapper), []

    def run(edit: Callable[..., None], mode: str | None) -> list[Any]:
        model, optimizer = own.made(mode, torch.optim.AdamW, ADAMW)
        for step in range(6):
            if step == 3:
                edit(optimizer, list(model.parameters()))
            own.loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        return flat(list(model.parameters()))

    for edit in EDITS:
        if wrapper == "fsdp2" and edit is give_other_memory:
            continue  # a DTensor, as stock has it there, does not take another memory
        stock = run(edit, None)
        odd += [f"{edit.__name__} {mode}" for mode in ("none", "interval", "stream") if differ(run(edit, mode), stock)]
    return odd


@pytest.mark.integration
@scenarios(THREE(edited_on_ranks, "fsdp2"), THREE(edited_on_ranks, "ddp"))
def test_edits_of_states_count_as_in_stock_on_ranks(runs):
    assert runs == [[]] * 3


# --- an optimizer that needs whole matrices


def muon_on_ranks(rank: int, world_size: int, wrapper: str) -> list[str]:
    """Modes in which `MuonAdamW` does not train as it does without GRASS."""
    own = OnRanks(rank, world_size, wrapper)

    def run(mode: str | None) -> list[Any]:
        model = wrapped(tiny(**SIZES), wrapper, world_size)
        named = list(model.named_parameters())
        if mode is None:
            groups = [{"params": [p for n, p in named if ("layers." in n) == of], "muon": of} for of in (True, False)]
            optimizer = MuonAdamW(groups, lr=1e-2)
        else:
            optimizer = GrassOptimizer(model, MuonAdamW, {"lr": 1e-2}, config=all_layers(3, mode))
        for step in range(STEPS):
            own.loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        return flat([p for _, p in named])

    stock = run(None)
    modes = ("none",) if wrapper == "fsdp2" else ("none", "interval")  # states as DTensors stay on the device
    return [mode for mode in modes if differ(run(mode), stock)]


@pytest.mark.integration
@scenarios(THREE(muon_on_ranks, "fsdp2"), THREE(muon_on_ranks, "ddp"))
def test_muon_updates_whole_matrices_on_ranks(runs):
    assert runs == [[]] * 3


QUANTISED = {"layers": 3, "width": 96, "vocab": 17}
"""A layer's matrices have more than 4096 entries on each of three ranks: bitsandbytes keeps 32 bits of smaller ones."""


def quantised_on_ranks(rank: int, world_size: int, wrapper: str) -> list[str]:
    """Modes in which the 8-bit AdamW of bitsandbytes is not, on each rank, that of the rank's shards."""
    from bitsandbytes.optim import AdamW

    own, kwargs = OnRanks(rank, world_size, wrapper), {"lr": 1e-2, "optim_bits": 8}

    def run(mode: str | None) -> list[Any]:
        model = wrapped(tiny(**QUANTISED), wrapper, world_size)
        weights = list(model.parameters())
        shards = [nn.Parameter(weight) for weight in local(model)]  # in the memory of the weights
        if mode is None:
            optimizer = AdamW(shards, **kwargs)
        else:
            optimizer = GrassOptimizer(model, AdamW, kwargs, config=all_layers(3, mode))
        for step in range(STEPS):
            own.loss_of(model, step).backward()
            for shard, weight in zip(shards, weights, strict=True):
                shard.grad = weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
            optimizer.step()
            model.zero_grad()
        states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        return [*local(model), sum(state.dtype == torch.uint8 for state in states)]

    stock = run(None)
    assert stock[-1] == 2 * 2 * 3  # two moments of the two matrices of each layer
    return [mode for mode in MODES if differ(run(mode), stock)]


@pytest.mark.integration
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@scenarios(ALONE(quantised_on_ranks, "fsdp2"), ALONE(quantised_on_ranks, "ddp"))
def test_states_of_8_bits_stay_so_and_move_on_ranks(runs):
    assert runs == [[]] * 3
