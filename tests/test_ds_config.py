"""backends/zero/ds_config.py on dicts and files: what is read, what is refused, and what DeepSpeed gets."""

from __future__ import annotations

import base64
import builtins
import copy
import json
from collections import UserDict
from collections.abc import Iterator
from enum import Enum
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import create_model

from grass_dist.backends.zero.ds_config import (
    OPTIMIZER_TYPES,
    REFUSED,
    has_grass,
    load_ds_config,
    refuse_factor,
    split_ds_config,
)
from grass_dist.config import GrassConfig
from grass_dist.errors import ConfigError
from grass_dist.states.update_rule import ELEMENTWISE

PLAIN: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
}
# The values that each row of the table refuses, and some that it takes.
VALUES: dict[str, tuple[list[Any], list[Any]]] = {
    "zero_optimization.offload_param.device": (["nvme", "NVMe"], ["none"]),
    "zero_optimization.offload_optimizer.device": (["gpu"], ["none", "cpu"]),
    "zero_optimization.offload_optimizer.super_offload": ([True], [False]),
    "zero_optimization.zenflow": ([{}, {"topk_ratio": 0.1}, True], [False]),
    "zero_optimization.zero_quantized_weights": ([True, "true"], [False]),
    "zero_optimization.zero_quantized_nontrainable_weights": ([True], [False]),
    "zero_optimization.zero_quantized_gradients": ([True, 1], [False, 0]),
    "zero_optimization.mics_shard_size": ([1, 8], [-1, 0]),
    "zero_optimization.mics_hierarchical_params_gather": ([True], [False]),
    "zero_optimization.stage3_module_granularity_threshold": ([1, 5e5], [0]),
    "zero_optimization.module_granularity_threshold": ([1], [0]),
    "zero_optimization.legacy_stage1": ([True], [False]),
    "zero_optimization.parameter_alignment": ([True], [False]),
    "zero_optimization.compute_grad_norm": ([False, "false"], [True]),
    "optimizer.params.max_grad_norm": ([0.0, 1.0], []),
    "zero_allow_untested_optimizer": ([False], [True]),
    "amp.enabled": ([True], [False]),
    "fp16.fp16_master_weights_and_grads": ([True], [False]),
    "compile.deepcompile": ([True], [False]),
    "gradient_allreduce_op": (["sum", "SUM"], ["mean"]),
    "sparse_gradients": ([True], [False]),
    "managed_gradient_accumulation": ([False], [True]),
    "tensor_parallel.autotp_size": ([2], [0, 1]),
    "pipeline.stages": ([2, 4], [1]),
    "expert_parallel.enabled": ([True], [False]),
    "moe.enabled": ([True], [False]),
    "elasticity.enabled": ([True], [False]),
    "progressive_layer_drop.enabled": ([True], [False]),
    "data_efficiency.data_routing.random_ltd.enabled": ([True], [False]),
    "eigenvalue.enabled": ([True], [False]),
    "quantize_training": (
        [{"quantize_bits": {}}, {"enabled": True}, True],
        [False, {}, {"enabled": False, "quantize_bits": {"start_bits": 16}}],
    ),
    "compression_training": (
        [{"weight_quantization": {}}, {"layer_reduction": {"enabled": True}, "head_pruning": {"enabled": False}}],
        [{}, {"layer_reduction": {"enabled": False}, "row_pruning": {"shared_parameters": {"enabled": "false"}}}],
    ),
    "weight_quantization": ([{"num_bits": 8}, {"enabled": True}], [{}, {"enabled": False}]),
    "hybrid_engine.enabled": ([True], [False]),
}
# Top-level keys of DeepSpeed 0.16 to 0.19, none of which may look like a misspelt block.
DEEPSPEED = """
    activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comms_logger communication_data_type compile
    compression_training csv_monitor curriculum_learning data_efficiency data_types dataloader_drop_last
    datastates_config disable_allgather disable_python_gc dump_state eigenvalue elasticity expert_parallel
    flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor
    graph_harvesting hybrid_engine log_level managed_gradient_accumulation memory_breakdown monitor_config nebula
    optimizer pipeline prescale_gradients progressive_layer_drop quantize_training scheduler
    seq_parallel_communication_data_type sequence_parallel_size sparse_attention sparse_gradients steps_per_print
    tensor_parallel tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb weight_quantization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
"""
DEEPSPEED_KEYS = DEEPSPEED.split()


