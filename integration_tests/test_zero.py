"""DeepSpeed ZeRO-0, 1, 2, 3: the same samples and weights as one process, and as stock ZeRO on only those layers."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_set_full_fp32_param
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from grass_dist import GrassConfig, GrassError, GrassOptimizer, WeightSync
from grass_dist.backends.zero.private import PARAMETER
from grass_dist.checkpoint.model import fqn
from integration_tests.support.model import ADAMW, FROZEN, LAYERS, global_batch, small_llama, wrapped
from integration_tests.support.parity import check_parity
from integration_tests.support.ranks import run_ranks
from integration_tests.support.reference import run_reference
from integration_tests.support.scenarios import FOLDER, Spawn, scenarios
from integration_tests.support.training import full as full_tensor
from integration_tests.support.training import train_grass
from integration_tests.support.wire import Wire
from integration_tests.support.zero import ds_config, full, make_engine, train_step, train_zero
from integration_tests.support.zero_chain import grass_and_chain

pytestmark = pytest.mark.timeout(420)

STEPS = 12
SETTINGS = {
    "active_layers": 2,
    "sampling_interval": 3,
    "update_interval": 3,
    "probe_steps": 2,
    "ema_alpha": 0.5,
    "temperature": 0.5,
    "seed": 3,
}
SMALL = {"reduce_bucket_size": 2000, "allgather_bucket_size": 2000}
OPTIONS: dict[int, list[dict]] = {
    1: [{"overlap_comm": True, "round_robin_gradients": True}, {"contiguous_gradients": False}, SMALL],
    2: [
        {"overlap_comm": True, "allgather_partitions": False},
        {"contiguous_gradients": False, "offload_optimizer": {"device": "cpu"}},
        {"round_robin_gradients": True, "reduce_scatter": False},
        SMALL,
    ],
    3: [
        {"overlap_comm": True, "stage3_param_persistence_threshold": 100_000},
        {"contiguous_gradients": False, "reduce_scatter": False, "sub_group_size": 1000},
        {
            "offload_param": {"device": "cpu", "max_in_cpu": 1000},
            "offload_optimizer": {"device": "cpu"},
            "stage3_param_persistence_threshold": 100_000,
        },
        {
            "stage3_param_persistence_threshold": 100,
            "stage3_prefetch_bucket_size": 1000,
            "stage3_max_live_parameters": 10_000,
            "stage3_max_reuse_distance": 1000,
            "reduce_bucket_size": 5000,
        },
    ],
}
"""ZeRO options under which the trajectory must stay the same."""

HOST = {"offload_param": {"device": "cpu", "pin_memory": True}}
"""ZeRO-3's weights rest in host memory."""

STAGES = (1, 2, 3)
# DeepSpeed collects whenever it constructs a ZeRO-3 optimizer, a second each time if what is there is not frozen.
RANKS = {stage: Spawn(2, before=gc.freeze, timeout=400) for stage in (0, *STAGES)}
FOUR_RANKS = Spawn(4, timeout=400)


def at(stage: int, function: Callable[..., Any], *args: Any, name: str = "", **kwargs: Any) -> Any:
    """A scenario of two ranks, whose function is given the stage after rank and world size.

    `make test` runs those of training and of copies at stages 2 and 3, `make integration` the others of these stages
    and the training at stage 1, and `make long` the rest of stage 1, which is as stage 2.
    """
    rest = stage == 1 and (name or function is not trained)
    later = stage < 2 or function.__name__ not in ("trained", "zero_init", "synced")
    marks = pytest.mark.long if rest else pytest.mark.integration if later else ()
    return pytest.param(RANKS[stage](function, stage, *args, **kwargs), marks=marks, id=f"stage{stage} {name}".strip())


