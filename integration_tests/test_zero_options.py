"""Under ZeRO: boundaries set by hand, saves between micro-batches, other numbers of ranks, and what a folder tells."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param
from torch import nn
from typer.testing import CliRunner

import grass_dist
from grass_dist.backends.zero.private import SECONDARY
from grass_dist.checkpoint.deepspeed_save import DeepSpeedSnapshot
from grass_dist.checkpoint.saving import write_snapshot
from grass_dist.checkpoint.zero_run import ZeroHoldings
from grass_dist.cli import app
from grass_dist.ranks import world
from integration_tests.support.model import ADAMW, LAYERS, LENGTH, global_batch, small_llama
from integration_tests.support.ranks import refused, run_ranks
from integration_tests.support.scenarios import FOLDER, Spawn, scenarios
from integration_tests.support.zero import ds_config, full, make_engine, micro_batch, train_step

pytestmark = [pytest.mark.long, pytest.mark.timeout(420)]

SETTINGS = {"active_layers": 2, "sampling_interval": 2, "update_interval": 2, "probe_steps": 2, "seed": 3}
EVEN = {**SETTINGS, "probe_steps": 0, "sampler": "cyclic", "active_layers": 4}
TWO = Spawn(2, before=gc.freeze, timeout=400)


def weights_of(engine) -> dict[str, torch.Tensor]:
    return {name: full(param) for name, param in engine.module.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def at_each(function, *args: Any, stages: tuple[int, ...] = (1, 2, 3)) -> list[Any]:
    named = "".join(f"{arg}, " for arg in args if isinstance(arg, str))
    return [pytest.param(TWO(function, stage, *args), id=f"{named}stage{stage}") for stage in stages]


# Compilation.


def compiled(rank: int, world_size: int, stage: int) -> dict[str, Any]:
    """The same run with `engine.compile()` and without; a backend that counts graphs and runs them as they are."""
    graphs: list[int] = []

    def counting(graph: torch.fx.GraphModule, _: list) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    told: dict[str, Any] = {}
    for way in ("plain", "compiled"):
        torch._dynamo.reset()
        engine = make_engine(ds_config(stage, {**SETTINGS, "sampling_interval": 1, "update_interval": 1}))
        if way == "compiled":
            engine.compile(backend=counting)
            assert engine.is_compiled
        counts = []
        for step in range(24):
            train_step(engine, step, rank, world_size, 1)
            counts.append(len(graphs))
        told[way] = weights_of(engine), counts
        engine.destroy()
    return told


@scenarios(*at_each(compiled))
def test_compile_makes_few_graphs_whatever_is_drawn(runs):
    for told in runs:
        (plain, none), (weights, counts) = told["plain"], told["compiled"]
        print("graphs after each step", counts)
        assert none[-1] == 0 < counts[-1] and same(plain, weights)
        assert counts[-1] == counts[12], "no draw makes another graph"


# Boundaries by hand.


def by_hand(rank: int, world_size: int, stage: int) -> dict[str, Any]:
    """Two micro-batches a step: counted by DeepSpeed, said by the caller, or in a block that reduces at its end."""

    def backward(engine, step: int, micro: int) -> None:
        x = micro_batch(step, micro, rank, world_size, 2)
        engine.backward(engine(input_ids=x, labels=x).loss / (1 if counted else 2))

    told = {}
    for way in ("counted", "said", "block"):
        counted = way == "counted"
        engine = make_engine(ds_config(stage, SETTINGS, 2 if counted else 1))
        for step in range(6):
            if counted:
                train_step(engine, step, rank, world_size, 2)
            elif way == "said":
                for micro in range(2):
                    engine.set_gradient_accumulation_boundary(micro == 1)
                    backward(engine, step, micro)
                engine.step()
            else:
                with engine.coalesce_grad_reduction():
                    backward(engine, step, 0)
                    backward(engine, step, 1)
                engine.step()
        grass = engine.grass
        told[way] = (grass.importances, grass.active_layers, grass.bytes_reduced, weights_of(engine))
        engine.destroy()
    return told


@scenarios(*at_each(by_hand))
def test_a_boundary_by_hand_is_as_one_that_is_counted(runs):
    for told in runs:
        importances, active, reduced, weights = told["counted"]
        for way in ("said", "block"):
            assert told[way][1] == active, way
            assert told[way][0] == pytest.approx(importances, rel=1e-5), way
            assert max((told[way][3][n] - w).abs().max().item() for n, w in weights.items()) < 5e-6, way
        assert told["said"][2] == reduced


# Saves between micro-batches.


def saved_between(rank: int, world_size: int, stage: int, folder: str) -> dict[str, Any]:
    """Saved after one micro-batch of two, before and after every layer has trained."""
    config, told = ds_config(stage, EVEN, 2, torch.bfloat16), {}
    engine = make_engine(config, torch.bfloat16)

    def half(step: int, micro: int) -> None:
        x = micro_batch(step, micro, rank, world_size, 2)
        engine.backward(engine(input_ids=x, labels=x).loss)
        engine.step()

    half(0, 0)
    told["early"] = refused(lambda: engine.save_checkpoint(folder, tag="early"))
    half(0, 1)
    for step in range(1, 5):
        train_step(engine, step, rank, world_size, 2)
    at = weights_of(engine)
    half(5, 0)
    engine.save_checkpoint(folder, tag="half")
    half(5, 1)
    for step in range(6, 8):
        train_step(engine, step, rank, world_size, 2)
    end = weights_of(engine)
    engine.destroy()
    for saves in (False, True):  # a run without a save between; one that goes on from it
        engine = make_engine(config, torch.bfloat16)
        if saves:
            engine.load_checkpoint(folder, tag="half")
            told["where it was"] = same(weights_of(engine), at) and engine.grass.step == 5
        for step in range(5 if saves else 0, 8):
            train_step(engine, step, rank, world_size, 2)
        told["loaded" if saves else "without a save"] = same(weights_of(engine), end)
        engine.destroy()
    return told


@scenarios(*at_each(saved_between, FOLDER))
def test_a_save_between_micro_batches(runs):
    for told in runs:
        sentence = told.pop("early")
        assert "after 1 of 2 micro-batches" in sentence and "has not trained yet" in sentence, sentence
        assert told == {"where it was": True, "loaded": True, "without a save": True}


# Folders.


def saved(rank: int, world_size: int, stage: int, folder: str) -> dict[str, Any]:
    engine = make_engine(ds_config(stage, SETTINGS, 1))
    engine.train()
    engine.train()
    for step in range(3):
        train_step(engine, step, rank, world_size, 1)
    engine.save_checkpoint(folder + "/engine")
    grass_dist.save_checkpoint(folder + "/ours", engine, 3)
    scale = engine.optimizer.loss_scale_config
    return {
        "step": engine.grass.step,
        "phase": engine.grass.phase,
        "round": engine.grass.round,
        "active_layers": list(engine.grass.active_layers),
        "scale": (scale.cur_scale, scale.dynamic_loss_scale),
        "defaults": engine.optimizer.defaults["lr"],
    }


def loaded_by_another_number(rank: int, world_size: int, stage: int, folder: str) -> str:
    engine = make_engine(ds_config(stage, SETTINGS, 1))
    told = refused(lambda: engine.load_checkpoint(folder + "/engine"))
    assert grass_dist.load_checkpoint(folder + "/ours", engine) == (3, {})
    return told


@pytest.mark.parametrize("stage", [1, 3])
def test_the_folder_of_a_save_is_read_and_says_which_ranks(stage, tmp_path: Path):
    told = run_ranks(2, saved, stage, str(tmp_path))[0]
    assert told.pop("scale") == (1.0, False) and told.pop("defaults") == ADAMW["lr"]
    for folder in (tmp_path / "engine", tmp_path / "engine" / "global_step3"):
        shown = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
        assert shown.exit_code == 0, shown.output
        found = json.loads(shown.stdout)
        assert {key: found[key] for key in told} == told and found["ranks"] == 2
        assert found["config"]["active_layers"] == 2 and found["folder"].endswith("global_step3")
        assert "3 steps done" in CliRunner().invoke(app, ["inspect", str(folder)]).stdout
        ended = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / "out")])
        assert ended.exit_code and "zero_to_fp32" in ended.output and "global_step3" in ended.output
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "ours"), "--json"])
    assert json.loads(shown.stdout)["newest_good"]["step"] == 3
    ended = CliRunner().invoke(app, ["export", str(tmp_path / "ours"), str(tmp_path / "out")])
    assert "has no model/config.json" in ended.output
    sentence = run_ranks(1, loaded_by_another_number, stage, str(tmp_path))[0]
    assert "was saved by 2 ranks and this run has 1" in sentence and "grass_dist.save_checkpoint" in sentence


def attributes(rank: int, world_size: int, stage: int) -> list[str]:
    """Public attributes that the optimizer of a stock engine has and that of GRASS has not."""
    seen: list[set[str]] = []
    for settings in (None, EVEN):
        engine = make_engine(ds_config(stage, settings, 1, zero_allow_untested_optimizer=True))
        zero = engine.optimizer
        seen.append({name for name in dir(zero) if not name.startswith("_") and hasattr(zero, name)})
        engine.destroy()
    return sorted(seen[0] - seen[1])


@scenarios(*at_each(attributes))
def test_the_optimizer_has_the_attributes_of_stock(runs):
    assert runs == [[], []]


# Precision as configured.

BF16 = {"bf16": {"enabled": True}}
BF16_STATES = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
ADAGRAD = {"type": "Adagrad", "params": {"lr": 1e-2, "initial_accumulator_value": 0.1}}
WITHOUT_SCATTER = {"zero_optimization": {"reduce_scatter": False}}
CAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
CONFIGURED: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "bf16 on the wire": ((1, 2, 3), {"communication_data_type": "bf16"}),
    "fp32 on the wire": ((1, 2, 3), {**BF16, "communication_data_type": "fp32"}),
    "sums in fp32": ((2, 3), {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}),
    "buffers in fp32": ((2,), {**BF16, "data_types": {"keep_in_fp32_modules": ["*inv_freq*"]}}),
    "masters and moments in bf16": ((1, 2, 3), BF16_STATES),
    "adagrad": ((1, 2, 3), {**BF16, "optimizer": ADAGRAD}),
    "scaled before": ((1,), {"prescale_gradients": True}),
    "scaled before without scatter": ((2, 3), {"prescale_gradients": True, **WITHOUT_SCATTER}),
    "divided before": ((1,), {"gradient_predivide_factor": 2.0}),
    "divided before without scatter": ((2, 3), {"gradient_predivide_factor": 4.0, **WITHOUT_SCATTER}),
}
"""Options, by what they do: stages at which they run, and the options."""


def engine_of(config: dict[str, Any], dtype: torch.dtype) -> Any:
    """An engine with the optimizer of the configuration, or with AdamW."""
    model = small_llama(dtype)
    if "optimizer" in config:
        return grass_dist.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return grass_dist.initialize(model=model, optimizer=optimizer, config=config)[0]


def like_stock(rank: int, world_size: int, stage: int, options: dict[str, Any]) -> dict[str, float]:
    """Largest difference of a weight from stock with all layers, and how often weights moved with two layers."""
    zero = options.get("zero_optimization")
    more = {key: value for key, value in options.items() if key != "zero_optimization"}
    dtype = torch.bfloat16 if "bf16" in options else torch.float32
    ended: list[dict[str, torch.Tensor]] = []
    moved = {True: 0, False: 0}
    for active in (None, LAYERS, 2):
        settings = active and {**EVEN, "active_layers": active}
        more |= {"gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}
        config = ds_config(stage, settings, 2, dtype, zero) | more
        engine = engine_of(config, dtype)
        for step in range(4):
            before, trains = weights_of(engine), engine.grass.active_layers if active == 2 else range(LAYERS)
            train_step(engine, step, rank, world_size, 2)
            for name, weight in weights_of(engine).items():
                if "layers" in name:
                    moved[int(name.split(".")[2]) in trains] += not torch.equal(weight, before[name])
        ended.append(weights_of(engine))
        engine.destroy()
    difference = max((ended[0][name] - weight).abs().max().item() for name, weight in ended[1].items())
    return {"difference": difference, "moved": moved[True], "frozen moved": moved[False]}


CASTS = Spawn(2, before=gc.freeze, timeout=400)
"""DeepSpeed remembers a cast for the whole process."""


@scenarios(
    *(
        pytest.param(TWO(like_stock, stage, options), id=f"{name}, stage {stage}")
        for name, (stages, options) in CONFIGURED.items()
        for stage in stages
    ),
    *(pytest.param(CASTS(like_stock, stage, CAST), id=f"torch_autocast, stage {stage}") for stage in (1, 2, 3)),
)
def test_precision_as_configured_is_that_of_stock(runs):
    for told in runs:
        assert told["difference"] == 0.0 and told["frozen moved"] == 0 and told["moved"] > 100, told


KEPT = {"bf16": (BF16_STATES, {torch.bfloat16}), "adagrad": ({**BF16, "optimizer": ADAGRAD}, {torch.float32})}


def goes_on(rank: int, world_size: int, stage: int, name: str, folder: str) -> dict[str, Any]:
    """Whether a new engine goes on as the old one does, saved in three ways; and whether states have their dtypes."""
    options, dtypes = KEPT[name]
    config = ds_config(stage, SETTINGS, 1, torch.bfloat16) | options
    engine, told = engine_of(config, torch.bfloat16), {}
    for step in range(8):
        if step == 5:
            engine.save_checkpoint(folder + "/engine")
            grass_dist.save_checkpoint(folder + "/ours", engine, step)
            snapshot = DeepSpeedSnapshot.take(ZeroHoldings(engine), step)  # as the training program saves
            write_snapshot(Path(folder) / "theirs", snapshot, world(), keep=1)
        train_step(engine, step, rank, world_size, 1)
    end = weights_of(engine)
    found = (own.tensors() for own in engine.optimizer.states.of.values())
    told["dtypes"] = {tensor.dtype for tensors in found for tensor in tensors if tensor.numel() > 1} == dtypes
    engine.destroy()
    for way in ("engine", "ours", "theirs"):
        again = engine_of(config, torch.bfloat16)
        train_step(again, 50, rank, world_size, 1)
        if way == "engine":
            again.load_checkpoint(folder + "/engine")
        else:
            grass_dist.load_checkpoint(f"{folder}/{way}", again)
        for step in range(5, 8):
            train_step(again, step, rank, world_size, 1)
        told[way] = same(weights_of(again), end)
        again.destroy()
    return told


@scenarios(*at_each(goes_on, "bf16", FOLDER), *at_each(goes_on, "adagrad", FOLDER))
def test_other_states_are_saved_and_go_on(runs):
    assert runs == [{"dtypes": True, "engine": True, "ours": True, "theirs": True}] * 2


# hpZ: weights are gathered from a copy that a few ranks share.


def copied_in_pairs(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Four ranks of which two share copies: against stock with all layers, and against no copies with two layers."""
    told, pairs = {}, {"zero_optimization": {"zero_hpz_partition_size": 2}}
    ended = []
    for zero in ({}, pairs["zero_optimization"]):  # DeepSpeed remembers pairs for the whole process
        engine = make_engine(ds_config(3, SETTINGS, 1, torch.bfloat16, zero), torch.bfloat16)
        for step in range(6):
            if step == 5:
                engine.save_checkpoint(folder, tag=f"t{len(zero)}")  # which drops all copies
            train_step(engine, step, rank, world_size, 1)
        rests = next(i for i in range(LAYERS) if i not in engine.grass.active_layers)
        weight = engine.grass.layers[rests].params[0][1]
        copied = getattr(weight, SECONDARY, None) is not None
        value = torch.full(weight.ds_shape, 0.01)
        if copied:
            told["local"] = refused(lambda p=weight, v=value: safe_set_local_fp32_param(p, v.flatten()))
        safe_set_full_fp32_param(weight, value)
        train_step(engine, 6, rank, world_size, 1)
        was_set = full(weight)
        engine.load_checkpoint(folder, tag=f"t{len(zero)}")
        for step in range(5, 8):
            train_step(engine, step, rank, world_size, 1)
        ended.append(weights_of(engine))
        told["copied" if zero else "not copied"] = copied, was_set.unique().tolist() if zero else None
        engine.destroy()
    told["stock"] = like_stock(rank, world_size, 3, {**BF16, **pairs})
    return {**told, "as without": same(*ended)}