def plus(changes: dict[str, Any], **grass: Any) -> dict[str, Any]:
    """A ds_config that works, with a GRASS block, changed at dotted paths."""
    config: dict[str, Any] = copy.deepcopy(PLAIN) | {"grass": grass}
    for path, value in changes.items():
        *sections, key = path.split(".")
        inner = config
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = value
    return config


def refusal(config: Any, call: Any = split_ds_config) -> ConfigError:
    """The error of ``call(config)``, which must be one sentence with field, value and fix."""
    before = copy.deepcopy(config)
    with pytest.raises(ConfigError) as caught:
        call(config)
    error = caught.value
    text = str(error)
    assert "\n" not in text and text.endswith(".") and not text.endswith("..") and len(text) < 400
    assert text.startswith(f"{error.field}={repr(error.value)[:38]}".strip()) and error.problem and error.fix
    assert config == before
    return error


def test_the_block_is_taken_out_and_the_rest_goes_to_deepspeed():
    config = plus({"bf16.enabled": True, "steps_per_print": 5}, active_layers=2, always_active=["lm_head"])
    before = copy.deepcopy(config)
    setup = split_ds_config(config)
    assert config == before
    assert setup.grass == GrassConfig(active_layers=2, always_active=("lm_head",))
    assert setup.ds_config == PLAIN | {
        "bf16": {"enabled": True},
        "steps_per_print": 5,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    assert setup.stage == 2 and setup.scheduler is None and setup.said == ()


def test_deepspeeds_changes_to_its_configuration_stay_in_it():
    config = plus({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.99]}}})
    setup = split_ds_config(config)
    setup.ds_config["zero_optimization"]["stage"] = 3
    setup.ds_config["optimizer"]["params"]["betas"].append(1)
    assert config == plus({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.99]}}})


# The block


def test_without_a_block_nothing_is_asked_of_the_configuration():
    assert not has_grass({})
    assert not has_grass({"zero_optimization": {"stage": 3, "zenflow": {}}, "pipeline": {"stages": 4}})
    assert not has_grass({key: {"enabled": True} for key in DEEPSPEED_KEYS})


@pytest.mark.parametrize("off", [None, False])
def test_null_and_false_switch_it_off(off):
    assert not has_grass({"grass": off})
    assert refusal(plus({"grass": off})).field == "grass"


@pytest.mark.parametrize("on", [{}, {"active_layers": 2}])
def test_an_empty_block_is_on(on):
    assert has_grass({"grass": on})


@pytest.mark.parametrize("value", [True, 0, 4, "on", "auto", [], ["active_layers"]])
def test_a_block_is_a_section(value):
    assert refusal({"grass": value}, has_grass).fix == 'write {"active_layers": 4} or leave it out'


@pytest.mark.parametrize(
    "key", ["gras", "grasss", "GRASS", "Grass", " grass", "_grass", "grass_config", "grass-dist", "grss", "garss"]
)
@pytest.mark.parametrize("other", [{}, {"grass": {}}])
def test_a_misspelt_block_is_named(key, other):
    error = refusal({key: {"active_layers": 2}, **other}, has_grass)
    assert error.field == key and error.fix == "did you mean 'grass'"


def test_a_block_inside_zero_optimization_is_named():
    error = refusal(PLAIN | {"zero_optimization": {"stage": 2, "grass": {"active_layers": 2}}}, has_grass)
    assert str(error) == (
        "zero_optimization.grass={'active_layers': 2}: the block stands inside zero_optimization, where DeepSpeed "
        "refuses it; move it to the top level of the ds_config."
    )


@pytest.mark.parametrize("path", ["bf16.grass", "optimizer.params.grass", "zero_optimization.offload_optimizer.GRASS"])
def test_a_block_inside_any_section_is_named(path):
    error = refusal(plus({path: {"active_layers": 2}}), has_grass)
    assert error.field == path and f"stands inside {path.rpartition('.')[0]}" in error.problem