def at_each(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """Scenarios of all stages that shard."""
    return [at(stage, function, *args, **kwargs) for stage in STAGES]


@pytest.fixture
def stage(request) -> int:
    """The stage of the test's scenario."""
    return request.node.callspec.params["runs"].args[0]


@pytest.fixture(scope="module")
def reference():
    return run_reference(SETTINGS, STEPS)


def test_the_reference_run_tests_something(reference):
    drawn = reference["active"][SETTINGS["probe_steps"] :]
    assert len(set(drawn)) >= 3 and min(reference["norms"]) > 0.5  # clipping binds at every step


# Parity.


def trained(rank: int, world_size: int, stage: int, **how: Any) -> dict[str, Any]:
    return train_zero(rank, world_size, stage, SETTINGS, STEPS, **how)


@scenarios(
    at(0, trained),
    *at_each(trained),
    *(at(stage, trained, zero=options, name=str(options)) for stage in STAGES for options in OPTIONS[stage]),
)
def test_parity_under_every_option(runs, reference):
    check_parity(runs, reference)


def on_disk(rank: int, world_size: int, stage: int, folder: str) -> dict[str, Any]:
    """Trains with the states of layers in the folder that DeepSpeed would swap them to; each rank has files there."""
    config = ds_config(stage, SETTINGS, 2, zero={"offload_optimizer": {"device": "nvme", "nvme_path": folder}})
    engine = make_engine(config)
    name = f"{folder}/grass_states.{os.getpid()}."  # removed at once, and mapped until the process ends
    files = len({line.split()[5] for line in Path("/proc/self/maps").read_text().splitlines() if name in line})
    engine.destroy()
    run = train_zero(rank, world_size, stage, SETTINGS, STEPS, zero=config["zero_optimization"])
    return run | {"files": files}


@scenarios(*(at(stage, on_disk, FOLDER) for stage in (2, 3)))
def test_parity_with_states_in_a_folder(runs, reference):
    assert [run["files"] for run in runs] == [LAYERS, LAYERS]
    check_parity(runs, reference)


@scenarios(*at_each(trained, accumulation=1))
def test_parity_without_accumulation(runs, reference):
    run = runs[0]
    assert run["active"] == reference["active"]
    assert max((run["params"][n] - p).abs().max().item() for n, p in reference["params"].items()) <= 5e-6


@pytest.fixture(scope="module")
def frozen_reference():
    return run_reference(SETTINGS, STEPS, frozen=FROZEN)


@scenarios(*at_each(trained, frozen=FROZEN))
def test_layers_that_the_user_has_frozen_do_not_compete(runs, frozen_reference):
    assert max(map(max, frozen_reference["active"])) == LAYERS - len(FROZEN) - 1
    check_parity(runs, frozen_reference)


@pytest.mark.integration
@scenarios(*(pytest.param(FOUR_RANKS(trained, stage, accumulation=1), id=f"stage{stage}") for stage in STAGES))
def test_parity_on_four_ranks(runs, reference):
    check_parity(runs, reference)


@pytest.fixture(scope="module")
def fsdp2():
    return run_ranks(2, train_grass, "fsdp2", SETTINGS, STEPS)[0]


@scenarios(at(0, trained), *at_each(trained))
def test_the_same_layers_as_fsdp2(runs, fsdp2):
    assert runs[0]["active"] == fsdp2["active"]


def weights_of(engine) -> dict[str, torch.Tensor]:
    return {n: full(p) for n, p in engine.module.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def moments_of(zero) -> list[dict]:
    return [state for state in zero.optimizer.state.values() if state]


# Stock ZeRO.


@scenarios(
    *at_each(grass_and_chain, torch.bfloat16, name="bf16"),
    *at_each(grass_and_chain, torch.float16, accumulation=1, name="fp16"),
    at(3, grass_and_chain, torch.bfloat16, more={"zero": HOST}, name="bf16, weights on the host"),
)
def test_16_bit_training_is_a_chain_of_stock_runs_to_the_bit(runs):
    told = runs[0]
    seen, returned = set(), False
    for before, layers in zip([(), *told["drawn"]], told["drawn"], strict=False):
        returned |= bool((set(layers) & seen) - set(before))
        seen |= set(layers)
    assert returned, "some layer must come back after having been away"
    assert told["differences"] == [0.0] * len(told["drawn"]) and told["moved"] > 1e-3


def overflow(rank: int, world_size: int, stage: int) -> None:
    """fp16: a step that overflows changes nothing, in the probe and in training, on all ranks."""
    fp16 = {"enabled": True, "initial_scale_power": 22, "hysteresis": 1, "loss_scale_window": 1000}
    engine = make_engine(ds_config(stage, SETTINGS, 1, fp16=fp16), torch.float16)
    zero, grass = engine.optimizer, engine.grass
    skipped = {"probe": 0, "train": 0}
    step = forced = 0
    while grass.step < 9:
        phase, before = grass.phase, copy.deepcopy((grass.state_dict(), weights_of(engine)))
        if phase == "train" and grass.step in (3, 6) and forced < 2 and grass.step != forced:
            zero.loss_scaler.cur_scale, forced = 2.0**24, grass.step
        scale, moments = zero.loss_scale, copy.deepcopy(moments_of(zero))
        assert zero.loss_scale_config.cur_scale == scale and zero.loss_scale_config.dynamic_loss_scale
        train_step(engine, step, rank, world_size, 1)
        step += 1
        if zero.overflow:
            skipped[phase] += 1
            assert zero.loss_scale == scale / 2 and engine.skipped_steps == sum(skipped.values())
            assert grass.skipped == sum(skipped.values())
            was = {**before[0], "skipped": grass.skipped}
            assert repr(grass.state_dict()) == repr(was) and same(weights_of(engine), before[1])
            assert repr(moments_of(zero)) == repr(moments)
        else:
            assert grass.step == before[0]["step"] + 1
        assert step < 60
    assert skipped["probe"] >= 2 and skipped["train"] >= 2
    assert grass.dropped == 0 and all(m < 1 for m in grass.importances)


@scenarios(*at_each(overflow))
def test_a_step_that_overflows_changes_nothing(runs):
    assert runs == [None, None]


# Bytes.


def wire_bytes(rank: int, world_size: int, stage: int) -> dict[int, dict[str, int]]:
    """Bytes at the process group in one training step, by γ; nothing but layers trains."""
    told = {}
    for active in (2, LAYERS):
        settings = {**SETTINGS, "active_layers": active, "probe_steps": 0, "sampler": "uniform", "always_active": []}
        engine = make_engine(ds_config(stage, settings, 1))
        train_step(engine, 0, rank, world_size, 1)
        with Wire() as wire:
            train_step(engine, 1, rank, world_size, 1)
        told[active] = dict(wire.bytes)
        engine.destroy()
    return told


@scenarios(*at_each(wire_bytes))
def test_bytes_on_the_wire_are_those_of_the_active_layers(runs, stage):
    few, all_ = runs[0][2], runs[0][LAYERS]
    print(runs[0])  # shown by pytest -rP
    share = 2 / LAYERS
    gradients = "reduce_scatter" if stage == 3 else "all_reduce"
    assert all_[gradients] > 1_000_000
    assert few[gradients] == pytest.approx(share * all_[gradients], abs=256)
    if stage < 3:
        assert few["all_gather"] == share * all_["all_gather"]
    else:  # frozen layers are gathered for their forward all the same
        assert few["all_gather"] <= all_["all_gather"]


def state_bytes(rank: int, world_size: int, stage: int, dtype: torch.dtype) -> None:
    """On the device slots for the active layers and the roles' states, on the host the layers that are away."""
    engine = make_engine(ds_config(stage, SETTINGS, 1, dtype), dtype)
    states, grass = engine.optimizer.states, engine.grass
    share = {unit.name: unit.numel / world_size for unit in (*grass.layers, *grass.roles)}
    layers, slots = [unit.name for unit in grass.layers], grass.config.active_layers + 1  # one to land in
    pad = 12 * 100 * len(engine.optimizer.every)
    each = 8 if stage == 3 and dtype == torch.float32 else 12  # there the weights are their own masters
    size = each * share[layers[0]]
    assert abs(states.device_bytes - slots * size) <= pad and states.host_bytes == 0  # the probe has no state
    seen: set[str] = set()
    for step in range(12):
        active = {layers[i] for i in grass.active_layers} if grass.phase == "train" else set()
        train_step(engine, step, rank, world_size, 1)
        seen |= active
        roles = sum(each * share[unit.name] for unit in grass.roles)
        on = states.device_bytes - slots * size
        least = roles if seen else 0  # with the first draw they have masters, and with the first update all
        assert least - pad <= on <= roles + pad, (step, on, roles)
        landing = size if grass.schedule.steps_to_switch(grass.step) == 1 else 0
        now = {layers[i] for i in grass.active_layers}
        off = each * sum(share[name] for name in seen - now)
        assert -landing - pad <= states.host_bytes - off <= pad, (step, states.host_bytes, off)
    assert len(seen) > 3


@scenarios(*at_each(state_bytes, torch.bfloat16, name="bf16"), *at_each(state_bytes, torch.float32, name="fp32"))
def test_states_are_in_slots_or_on_the_host(runs):
    assert runs == [None, None]


# Checkpoints.


def checkpoint(rank: int, world_size: int, stage: int, folder: str, dtype: torch.dtype) -> list[str]:
    """Saved in the probe, between a draw and its switch, and at a switch: continues as if nothing had happened.

    Returns the names of the files of one checkpoint.
    """
    config = ds_config(stage, SETTINGS, 1, dtype)
    engine = make_engine(config, dtype)
    saved = {}
    for step in range(10):
        if step in (1, 4, 8):
            before = weights_of(engine)
            engine.save_checkpoint(folder, tag=f"at{step}", client_state={"mine": step})
            assert same(before, weights_of(engine))
            masters = get_fp32_state_dict_from_zero_checkpoint(folder, f"at{step}")
            for name, weight in before.items():
                assert torch.equal(masters[name].to(dtype).float(), weight), name
            saved[step] = (engine.grass.state_dict(), before)
        train_step(engine, step, rank, world_size, 1)
    end, told = weights_of(engine), engine.grass.state_dict()
    engine.destroy()
    for at in saved:
        again = make_engine(config, dtype)
        train_step(again, 50, rank, world_size, 1)  # it need not be a fresh one
        _, client = again.load_checkpoint(folder, tag=f"at{at}")
        assert client["mine"] == at and repr(again.grass.state_dict()) == repr(saved[at][0])
        assert same(weights_of(again), saved[at][1])
        for step in range(at, 10):
            train_step(again, step, rank, world_size, 1)
        assert same(weights_of(again), end), at
        assert repr(again.grass.state_dict()) == repr(told)
        again.destroy()
    return sorted(path.name for path in Path(folder, "at4").iterdir())


@scenarios(*at_each(checkpoint, FOLDER, torch.bfloat16))
def test_a_checkpoint_continues_and_has_the_files_of_deepspeed(runs, stage):
    files = runs[0]
    model = "zero_pp_rank_{}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    states = [f for f in files if f.endswith("optim_states.pt")]
    assert len(states) == 2 and {model.format(rank) for rank in (0, 1)} <= set(files)


def full_and_back(rank: int, world_size: int, stage: int, folder: str, dtype: torch.dtype) -> None:
    """A checkpoint of full fine-tuning is the start of GRASS, and the other way round."""
    config = ds_config(stage, None, 1, dtype, zero_allow_untested_optimizer=True)
    stock = make_engine(config, dtype)
    for step in range(2):
        train_step(stock, step, rank, world_size, 1)
    stock.save_checkpoint(f"{folder}/full", tag="t")
    weights = weights_of(stock)
    masters = get_fp32_state_dict_from_zero_checkpoint(f"{folder}/full", "t")
    stock.destroy()
    for roles in ([], ["embeddings", "final_norm", "lm_head"]):
        engine = make_engine(ds_config(stage, {**SETTINGS, "always_active": roles}, 1, dtype), dtype)
        engine.load_checkpoint(f"{folder}/full", tag="t")
        assert same(weights_of(engine), weights)
    engine.save_checkpoint(f"{folder}/grass", tag="t")
    again = get_fp32_state_dict_from_zero_checkpoint(f"{folder}/grass", "t")
    assert all(torch.equal(again[n], masters[n]) for n in again)
    for step in range(2, 8):
        train_step(engine, step, rank, world_size, 1)
    engine.save_checkpoint(f"{folder}/grass", tag="u")
    weights = weights_of(engine)
    engine.destroy()
    back = make_engine(config, dtype)
    # ZeRO-3 loads no weights unless it is told that the optimizer states do not come
    back.load_checkpoint(f"{folder}/grass", tag="u", load_module_only=True, load_optimizer_states=False)
    assert same(weights_of(back), weights)
    train_step(back, 8, rank, world_size, 1)
    back.destroy()


@scenarios(*at_each(full_and_back, FOLDER, torch.bfloat16))
def test_full_fine_tuning_goes_on_with_grass_and_back(runs):
    assert runs == [None, None]


def weights_only(rank: int, world_size: int, stage: int, folder: str) -> None:
    """load_module_only: the weights come, masters and moments begin again."""
    engine = make_engine(ds_config(stage, SETTINGS, 1))
    for step in range(7):
        train_step(engine, step, rank, world_size, 1)
    engine.save_checkpoint(folder, tag="t")
    weights = weights_of(engine)
    for step in range(7, 9):
        train_step(engine, step, rank, world_size, 1)
    engine.save_checkpoint(folder, tag="newer")
    before = engine.grass.changed_since(engine.grass.step)
    engine.load_checkpoint(folder, tag="t", load_module_only=True)
    assert same(weights_of(engine), weights)
    assert before == () and engine.grass.changed_since(engine.grass.step) == (*engine.grass.layers, *engine.grass.roles)
    active = engine.grass.active_layers
    train_step(engine, 9, rank, world_size, 1)
    moved = {
        n.split(".")[2] for n, w in weights_of(engine).items() if "layers." in n and not torch.equal(w, weights[n])
    }
    assert moved == {str(i) for i in active}


@scenarios(*at_each(weights_only, FOLDER))
def test_weights_are_loaded_alone(runs):
    assert runs == [None, None]


# A model under zero.Init.


def zero_init(rank: int, world_size: int, stage: int) -> dict[str, Any]:
    """A model that is partitioned as it is made."""
    config = ds_config(stage, SETTINGS, 1)
    stock = {k: v for k, v in config.items() if k != "grass"}
    with deepspeed.zero.Init(config_dict_or_path=stock):
        model = small_llama()
    assert all(p.numel() == 0 and hasattr(p, name) for p in model.parameters() for name in PARAMETER)
    for p, whole in zip(model.parameters(), small_llama().parameters(), strict=True):  # other draws than in one piece
        with torch.no_grad(), deepspeed.zero.GatheredParameters([p], modifier_rank=0):
            p.copy_(whole)
    engine = make_engine(config, model=model)
    active = []
    for step in range(STEPS):
        active.append(engine.grass.active_layers)
        train_step(engine, step, rank, world_size, 1)
    return {"active": active, "params": weights_of(engine)}


@scenarios(at(3, zero_init))
def test_a_model_that_is_partitioned_as_it_is_made(runs, reference):
    run = runs[0]
    assert run["active"] == reference["active"]
    assert max((run["params"][n] - p).abs().max().item() for n, p in reference["params"].items()) <= 5e-6


# Weights on the host.


def on_host(rank: int, world_size: int, stage: int, folder: str, dtype: torch.dtype) -> int:
    """Shards rest where they were first, trained or not; the run, its checkpoint and its resume are those without.

    Returns the number of layers that have trained.
    """
    weights, seen = [], set()
    for zero in ({}, HOST):
        config = ds_config(stage, SETTINGS, 1, dtype, zero)
        with deepspeed.zero.Init(config_dict_or_path={k: v for k, v in config.items() if k != "grass"}):
            model = small_llama(dtype)
        for p, whole in zip(model.parameters(), small_llama(dtype).parameters(), strict=True):
            with torch.no_grad(), deepspeed.zero.GatheredParameters([p], modifier_rank=0):
                p.copy_(whole)
        homes = {n: p.ds_tensor.data_ptr() for n, p in model.named_parameters()}
        engine = make_engine(config, dtype, model=model)
        for step in range(STEPS):
            if step == 7:
                engine.save_checkpoint(f"{folder}/{len(weights)}", tag="seven")
            grass = engine.grass
            active = {grass.layers[i].name for i in grass.active_layers} if grass.phase == "train" else set()
            seen |= active
            train_step(engine, step, rank, world_size, 1)
            if zero:
                after = {grass.layers[i].name for i in grass.active_layers}  # all of them while the probe goes on
                resting = [n for n in homes if ".layers." in n and not n.startswith(tuple(f"{a}." for a in after))]
                assert all(model.get_parameter(n).ds_tensor.data_ptr() == homes[n] for n in resting)
        weights.append(weights_of(engine))
        engine.destroy()
    again = make_engine(ds_config(stage, SETTINGS, 1, dtype, HOST), dtype)
    again.load_checkpoint(f"{folder}/1", tag="seven")
    for step in range(7, STEPS):
        train_step(again, step, rank, world_size, 1)
    assert same(weights[0], weights[1]) and same(weights[0], weights_of(again))
    return len(seen)


@scenarios(at(3, on_host, FOLDER, torch.bfloat16, name="bf16"), at(3, on_host, FOLDER, torch.float32, name="fp32"))
def test_weights_that_rest_on_the_host_change_nothing(runs):
    assert runs[0] > 3


# What a copy of the model has to be given.


PREFETCHES = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 2000}
"""As of a large model: nothing stays gathered, and an evaluation leaves weights in flight."""


class Receiver:
    """A copy of the weights on rank 0, which `WeightSync` fills."""

    def __init__(self, rank: int) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.put = self._take if rank == 0 else None

    def _take(self, name: str, weights: torch.Tensor) -> None:
        self.weights[name] = weights.clone()

    @staticmethod
    def gone(name: str, weights: torch.Tensor) -> None:
        raise ConnectionError("the server is gone")


def follow(rank: int, grass, sync: WeightSync, model, train: Callable[[int], Any], whole: Callable) -> list[str]:
    """Trains, evaluates, and carries to a copy what has changed. Returns what is wrong."""
    copied, wrong = Receiver(rank), []
    for step in range(8):
        units = grass.trainable_units() if grass.phase == "train" else []
        before, at = whole(), grass.step
        train(step)
        after = whole()
        moved = {name for name, weights in after.items() if not torch.equal(weights, before[name])}
        told = {fqn(name) for unit in grass.changed_since(at) for name, _ in unit.params}
        if step % 4 == 3:  # DeepSpeed prefetches once it has seen some steps without an evaluation
            with torch.no_grad():
                model(input_ids=global_batch(step, 2))
        if step == 4:
            with pytest.raises((ConnectionError, GrassError), match="the server is gone"):
                sync.push(Receiver.gone if rank == 0 else None)
        done = sync.push(copied.put)
        expected = {fqn(name) for unit in units for name, _ in unit.params} if step else set(before)
        wrong += ["names"] if set(done.names) != expected else []
        wrong += ["told"] if told != moved else []
        wrong += ["copy"] if rank == 0 and not same(copied.weights, after) else []
    return wrong


def synced(rank: int, world_size: int, stage: int, folder: str) -> dict[str, Any]:
    engine = make_engine(ds_config(stage, SETTINGS, 1, zero=PREFETCHES))
    grass, sync = engine.grass, WeightSync(engine.module, engine)
    train = partial(train_step, engine, rank=rank, world_size=world_size, accumulation=1)
    told: dict[str, Any] = {"zero": follow(rank, grass, sync, engine, train, lambda: weights_of(engine))}
    resting = next(unit for unit in grass.layers if unit.index not in grass.active_layers)
    safe_set_full_fp32_param(resting.params[0][1], full(resting.params[0][1]) + 1)
    told["set"] = [unit.name for unit in grass.changed_since(grass.step)] == [resting.name]
    engine.save_checkpoint(folder, tag="t")
    engine.load_checkpoint(folder, tag="t")
    told["loaded"] = len(sync.push(None).names) == len(weights_of(engine))
    engine.destroy()
    model = wrapped(small_llama(), "fsdp2", world_size)
    optimizer = GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=GrassConfig(**SETTINGS))

    def train(step: int) -> None:
        x = global_batch(step, 2 * world_size)[2 * rank : 2 * rank + 2]
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def whole() -> dict[str, torch.Tensor]:
        return {name: full_tensor(param).clone() for name, param in model.named_parameters()}

    told["fsdp2"] = follow(rank, optimizer.grass, WeightSync(model, optimizer), model, train, whole)
    return told


@scenarios(at(2, synced, FOLDER), at(3, synced, FOLDER))
def test_a_copy_is_given_what_has_changed_and_no_more(runs):
    assert runs == [{"zero": [], "set": True, "loaded": True, "fsdp2": []}] * 2