def test_zero_copies_in_pairs_train_as_without(tmp_path: Path):
    for told in run_ranks(4, copied_in_pairs, str(tmp_path), timeout=300):
        assert told["stock"]["difference"] == 0.0 and told["stock"]["frozen moved"] == 0
        assert told["as without"] and told["copied"][0] and not told["not copied"][0], told
        assert len(told["copied"][1]) == 1 and "zero_hpz_partition_size" in told["local"], told


# Ulysses.


def sequence_parallel(rank: int, world_size: int) -> dict[int, tuple[float, float, float]]:
    """By stage: difference from stock, and by how much importances of a probe and of training differ, and weights."""
    deepspeed.init_distributed("gloo", verbose=False)
    model = small_llama()
    model.config._attn_implementation = "sdpa"
    about = {"core_attn_implementation": "sdpa", "sequence_parallel_size": 2, "micro_batch_size": 1}
    mpu = UlyssesSPAttentionHF.register_with_transformers(model, **about)

    def engine_of(stage: int, settings: dict[str, Any] | None, lr: float = ADAMW["lr"]) -> Any:
        model = small_llama()
        model.set_attn_implementation("sdpa")
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, eps=ADAMW["eps"])
        config = ds_config(stage, settings, 1, zero_allow_untested_optimizer=True, gradient_clipping=0.0)
        return grass_dist.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)[0]

    def step(engine: Any, number: int) -> None:
        whole, half = global_batch(number, 1), LENGTH // 2
        part = slice(rank * half, (rank + 1) * half)
        labels = torch.cat([whole[:, 1:], torch.full((1, 1), -100)], dim=1)[:, part]
        places = torch.arange(LENGTH)[None, part]
        logits = engine(input_ids=whole[:, part], position_ids=places).logits
        engine.backward(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
        engine.step()

    told = {}
    for stage in (1, 2, 3):
        ended = []
        for settings in (None, {**EVEN, "active_layers": LAYERS}):
            engine = engine_of(stage, settings)
            for number in range(3):
                step(engine, number)
            ended.append(weights_of(engine))
            engine.destroy()
        engine = engine_of(stage, {**SETTINGS, "active_layers": LAYERS, "ema_alpha": 1.0, "draw_ahead": 0}, lr=0.0)
        seen = []
        for _ in range(5):
            step(engine, 0)
            seen.append(engine.grass.importances)
        engine.destroy()
        apart = max(abs(a - b) / a for a, b in zip(seen[1], seen[4], strict=True))
        told[stage] = max((ended[0][n] - w).abs().max().item() for n, w in ended[1].items()), apart, sum(seen[1])
    return told


def test_ulysses_through_an_mpu_trains_like_stock():
    for told in run_ranks(2, sequence_parallel, timeout=240):
        for stage, (difference, apart, importance) in told.items():
            assert difference <= 1e-6 and apart < 1e-4 and importance > 0, (stage, told)