@pytest.mark.parametrize("value", [None, False])
def test_a_nested_block_that_is_off_is_left_to_deepspeed(value):
    assert not has_grass({"zero_optimization": {"grass": value}})


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"active_layer": 2}, "grass.active_layer=2: there is no such setting; did you mean 'active_layers'."),
        ({"active_layers": 0}, "grass.active_layers=0: this value cannot be used; it should be"),
        ({"active_layers": "auto"}, "grass.active_layers='auto': "),
        ({"fixed_layers": [1]}, "grass.fixed_layers=(1,): is read by sampler='fixed' only"),
        ({"grass": {}}, "grass.grass={}: there is no such setting"),
        ({4: 4}, "grass.4=4: there is no such setting"),
    ],
)
def test_settings_are_named_below_grass(block, message):
    assert str(refusal(plus({"grass": block}))).startswith(message)


# What is refused


def test_every_row_of_the_table_has_samples():
    assert [path for path, *_ in REFUSED] == list(dict.fromkeys(path for path, *_ in REFUSED))
    assert {path for path, *_ in REFUSED} == set(VALUES)


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row[0])
def test_what_the_table_refuses(row):
    path, _, problem, fix = row
    bad, good = VALUES[path]
    for value in bad:
        error = refusal(plus({path: value}))
        assert (error.field, error.value, error.problem, error.fix) == (path, value, problem, fix)
    for value in [*good, None, "auto"]:
        split_ds_config(plus({path: value}))


def spellings(value: Any) -> Iterator[Any]:
    """The same setting as code may write it, and as DeepSpeed's own models read it."""
    yield Enum("Plain", {"MEMBER": value}).MEMBER
    if isinstance(value, bool):
        yield from (np.bool_(value), int(value), float(value))
        yield from ("true", "True", "YES", "on", "1", "t", "y") if value else ("false", "NO", "off", "0", "f", "n")
    elif isinstance(value, int | float):
        yield from (np.float32(value), np.float64(value), str(value), float(value))
        if value == int(value):
            yield from (np.int64(value), Enum("Whole", {"MEMBER": int(value)}, type=int).MEMBER)
    elif isinstance(value, str):
        yield from (np.str_(value), Enum("Text", {"MEMBER": value}, type=str).MEMBER, PurePosixPath(value))
        yield Enum("Nested", {"MEMBER": np.str_(value)}).MEMBER
        yield from (value.encode(), bytearray(value.encode()), Enum("Bytes", {"MEMBER": value.encode()}).MEMBER)
    elif isinstance(value, dict):
        yield UserDict(value)


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row[0])
def test_what_the_table_refuses_it_refuses_in_every_spelling(row):
    path, _, problem, fix = row
    bad, good = VALUES[path]
    for value in bad:
        for spelling in spellings(value):
            error = refusal(plus({path: spelling}))
            assert (error.field, error.problem, error.fix) == (path, problem, fix), spelling
            assert type(error.value) in (bool, int, float, str, dict), spelling
    for value in good:
        for spelling in spellings(value):
            split_ds_config(plus({path: spelling}))


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row[0])
def test_a_section_may_be_a_model(row):
    sections, key = row[0].split(".")[:-1], row[0].split(".")[-1]
    if not sections:
        pytest.skip("at the top level stands no section")
    for value in VALUES[row[0]][0]:
        written = create_model("Section", **{key: (Any, None), "unset": (int, 7)})(**{key: value})
        model = plus({".".join(sections): written})
        assert refusal(model).field == row[0]


def test_a_configuration_from_code_reaches_deepspeed_like_a_file():
    code = {
        "zero_optimization": {np.str_("stage"): np.int64(2), "overlap_comm": np.bool_(True)},
        "optimizer": {"type": "AdamW", "params": {"betas": (np.float64(0.9), 0.99)}},
        "tensorboard": {"output_path": PurePosixPath("runs/1")},
        "gradient_clipping": np.float64(0.5),
        "train_micro_batch_size_per_gpu": Enum("Size", {"ONE": 1}, type=int).ONE,
    }
    told = split_ds_config(code | {"grass": GrassConfig(active_layers=2)})
    assert told.grass == GrassConfig(active_layers=2)
    assert (
        json.loads(json.dumps(told.ds_config)).items()
        >= {
            "zero_optimization": {"stage": 2, "overlap_comm": True},
            "optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.99]}},
            "tensorboard": {"output_path": "runs/1"},
            "gradient_clipping": 0.5,
            "train_micro_batch_size_per_gpu": 1,
        }.items()
    )


