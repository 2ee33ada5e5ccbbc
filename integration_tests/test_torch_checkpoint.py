"""torch's own distributed checkpoint and its state-dict functions, on a `GrassOptimizer` as on any other.

Each run saves in the middle of an interval or of a probe, and another run, on other ranks, with another wrapper or
offload mode, loads and goes on. The measure is the run that was never interrupted.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from grass_dist import GrassConfig, GrassOptimizer
from integration_tests.support.scenarios import FOLDER, FOUR, scenarios
from tests.tiny import tiny

pytestmark = pytest.mark.timeout(300)

ODD = {"layers": 5, "width": 5, "vocab": 17}  # rows that neither three nor four ranks share evenly
GLOBAL = 12  # sequences, for one, three and four ranks
STEPS = 12


class How(NamedTuple):
    """A way to train: the wrapper, the shape of its mesh, and where states are."""

    wrapper: str
    mesh: tuple[int, ...] = (4,)
    offload: str = "none"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        size = "x".join(map(str, self.mesh))
        return f"{self.wrapper} {size} {self.offload}" + ("" if self.dtype == torch.float32 else " bf16")


class Run:
    """A training on the ranks of a mesh; ``None`` of `begin` on a rank outside of it."""

    def __init__(self, how: How, rank: int, probe: int) -> None:
        count = torch.Size(how.mesh).numel()
        self.group = None if how.wrapper == "plain" else dist.new_group(list(range(count)))
        self.ranks, self.rank = count, rank
        names = ("replicate", "shard")[-len(how.mesh) :]
        mesh = DeviceMesh("cpu", torch.arange(count).view(how.mesh), mesh_dim_names=names)  # on every rank
        if rank >= count:
            return
        model: nn.Module = tiny(how.dtype, **ODD)
        if how.wrapper == "fsdp2":
            for layer in model.get_submodule("layers").children():
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        elif how.wrapper == "ddp":
            model = DistributedDataParallel(model, process_group=self.group)
        offload: dict[str, Any] = {"mode": how.offload} | ({"slots": 2} if how.offload == "stream" else {})
        config = GrassConfig(
            active_layers=2,
            probe_steps=probe,
            sampling_interval=4,
            update_interval=4,
            always_active=("embeddings", "final_norm"),
            offload=offload,
        )
        self.model = model
        self.optimizer = GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2, "eps": 1e-6}, config=config)

    @property
    def takes_part(self) -> bool:
        return self.rank < self.ranks

    def train(self, start: int, end: int) -> None:
        own = GLOBAL // self.ranks
        for step in range(start, end):
            generator = torch.Generator().manual_seed(step)
            ids = torch.randint(0, 16, (GLOBAL, 6), generator=generator)[self.rank * own : (self.rank + 1) * own]
            self.optimizer.zero_grad()
            logits = self.model(ids)
            nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
            self.optimizer.step()

    def weights(self) -> list[torch.Tensor]:
        return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in self.model.parameters()]

    def position(self) -> tuple[Any, ...]:
        grass = self.optimizer.grass
        flags = tuple(p.requires_grad for p in self.model.parameters())
        return grass.step, grass.active_layers, str(grass.importances), flags


def chain(
    rank: int, world_size: int, folder: str, first: How, second: How, *, at: int, probe: int = 2, **options: bool
) -> dict[str, Any]:
    """Trains ``first``, saves after step ``at``; ``second`` loads; both go on to the last step."""
    chosen = StateDictOptions(**options)
    one, other, told = Run(first, rank, probe), Run(second, rank, probe), {}
    if one.takes_part:
        one.train(0, at)
        before = one.position()
        saved = {
            "model": get_model_state_dict(one.model),
            "optimizer": get_optimizer_state_dict(one.model, one.optimizer, options=chosen),
        }
        told["asking moves nothing"] = one.position() == before
        dcp.save(saved, checkpoint_id=folder, process_group=one.group)
        one.train(at, STEPS)
        told["uninterrupted"] = one.weights()
    dist.barrier()
    if other.takes_part:
        there = {
            "model": get_model_state_dict(other.model),
            "optimizer": get_optimizer_state_dict(other.model, other.optimizer, options=chosen),
        }
        told["fresh"] = other.optimizer.grass.step
        dcp.load(there, checkpoint_id=folder, process_group=other.group, no_dist=other.group is None)
        set_model_state_dict(other.model, there["model"])
        set_optimizer_state_dict(other.model, other.optimizer, there["optimizer"], options=chosen)
        told["at"] = other.position()[:2]
        other.train(at, STEPS)
        told["resumed"] = other.weights()
    dist.barrier()
    return told


FSDP, HSDP, DDP = How("fsdp2"), How("fsdp2", (2, 2)), How("ddp")
BF16 = torch.bfloat16


@scenarios(
    FOUR(chain, FOLDER, FSDP, FSDP._replace(offload="stream"), at=7),
    FOUR(chain, FOLDER, FSDP._replace(offload="interval"), FSDP, at=1),
    FOUR(chain, FOLDER, FSDP._replace(offload="interval"), FSDP, at=6, flatten_optimizer_state_dict=True),
    FOUR(chain, FOLDER, FSDP._replace(dtype=BF16), FSDP._replace(dtype=BF16, offload="interval"), at=7),
    FOUR(chain, FOLDER, FSDP._replace(dtype=BF16), FSDP._replace(dtype=BF16), at=7, flatten_optimizer_state_dict=True),
    FOUR(chain, FOLDER, HSDP, HSDP, at=7),
    FOUR(chain, FOLDER, DDP, DDP._replace(offload="stream"), at=7),
    FOUR(chain, FOLDER, DDP._replace(offload="interval"), DDP, at=6, flatten_optimizer_state_dict=True),
    FOUR(chain, FOLDER, DDP, DDP, at=6, cpu_offload=True),
)
def test_a_run_goes_on_to_the_bit_on_as_many_ranks(runs):
    for run in runs:
        assert run["asking moves nothing"] and run["fresh"] == 0
        assert all(map(torch.equal, run["uninterrupted"], run["resumed"]))


THREE = (3,)


@scenarios(
    FOUR(chain, FOLDER, FSDP, FSDP._replace(mesh=THREE), at=7),
    FOUR(chain, FOLDER, FSDP._replace(mesh=THREE, offload="interval"), HSDP, at=6, flatten_optimizer_state_dict=True),
    FOUR(chain, FOLDER, HSDP, DDP._replace(mesh=THREE, offload="stream"), at=7),
    FOUR(chain, FOLDER, DDP._replace(mesh=THREE), FSDP, at=1),
    FOUR(chain, FOLDER, DDP, How("plain", (1,), "interval"), at=6, flatten_optimizer_state_dict=True),
)
def test_a_run_goes_on_on_other_ranks_and_wrappers(runs):
    uninterrupted = runs[0]["uninterrupted"]
    for run in runs:
        if "resumed" in run:
            worst = max((a - b).abs().max().item() for a, b in zip(uninterrupted, run["resumed"], strict=True))
            print(f"worst difference {worst:.1e}")
            assert run["fresh"] == 0 and worst <= 3e-6


def whole_and_back(rank: int, world_size: int, first: How, second: How) -> dict[str, Any]:
    """Whole states on rank 0 alone, as a file of them is made, and back from there by a broadcast."""
    one, other = Run(first, rank, 2), Run(second, rank, 2)
    one.train(0, 7)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optimizer = (get_model_state_dict(one.model, options=whole), None)
    optimizer = get_optimizer_state_dict(one.model, one.optimizer, options=whole)
    shapes = {name: {k: tuple(v.shape) for k, v in s.items()} for name, s in optimizer.get("state", {}).items()}
    if rank == 0:  # through a file
        file = io.BytesIO()
        torch.save({"model": model, "optimizer": optimizer}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
    else:
        loaded = {"model": {}, "optimizer": {}}
    back = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other.model, loaded["model"], options=back)
    set_optimizer_state_dict(other.model, other.optimizer, loaded["optimizer"], options=back)
    one.train(7, STEPS)
    other.train(7, STEPS)
    return {"shapes": shapes, "uninterrupted": one.weights(), "resumed": other.weights()}


@scenarios(
    FOUR(whole_and_back, FSDP, FSDP._replace(offload="interval")),
    FOUR(whole_and_back, DDP, FSDP),
    FOUR(whole_and_back, HSDP, DDP),
)
def test_whole_states_go_through_rank_0(runs):
    shapes = {name: tuple(p.shape) for name, p in tiny(**ODD).named_parameters() if "head" not in name}
    assert {name: kept["exp_avg"] for name, kept in runs[0]["shapes"].items()} == shapes
    assert not runs[1]["shapes"]
    for run in runs:
        worst = max((a - b).abs().max().item() for a, b in zip(run["uninterrupted"], run["resumed"], strict=True))
        assert worst <= 3e-6


class Parts(Stateful):
    """Model and optimizer as trainers for pre-training hand them to a checkpoint manager: flat, and by functions."""

    def __init__(self, get: Callable[[], dict[str, Any]], put: Callable[[dict[str, Any]], Any]) -> None:
        self._get, self._put = get, put

    def state_dict(self) -> dict[str, Any]:
        return self._get()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._put(state_dict)


def managed(run: Run) -> dict[str, Any]:
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = run.model, run.optimizer
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
    return {
        "model": Parts(partial(get_model_state_dict, model), partial(set_model_state_dict, model)),
        "optimizer": Parts(
            partial(get_optimizer_state_dict, model, optimizer, options=flat),
            lambda state: set_optimizer_state_dict(model, optimizer, state, options=flat),
        ),
        "lr_scheduler": scheduler,
    }


def saved_beside_training(rank: int, world_size: int, folder: str, first: How, second: How) -> dict[str, Any]:
    """Saves while the next steps train, with a warm-up whose first learning rates are small, then resumes."""
    one, other = Run(first, rank, 2), Run(second, rank, 2)
    states = managed(one)

    def go(run: Run, with_states: dict[str, Any], start: int, end: int) -> None:
        for step in range(start, end):
            run.train(step, step + 1)
            with_states["lr_scheduler"].step()

    go(one, states, 0, 7)
    own = dist.new_group(list(range(world_size)))  # whose collectives run beside those of the training
    future = dcp.async_save(states, checkpoint_id=folder, process_group=own)
    go(one, states, 7, STEPS)
    future.result()
    resumed = managed(other)
    dcp.load(resumed, checkpoint_id=folder, process_group=other.group)
    rate = other.optimizer.param_groups[0]["lr"]
    go(other, resumed, 7, STEPS)
    return {"rate": rate, "uninterrupted": one.weights(), "resumed": other.weights()}


@scenarios(
    FOUR(saved_beside_training, FOLDER, FSDP._replace(offload="interval"), FSDP),
    FOUR(saved_beside_training, FOLDER, DDP._replace(offload="stream"), DDP._replace(offload="stream")),
)
def test_a_checkpoint_manager_saves_beside_the_training(runs):
    for run in runs:
        assert run["rate"] == 1e-2
        assert all(map(torch.equal, run["uninterrupted"], run["resumed"]))


def foreign(rank: int, world_size: int) -> dict[str, str]:
    """What loading says of a state of rank 0 that all ranks were given, and of states that torch has dropped."""

    def said(make: Callable[[], Any]) -> str:
        try:
            make()
        except (ValueError, RuntimeError) as error:
            return str(error)
        return "loaded"

    one, other = Run(FSDP, rank, 0), Run(FSDP, rank, 0)
    one.train(0, 5)
    file = io.BytesIO()
    torch.save(copy.deepcopy(one.optimizer.state_dict()), file)
    mine = io.BytesIO(file.getvalue())
    theirs: list[Any] = [file.getvalue()]
    dist.broadcast_object_list(theirs)
    loaded = torch.load(io.BytesIO(theirs[0]), weights_only=False)
    return {
        "of rank 0": said(lambda: other.optimizer.load_state_dict(loaded)),
        "own": said(lambda: other.optimizer.load_state_dict(torch.load(mine, weights_only=False))),
    }


@scenarios(FOUR(foreign))
def test_the_state_of_another_rank_is_refused_under_fsdp2(runs):
    for rank, said in enumerate(runs):
        assert said["own"] == "loaded"
        assert f"is that of rank 0 of 4, and this is rank {max(rank, 1)}" in said["of rank 0"]
        assert said["of rank 0"].startswith("rank 1: " * (rank == 0))


def wrong_on_one_rank(rank: int, world_size: int, how: How) -> dict[str, list[Any]]:
    """What ranks say of loads that only rank 2 cannot do, by what it was given, and what has changed."""
    saved, run, told = Run(how, rank, 1), Run(how, rank, 1), {}
    saved.train(0, 3)
    state = copy.deepcopy(saved.optimizer.state_dict())
    saved.train(3, 6)
    run.train(0, 2)
    before, position = run.weights(), run.position()
    stock = torch.optim.AdamW(run.model.parameters())
    settings = {**state["grass"]["settings"], "active_layers": 3}
    of_rank_2: dict[str, Callable[[], Any]] = {
        "gamma": lambda: {**state, "grass": {**state["grass"], "settings": settings}},
        "stock": stock.state_dict,
        "damaged": lambda: {**state, "state": {key: {"exp_avg": "often"} for key in state["state"]}},
        "step": saved.optimizer.state_dict,
    }

    def said(load: Callable[[], Any]) -> str:
        try:
            load()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "loaded"

    for case, make in of_rank_2.items():
        given = make() if rank == 2 else state
        told[case] = [said(lambda given=given: run.optimizer.load_state_dict(given))]
    asked = copy.deepcopy(get_optimizer_state_dict(saved.model, saved.optimizer))
    if rank == 2:
        asked["param_groups"][0]["grass"] = asked["param_groups"][0]["grass"].replace('"seed": 0', '"seed": 1')
    told["asked"] = [said(lambda: set_optimizer_state_dict(run.model, run.optimizer, asked))]
    same = [*map(torch.equal, before, run.weights()), run.position() == position]
    told["as before"] = same
    run.optimizer.load_state_dict(state)
    run.train(3, 6)
    told["goes on"] = [run.optimizer.grass.step]
    return told


@scenarios(FOUR(wrong_on_one_rank, FSDP), FOUR(wrong_on_one_rank, DDP._replace(offload="interval")))
def test_a_load_that_one_rank_refuses_is_refused_on_all(runs):
    words = {
        "gamma": "active_layers=3 in the saved state, and 2 here; give the same",
        "stock": "The state dict has no position of the method",
        "damaged": " is 'often' and no tensor.",
        "asked": "seed=1 in the saved state, and 0 here",
    }
    for rank, told in enumerate(runs):
        for case, sentence in words.items():
            prefix = "StateError: " if rank == 2 else "StateError: rank 2: "
            assert told[case][0].startswith(prefix) and sentence in told[case][0], (rank, case, told[case])
        assert told["step"] == [
            "RanksDisagree: The step of the state to load is 6 on rank 2 and 3 on rank 0; load on all ranks what was "
            "saved at the same step."
        ]
        assert all(told["as before"]) and told["goes on"] == [6]


def without_frozen(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """What `ignore_frozen_params` leaves out of the weights, and what a new run says of what is left."""
    left_out = StateDictOptions(ignore_frozen_params=True)
    one, other = Run(FSDP, rank, 1), Run(FSDP, rank, 1)
    one.train(0, 3)
    there = get_model_state_dict(one.model, options=left_out)
    dcp.save({"model": there}, checkpoint_id=folder)
    wanted = {"model": get_model_state_dict(other.model, options=left_out)}
    told = {}
    for way, load in {
        "dcp": lambda: dcp.load(wanted, checkpoint_id=folder),
        "strict": lambda: set_model_state_dict(other.model, there),
    }.items():
        try:
            load()
            told[way] = "loaded"
        except BaseException as error:  # torch's CheckpointException is no Exception
            told[way] = str(error)
    kept = {name.split(".")[1] for name in there if name.startswith("layers.")}
    return {**told, "kept": sorted(map(int, kept)), "active": sorted(one.optimizer.grass.active_layers)}


@scenarios(FOUR(without_frozen, FOLDER))
def test_frozen_params_that_are_ignored_are_the_layers_not_drawn(runs):
    for told in runs:
        assert told["kept"] == told["active"] and len(told["kept"]) == 2
        assert "Missing key" in told["dcp"] and "Missing key" in told["strict"]