@given(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.none()) | st.just({}))
def test_no_value_breaks_the_table(value):
    for path, refused, *_ in REFUSED:
        assert refused(value) in (True, False), path


@pytest.mark.parametrize(
    "stage", [-1, 4, 2.5, "2.5", "4", "", "true", float("nan"), float("inf"), b"\xff", True, False, None, "auto", [2]]
)
def test_stages_that_do_not_exist(stage):
    assert refusal(plus({"zero_optimization.stage": stage})).field == "zero_optimization.stage"


@pytest.mark.parametrize(
    "stage", [3, 3.0, "3", " 3 ", "3.0", b"3", np.float32(3), np.str_("3"), Enum("S", {"W": "3"}).W]
)
def test_stages_as_deepspeeds_own_model_reads_them(stage):
    setup = split_ds_config(plus({"zero_optimization.stage": stage}))
    assert setup.stage == 3 and type(setup.stage) is int
    assert (
        setup.ds_config["zero_optimization"] == {"stage": 3}
        and type(setup.ds_config["zero_optimization"]["stage"]) is int
    )
    zero = split_ds_config(plus({"zero_optimization.stage": 0.0}))
    assert zero.stage == 0 and zero.ds_config["zero_optimization"] == {"stage": 1} and len(zero.said) == 1


def test_bytes_that_are_no_text_are_left_to_deepspeed():
    assert load_ds_config({"tensorboard": {"job_name": b"\xff"}}) == {"tensorboard": {"job_name": b"\xff"}}


@pytest.mark.parametrize("micro", [{}, {"train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto"}])
def test_a_configuration_without_micro_batch(micro):
    error = refusal(micro | {"grass": {}})
    assert error.field == "train_micro_batch_size_per_gpu" and error.problem == "a ds_config without micro-batch"


@pytest.mark.parametrize("micro", [{"train_batch_size": 8}, {"train_micro_batch_size_per_gpu": 2}])
def test_one_batch_size_is_enough(micro):
    given = split_ds_config({"train_micro_batch_size_per_gpu": "auto"} | micro | {"grass": {}}).ds_config
    assert given.items() >= micro.items()


class Ulysses:
    """An mpu with so many ranks for a sequence."""

    def __init__(self, ranks: int) -> None:
        self.get_sequence_parallel_world_size = lambda: ranks


@pytest.mark.parametrize("more", [{}, {"data_parallel_size": 2}])
@pytest.mark.parametrize("size", [2, "2", 2.0, 1, 3])
@pytest.mark.parametrize("mpu", [None, Ulysses(2), Ulysses(3)])
def test_the_ranks_of_a_sequence_are_those_of_the_mpu(mpu, size, more):
    ranks = mpu.get_sequence_parallel_world_size() if mpu else 1
    config = plus({"sequence_parallel_size": size, **more})
    if int(size) == ranks and (ranks == 1 or not more):
        assert split_ds_config(config, mpu).ds_config["sequence_parallel_size"] == size
    else:
        error = refusal(config, lambda given: split_ds_config(given, mpu))
        assert error.field == "sequence_parallel_size" and "pass the mpu of Ulysses" in error.fix


@pytest.mark.parametrize("bf16", ["bf16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["fp32", "float32", "float", "torch.float32"])
@pytest.mark.parametrize("zero", [{"stage": 1}, {"stage": 0}, {}, True, False])
def test_fp32_accumulation_that_gets_another_optimizer(bf16, dtype, zero):
    changes = {f"{bf16}.enabled": True, "data_types.grad_accum_dtype": dtype}
    error = refusal(plus(changes | {"zero_optimization": zero}))
    assert error.field == "data_types.grad_accum_dtype" and "use stage 2" in error.fix
    for stage in (2, 3):
        split_ds_config(plus(changes | {"zero_optimization.stage": stage}))


@pytest.mark.parametrize(
    "changes",
    [
        {"data_types.grad_accum_dtype": "fp32"},
        {"data_types.grad_accum_dtype": "fp32", "bf16.enabled": False},
        {"data_types.grad_accum_dtype": "bf16", "bf16.enabled": True},
        {"data_types.grad_accum_dtype": None, "bf16.enabled": True},
        {"data_types.grad_accum_dtype": "fp32", "bf16.enabled": "auto"},
    ],
)
def test_accumulation_that_is_fine_at_stage_1(changes):
    setup = split_ds_config(plus(changes | {"zero_optimization.stage": 1}))
    assert setup.stage == 1
    assert setup.ds_config["data_types"]["grad_accum_dtype"] == changes["data_types.grad_accum_dtype"]


MASTERS = "bf16_master_weights_and_grads"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prescale_gradients": True}, "prescale_gradients"),
        ({"prescale_gradients": "true", "zero_optimization.stage": 3}, "prescale_gradients"),
        ({"gradient_predivide_factor": 2}, "gradient_predivide_factor"),
        ({"gradient_predivide_factor": 0.5, "zero_optimization.reduce_scatter": True}, "gradient_predivide_factor"),
        ({"gradient_predivide_factor": 2.0, "zero_optimization.stage": 3}, "gradient_predivide_factor"),
        *(
            ({"gradient_predivide_factor": odd, "zero_optimization.stage": 1}, "gradient_predivide_factor")
            for odd in (0, -1, "x", True, float("nan"), float("inf"))
        ),
        *(
            ({"torch_autocast": {"enabled": True, **dtype}}, "torch_autocast.dtype")
            for dtype in ({"dtype": "float16"}, {"dtype": "fp16"}, {}, {"dtype": None})
        ),
        *(
            ({f"{section}.{MASTERS}": True, f"{section}.enabled": True, **more}, f"{section}.{MASTERS}")
            for section in ("bf16", "bfloat16")
            for more in ({}, {f"{section}.bf16_optimizer_states": False})
        ),
    ],
)
def test_scaling_that_the_stage_cannot(changes, field):
    assert refusal(plus(changes)).field == field


@pytest.mark.parametrize(
    "changes",
    [
        {"prescale_gradients": True, "zero_optimization.stage": 0},
        {"prescale_gradients": True, "zero_optimization.reduce_scatter": False},
        {"gradient_predivide_factor": 2, "zero_optimization.stage": 1},
        {"gradient_predivide_factor": 0.5, "zero_optimization.reduce_scatter": False},
        {"gradient_predivide_factor": 1.0, "zero_optimization.stage": 3},
        {"gradient_predivide_factor": 4.0, "zero_optimization": {"stage": 3, "reduce_scatter": False}},
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        {"torch_autocast": {"enabled": False, "dtype": "float16"}},
        {"communication_data_type": "fp32", "bf16.enabled": True},
        {"bf16": {"enabled": True, MASTERS: True, "bf16_optimizer_states": True}},
    ],
)
def test_scaling_and_casts_that_run(changes):
    given = plus(changes)
    ds_config = split_ds_config(given).ds_config
    assert all(ds_config[path] == given[path] for path in changes if "." not in path)


@pytest.mark.parametrize(
    "kind",
    [
        *("OneBitAdam", "ZeroOneAdam", "OneBitLamb", "Muon", "muon", "Lamb", "MuAdam", "MuAdamW", "MuSGD"),
        *("LBFGS", "Adafactor", "SparseAdam", "Mine"),
    ],
)
def test_optimizers_that_partitions_or_frozen_layers_rule_out(kind):
    error = refusal(plus({"optimizer": {"type": kind, "params": {"lr": 1e-3}}}))
    assert error.field == "optimizer.type" and error.value == kind and "AdamW" in error.fix


def test_optimizers_that_work():
    kinds = OPTIMIZER_TYPES.split(", ")
    # Lion is DeepSpeed's.
    assert set(kinds) == {kind.__name__ for kind in ELEMENTWISE} | {"Lion"}
    for kind in [*kinds, "adamw", "ADAM", None, "auto"]:
        section = {"type": kind, "params": {"lr": 1e-3}}
        assert split_ds_config(plus({"optimizer": section})).ds_config["optimizer"] == section


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("zero_optimization", 2),
        ("zero_optimization", "stage2"),
        ("zero_optimization.offload_optimizer", "cpu"),
        ("zero_optimization.offload_optimizer", True),
        ("optimizer", "AdamW"),
        ("scheduler", "WarmupLR"),
        ("scheduler.params", [1]),
    ],
)
def test_what_must_be_a_section(path, value):
    error = refusal(plus({path: value}))
    assert (error.field, error.value, error.problem) == (path, value, "it must be a section")


# What is rewritten


@pytest.mark.parametrize("zero", [None, {}, {"stage": 0}, {"stage": 0, "overlap_comm": True}, False, "auto"])
def test_stage_0_runs_as_stage_1(zero):
    setup = split_ds_config(plus({"zero_optimization": zero}))
    rest = {key: value for key, value in zero.items() if key != "stage"} if isinstance(zero, dict) else {}
    assert setup.ds_config["zero_optimization"] == {"stage": 1, **rest}
    assert setup.stage == 0 and len(setup.said) == 1
    assert "runs as ZeRO-1 under GRASS: same gradients, states sharded rather than replicated" in setup.said[0]


def test_no_section_is_stage_0():
    setup = split_ds_config({"train_batch_size": 2, "gradient_clipping": 1.0, "grass": {}})
    assert setup.ds_config["zero_optimization"] == {"stage": 1} and setup.stage == 0 and len(setup.said) == 1


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_other_stages_stay(stage):
    setup = split_ds_config(plus({"zero_optimization.stage": stage}))
    assert setup.ds_config["zero_optimization"] == {"stage": stage} and setup.stage == stage and not setup.said


def test_the_boolean_of_old_is_stage_1():
    setup = split_ds_config(plus({"zero_optimization": True}))
    assert setup.ds_config["zero_optimization"] == {"stage": 1} and setup.stage == 1 and not setup.said
    setup = split_ds_config(plus({"zero_optimization": True, "allgather_size": 1000}))
    assert setup.ds_config["zero_optimization"] == {"stage": 1, "allgather_bucket_size": 1000}


@pytest.mark.parametrize(
    "options",
    [
        {"offload_optimizer": {"device": "cpu"}},
        {"cpu_offload": True},
        {"offload_optimizer": {"device": "cpu"}, "cpu_offload": True},
    ],
)
def test_offload_to_the_cpu_is_what_grass_does_anyway(options):
    setup = split_ds_config(plus({"zero_optimization": {"stage": 2, **options}}))
    assert setup.ds_config["zero_optimization"] == {"stage": 2}
    (sentence,) = setup.said
    assert "states (fp32 masters and moments) of inactive layers live in (pinned) host memory" in sentence
    assert "with and without the block" in sentence and "no effect" not in sentence


def test_what_has_no_effect_in_the_offload_is_said():
    offload = {"device": "cpu", "ratio": 0.5, "pin_memory": True, "fast_init": False, "super_offload": False}
    (sentence,) = split_ds_config(plus({"zero_optimization.offload_optimizer": offload})).said
    assert sentence.endswith("(no effect: fast_init, pin_memory, ratio, super_offload).")


def test_nvme_is_the_folder_of_the_states():
    offload = {"device": "nvme", "nvme_path": "/fast", "buffer_count": 4}
    setup = split_ds_config(plus({"zero_optimization.offload_optimizer": offload}))
    assert setup.grass.offload.folder == "/fast" and setup.ds_config["zero_optimization"] == {"stage": 2}
    (sentence,) = setup.said
    assert "memory-mapped files in /fast" in sentence and sentence.endswith("(no effect: buffer_count).")
    same = plus({"zero_optimization.offload_optimizer": offload}, offload={"folder": "/fast", "mode": "stream"})
    assert split_ds_config(same).grass.offload.mode == "stream"


@pytest.mark.parametrize(
    ("path", "grass", "field"),
    [
        ("/fast", {"folder": "/slow"}, "grass.offload.folder"),
        ("/fast", {"mode": "none"}, "grass.offload.mode"),
        (None, {}, "zero_optimization.offload_optimizer.nvme_path"),
        ("auto", {}, "zero_optimization.offload_optimizer.nvme_path"),
    ],
)
def test_nvme_that_contradicts_is_refused(path, grass, field):
    offload = {"device": "nvme", "nvme_path": path}
    assert refusal(plus({"zero_optimization.offload_optimizer": offload}, offload=grass)).field == field


@pytest.mark.parametrize("offload", [{"device": "none"}, {"device": "none", "pin_memory": True}, {}, None, "auto"])
@pytest.mark.parametrize("legacy", [False, None, "auto"])
def test_no_offload_is_removed_without_a_word(offload, legacy):
    options = {"stage": 3, "offload_optimizer": offload, "cpu_offload": legacy, "offload_param": {"device": "none"}}
    setup = split_ds_config(plus({"zero_optimization": options}))
    assert setup.ds_config["zero_optimization"] == {"stage": 3, "offload_param": {"device": "none"}} and not setup.said


@pytest.mark.parametrize("text", ["True", "true", True, 1])
def test_an_elastic_checkpoint_has_no_effect_and_this_is_said(text):
    setup = split_ds_config(plus({"zero_optimization.elastic_checkpoint": text}))
    assert setup.ds_config["zero_optimization"] == {"stage": 2}
    (sentence,) = setup.said
    assert "elastic_checkpoint has no effect" in sentence and "grass_dist.save_checkpoint" in sentence
    assert not split_ds_config(plus({"zero_optimization.elastic_checkpoint": "False"})).said


def test_disabled_sections_are_taken_out_without_a_word():
    disabled: dict[str, Any] = {k: {"enabled": False, "other": 3} for k in ("amp", "elasticity", "eigenvalue")}
    disabled |= {"compression_training": {"head_pruning": {"shared_parameters": {"enabled": False}}}}
    disabled |= {"quantize_training": {"enabled": "false"}, "sparse_gradients": False, "sparse_attention": None}
    off = {"mics_shard_size": -1, "mics_hierarchical_params_gather": False, "zeropp_loco_param": None}
    setup = split_ds_config(plus(disabled | {"zero_optimization": {"stage": 3, **off}}))
    assert setup.ds_config["zero_optimization"] == {"stage": 3} and not disabled.keys() & setup.ds_config.keys()
    assert not setup.said


@pytest.mark.parametrize("clipping", [0.0, 1, 0.5, "auto"])
def test_gradient_clipping_stays(clipping):
    setup = split_ds_config(plus({"gradient_clipping": clipping}))
    assert setup.ds_config["gradient_clipping"] == clipping and not setup.said


def test_deepspeeds_own_default_of_gradient_clipping_holds():
    for config in (plus({"gradient_clipping": None}), {k: v for k, v in plus({}).items() if k != "gradient_clipping"}):
        assert "gradient_clipping" not in split_ds_config(config).ds_config


def test_every_sentence_is_a_line_of_its_own():
    said = split_ds_config({"train_batch_size": 2, "zero_optimization": {"cpu_offload": True}, "grass": {}}).said
    assert len(said) == 2 and all(s.endswith(".") and "\n" not in s for s in said)


@pytest.mark.parametrize("value", [None, "auto", True])
def test_deepspeed_is_told_to_take_an_optimizer_it_does_not_know(value):
    changes = {"zero_allow_untested_optimizer": value, "zero_force_ds_cpu_optimizer": True}
    ds_config = split_ds_config(plus(changes)).ds_config
    assert ds_config["zero_allow_untested_optimizer"] is True and ds_config["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"type": "WarmupLR", "params": {"warmup_num_steps": 5}}, ("WarmupLR", {"warmup_num_steps": 5})),
        ({"type": "WarmupLR"}, ("WarmupLR", {})),
        ({"type": "WarmupLR", "params": None}, ("WarmupLR", {})),
        ({"type": None, "params": {}}, None),
        ({"type": "auto"}, None),
        ({}, None),
        (None, None),
    ],
)
def test_the_scheduler_is_taken_out(section, expected):
    setup = split_ds_config(plus({"scheduler": section}))
    assert setup.scheduler == expected and "scheduler" not in setup.ds_config and not setup.said


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("xyz", max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text("xyz_", max_size=8), json_values, max_size=4))
def test_options_that_we_do_not_know_pass_untouched(options):
    before = copy.deepcopy(options)
    ds_config = split_ds_config(plus({}) | options).ds_config
    assert {key: ds_config[key] for key in options} == options == before
    assert not has_grass(options)
    assert split_ds_config(plus({}) | {"zero_optimization": {"stage": 3, **options}}).ds_config[
        "zero_optimization"
    ] == {
        "stage": 3,
        **options,
    }


@given(st.dictionaries(st.sampled_from([*DEEPSPEED_KEYS, "grass"]), json_values, max_size=6))
def test_any_configuration_is_taken_or_refused_in_one_sentence(config):
    refused = None
    before = copy.deepcopy(config)
    try:
        split_ds_config(config)
    except ConfigError as error:
        refused = str(error)
    assert config == before
    assert refused is None or ("\n" not in refused and refused.endswith("."))


# Reading


def test_a_dict_is_copied_and_its_handles_are_shared():
    handle = object()
    config = UserDict(PLAIN | {"tensor_parallel": UserDict(mpu=handle), "list": [{"a": 1}]})
    loaded = load_ds_config(config)
    assert type(loaded) is dict and type(loaded["tensor_parallel"]) is dict
    assert loaded["tensor_parallel"]["mpu"] is handle
    loaded["list"][0]["a"] = 2
    assert config["list"] == [{"a": 1}]


def test_a_file_may_have_comments(tmp_path):
    file = tmp_path / "ds_config.json"
    file.write_text(
        """{
            // ZeRO-2
            "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 2}, # one more
            /* the layers */ "grass": {"active_layers": 2, "temperature": 0.5}
        }"""
    )
    for path in (file, str(file)):
        assert load_ds_config(path) == PLAIN | {"grass": {"active_layers": 2, "temperature": 0.5}}
    assert split_ds_config(load_ds_config(file)).grass.active_layers == 2


def test_without_hjson_plain_json_is_read(tmp_path, monkeypatch):
    real = builtins.__import__

    def no_hjson(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "hjson":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_hjson)
    (tmp_path / "c.json").write_text(json.dumps(PLAIN))
    assert load_ds_config(tmp_path / "c.json") == PLAIN
    (tmp_path / "c.json").write_text('{"fp16": {"enabled": true, "enabled": false}}')
    assert "a section has enabled twice" in refusal(tmp_path / "c.json", load_ds_config).problem


def test_base64_of_json():
    config = PLAIN | {"grass": {"active_layers": 2}, "note": "?>?>~~"}  # with characters 62 and 63 of the alphabet
    assert load_ds_config(base64.urlsafe_b64encode(json.dumps(config).encode()).decode()) == config
    twice = base64.urlsafe_b64encode(b'{"stage": 1, "stage": 2}').decode()
    assert "a section has stage twice" in refusal(twice, load_ds_config).problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"train_batch_size": 1, "train_batch_size": 2}', "a section has train_batch_size twice"),
        ('{"bf16": {"enabled": true, "enabled": true, "a": 1, "a": 1}}', "a section has a, enabled twice"),
        ('{"a": [1, 2', "it is not a JSON object: "),
        ('{"a": 1} {', "it is not a JSON object: "),
        ("[1, 2]", "it is a single value"),
        ("words", "it is a single value"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, problem):
    file = tmp_path / "c.json"
    file.write_text(text)
    error = refusal(str(file), load_ds_config)
    assert error.field == "config" and error.value == str(file) and problem in error.problem


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "c.json").write_bytes(b'{"a": "\xff"}')
    for path in (tmp_path, tmp_path / "c.json"):
        assert "it cannot be read" in refusal(path, load_ds_config).problem


@pytest.mark.parametrize("name", ["", "ds_config.json", "conf", "configs/ds.json", "YWJj", "x" * 5000, "a\0b", "é"])
def test_a_missing_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refusal(name, load_ds_config)
    assert error.field == "config" and error.problem == "there is no such file"


@pytest.mark.parametrize("config", [None, 3, ["a"], b"a.json"])
def test_what_is_no_configuration(config):
    assert refusal(config, load_ds_config).problem == "this is no ds_config"


@pytest.mark.parametrize(("stage", "ranks", "refused"), [(3, 4, True), (3, 2, False), (3, 1, False), (2, 4, False)])
def test_a_factor_that_is_the_number_of_ranks(stage, ranks, refused):
    zero = {"stage": stage, "reduce_scatter": False}
    config = split_ds_config(plus({"gradient_predivide_factor": 4.0, "zero_optimization": zero})).ds_config
    if not refused:
        refuse_factor(config, ranks)
        return
    with pytest.raises(ConfigError, match=r"gradient_predivide_factor=4.0: .*; use another factor, or stage 2"):
        refuse_factor(config, ranks)


@pytest.mark.parametrize(("value", "said"), [(False, True), ("false", True), (True, False), (None, False)])
def test_unused_parameters_are_not_asked_for_and_that_is_said(value, said):
    told = split_ds_config(plus({"zero_optimization.ignore_unused_parameters": value})).said
    assert any("ignore_unused_parameters has no effect under GRASS" in sentence for sentence in told) == said
