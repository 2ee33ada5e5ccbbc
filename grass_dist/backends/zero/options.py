"""Every option of a ds_config: whether it runs under GRASS, has no effect, or is refused, and why.

`ds_config` refuses by these tables and says by them what has no effect, and docs/deepspeed.md shows them
(``python -m docs.generate``). A test compares their keys with those that DeepSpeed's own configuration has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Values:
    """A set of values of an option, and its name in a table."""

    name: str
    has: Callable[[Any], bool]

    def __call__(self, value: Any) -> bool:
        return self.has(value)


def among(*names: str) -> Values:
    return Values(", ".join(names), lambda value: str(value).strip().lower() in names)


def not_among(*names: str) -> Values:
    return Values(f"other than {', '.join(names)}", lambda value: not among(*names)(value))


def over(limit: float) -> Values:
    def above(value: Any) -> bool:
        try:
            return not float(value) <= limit  # DeepSpeed reads "8" as 8
        except (TypeError, ValueError, OverflowError):
            return True

    return Values(f"above {limit}", above)


def _is_enabled(section: Any) -> bool:
    """Whether a section, or one at any depth of it, is enabled; one without a switch is on unless it is empty."""
    if not isinstance(section, Mapping):
        return on(section)
    switches = list(_switches(section))
    return any(map(on, switches)) if switches else bool(section)


def _switches(section: Mapping[Any, Any]) -> Iterator[Any]:
    for key, value in section.items():
        if key == "enabled":
            yield value
        elif isinstance(value, Mapping):
            yield from _switches(value)


_OFF = ("false", "0", "0.0", "no", "off", "n", "f", "none", "")
off, on = Values("false", among(*_OFF)), Values("true", not_among(*_OFF))
enabled = Values("on", _is_enabled)

_ONE_PARTITION = "GRASS needs weights and states in one partition over all ranks"
_EXACT = "GRASS needs weights and gradients that are not quantized"
_KERNELS = "its kernels are for CUDA alone, and GRASS was not measured with them"
_TOGETHER = "it gathers layers together, and GRASS needs each by itself"
_ON_THE_HOST = "DeepSpeed has it with its update on the host alone, and GRASS updates where the states are"
_PLAIN_MEAN = "GRASS needs gradients that are plain means over the ranks"
_COPIES = "GRASS takes all ranks for copies of one model, each with data of its own"
_DATA_PARALLEL = "leave it out, and use ZeRO-3 if the model is too large"
_ALL_TOKENS = "GRASS compares layers that each see all tokens of a step"
_NUMBER = Values("any number", over(-1))
BF16 = ("bf16", "bfloat16")

REFUSED: tuple[tuple[str, Values, str, str], ...] = (
    # dotted path, the values that are refused, the problem, the fix
    (
        "zero_optimization.offload_param.device",
        not_among("none", "cpu"),
        "DeepSpeed moves what trains to host memory for good, and has no function that sends a layer back to NVMe",
        "use 'cpu'",
    ),
    (
        "zero_optimization.offload_optimizer.device",
        not_among("none", "cpu", "nvme"),
        "states go to host memory, or with nvme to a folder",
        "use 'cpu' or 'nvme'",
    ),
    ("zero_optimization.offload_optimizer.super_offload", on, "it has an optimizer step of its own", "use false"),
    ("zero_optimization.zenflow", on, "it decides by itself which gradients a step applies", "leave it out"),
    ("zero_optimization.zero_quantized_weights", on, _KERNELS, "use false"),
    ("zero_optimization.zero_quantized_nontrainable_weights", on, _KERNELS, "use false"),
    ("zero_optimization.zero_quantized_gradients", on, _KERNELS, "use false"),
    ("zero_optimization.mics_shard_size", over(0), _ONE_PARTITION, "leave it out (plain ZeRO-3)"),
    ("zero_optimization.mics_hierarchical_params_gather", on, _ONE_PARTITION, "leave it out (plain ZeRO-3)"),
    ("zero_optimization.stage3_module_granularity_threshold", over(0), _TOGETHER, "use 0"),
    ("zero_optimization.module_granularity_threshold", over(0), _TOGETHER, "use 0"),
    ("zero_optimization.legacy_stage1", on, "GRASS works on today's ZeRO-1", "use false"),
    ("zero_optimization.parameter_alignment", on, "GRASS reads partitions without gaps", "use false"),
    ("zero_optimization.compute_grad_norm", off, "GRASS relies on the norm that ZeRO computes", "use true"),
    (
        "optimizer.params.max_grad_norm",
        Values("any number", over(-1)),
        "DeepSpeed does not clip by it",
        "set gradient_clipping instead",
    ),
    ("zero_allow_untested_optimizer", off, "GRASS hands DeepSpeed an optimizer that it does not know", "use true"),
    ("amp.enabled", on, "it casts in a way of its own", "use 'bf16' or 'torch_autocast'"),
    ("fp16.fp16_master_weights_and_grads", on, _ON_THE_HOST, "use false"),
    ("compile.deepcompile", on, "it compiles one graph, and the layers that train change", "use false"),
    ("gradient_allreduce_op", among("sum"), _PLAIN_MEAN, "use 'mean'"),
    ("sparse_gradients", on, "GRASS takes the norms of dense gradients", "use false"),
    ("managed_gradient_accumulation", off, "GRASS counts steps as DeepSpeed accumulates them", "use true"),
    (
        "tensor_parallel.autotp_size",
        over(1),
        "ZeRO reduces and partitions each part of a layer by itself, and GRASS needs the norms of whole layers",
        "leave it out; use ZeRO-3, or GrassOptimizer with parallelize_module and fully_shard",
    ),
    ("pipeline.stages", over(1), _COPIES, _DATA_PARALLEL),
    *((f"{name}.enabled", on, _COPIES, _DATA_PARALLEL) for name in ("expert_parallel", "moe")),
    ("elasticity.enabled", on, "the number of ranks cannot change", "set train_micro_batch_size_per_gpu instead"),
    ("progressive_layer_drop.enabled", on, _ALL_TOKENS, "leave it out"),
    ("data_efficiency.data_routing.random_ltd.enabled", on, _ALL_TOKENS, "use false (data_sampling may stay)"),
    ("eigenvalue.enabled", on, "it needs the gradients of all layers at each step", "leave it out"),
    ("quantize_training", enabled, _EXACT, "leave it out and quantize the trained model"),
    ("compression_training", enabled, _EXACT, "leave it out and compress the trained model"),
    ("weight_quantization", enabled, _EXACT, "leave it out"),
    ("hybrid_engine.enabled", on, "it swaps layers for inference kernels", "generate outside the engine"),
)

REMOVED = (
    *("amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting", "nebula"),
    *("progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients"),
)
REMOVED_OF_ZERO = {
    "mics_shard_size": over(0),
    "mics_hierarchical_params_gather": on,
    "zeropp_loco_param": on,
}
"""Options that newer releases of DeepSpeed no longer have."""


UNUSED = "zero_optimization.ignore_unused_parameters"
IDLE: dict[str, str] = {
    "zero_optimization.sub_group_size": "each group of parameters is one sub-group",
    "zero_optimization.cpu_offload_use_pin_memory": "host memory is pinned on a GPU",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "it is Muon's alone",
    UNUSED: "DeepSpeed asks for a gradient of every parameter in its update on the host alone",
    "bf16.immediate_grad_update": "it is for an optimizer of DeepSpeed's that GRASS does not use",
    "optimizer.legacy_fusion": "it is for optimizers without ZeRO",
    "use_data_before_expert_parallelism": "there is no expert parallelism",
    "zero_force_ds_cpu_optimizer": "updates are made where GRASS has the states",
    "aio": "it is for NVMe",
}
"""Options without effect, and why. The start says so of each that is set."""

_WHOLE = ("cpu at stages 1 and 2", "below stage 3 each device has whole weights", "use stage 3, or leave it out")
_SCATTERS = "DeepSpeed cannot scale gradients before its reduce-scatter at stages 2 and 3"
CONDITIONS: dict[str, tuple[str, str, str]] = {
    # dotted path, with a word after it where a path has several: when, the problem, the fix
    "prescale_gradients": (
        "at stages 2 and 3 with `reduce_scatter`, the default",
        _SCATTERS,
        "set zero_optimization.reduce_scatter to false",
    ),
    "gradient_predivide_factor": ("other than a positive number", "it must be a positive number", "use 1.0"),
    "gradient_predivide_factor with reduce_scatter": (
        "at stages 2 and 3 with `reduce_scatter`, the default",
        _SCATTERS,
        "set zero_optimization.reduce_scatter to false, or use stage 1",
    ),
    "gradient_predivide_factor at 3": (
        "at stage 3 if it is the number of ranks",
        "stage 3 of DeepSpeed then divides gradients by it and does not multiply them back",
        "use another factor, or stage 2",
    ),
    "zero_optimization.offload_param.device": _WHOLE,
    "zero_optimization.cpu_offload_param": _WHOLE,
    "torch_autocast.dtype": (
        "other than bf16",
        "the loss scale of fp16 would begin again at each switch, and DeepSpeed has no default",
        "use 'bfloat16', or the section fp16",
    ),
    "bf16.bf16_master_weights_and_grads": (
        "without `bf16_optimizer_states`",
        _ON_THE_HOST,
        "set bf16_optimizer_states to true as well, or use false",
    ),
    "data_types.grad_accum_dtype": (
        "fp32 with bf16 at stages 0 and 1",
        "at stages 0 and 1 DeepSpeed then uses its BF16_Optimizer",
        "use stage 2, or leave it out",
    ),
    "sequence_parallel_size": (
        "above 1 without an `mpu=` that has as many ranks for a sequence, or with `data_parallel_size`",
        "DeepSpeed sums the gradients of a sequence over the ranks that mpu= has for it",
        "pass the mpu of UlyssesSPAttentionHF.register_with_transformers with this size",
    ),
    "zero_optimization.stage": ("other than 0 to 3", "there is no such stage", "use 1, 2 or 3 (0 runs as 1)"),
    "train_micro_batch_size_per_gpu": (
        "without `train_batch_size` too",
        "a ds_config without micro-batch",
        "set it or train_batch_size",
    ),
    "optimizer.type": ("other than those below", "it is not known to treat each entry by itself", "use one of these"),
}
"""Options that run, except under a condition."""

_ZERO = """
    stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce allgather_partitions
    allgather_bucket_size overlap_comm load_from_fp32_weights stage3_prefetch_bucket_size
    stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters
    stage3_max_reuse_distance stage3_gather_16bit_weights_on_model_save stage3_use_all_reduce_for_fetch_params
    stage3_allgather_sequential stage3_gather_fp16_weights_on_model_save round_robin_gradients
    memory_efficient_linear pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings
    enable_sanity_checks leaf_module.classes leaf_module.names leaf_module.name_suffixes
"""
RUN: tuple[tuple[str, str, str], ...] = (
    # section, its keys that reach DeepSpeed as they are written, a note
    ("", "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping", ""),
    ("", "communication_data_type prescale_gradients gradient_predivide_factor", "a probe averages in fp32"),
    ("", "seq_parallel_communication_data_type", "for Ulysses through `mpu=`"),
    ("", "sequence_parallel_size", "for Ulysses through `mpu=`"),
    ("", "steps_per_print log_level dump_state wall_clock_breakdown memory_breakdown disable_python_gc", ""),
    ("", "dataloader_drop_last vocabulary_size disable_allgather", ""),
    ("zero_optimization", _ZERO, ""),
    (
        "zero_optimization",
        "cpu_offload",
        "[`grass.offload`](offload.md) says where states are",
    ),
    ("zero_optimization", "zero_hpz_partition_size", "on 4 ranks of a CPU, as in stock"),
    ("zero_optimization", "cpu_offload_param", "as `offload_param.device: cpu`"),
    ("zero_optimization.offload_param", "pin_memory", ""),
    ("zero_optimization.offload_optimizer", "nvme_path", "[`grass.offload.folder`](offload.md)"),
    ("bf16", "enabled check_grad_overflow", ""),
    ("bfloat16", "*", "an older name of `bf16`"),
    ("bf16", "bf16_master_weights_and_grads bf16_optimizer_states", "masters and moments in bf16"),
    (
        "fp16",
        "enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis "
        "min_loss_scale",
        "",
    ),
    ("torch_autocast", "enabled dtype lower_precision_safe_modules", ""),
    ("data_types", "grad_accum_dtype keep_in_fp32_modules param_dtype buffer_dtype", ""),
    ("optimizer", "type params", ""),
    ("scheduler", "type params", "made on your parameter groups"),
    ("checkpoint", "tag_validation use_node_local_storage load_universal", ""),
    ("checkpoint", "checkpoint_serialization parallel_write writer", "not tested"),
    ("datastates_ckpt", "*", "not tested"),
    (
        "activation_checkpointing",
        "partition_activations contiguous_memory_optimization cpu_checkpointing number_checkpoints profile "
        "synchronize_checkpoint_boundary",
        "not tested with ZeRO",
    ),
    ("timers.throughput", "enabled synchronized", ""),
    (
        "flops_profiler",
        "enabled profile_step module_depth top_modules detailed output_file recompute_fwd_factor",
        "not tested",
    ),
    ("comms_logger", "enabled prof_all prof_ops verbose debug", "not tested"),
    ("tensorboard", "enabled output_path job_name", "not tested"),
    ("csv_monitor", "enabled output_path job_name", "not tested"),
    ("wandb", "enabled group team project", "not tested"),
    (
        "comet",
        "enabled samples_log_interval project workspace api_key experiment_name experiment_key online mode",
        "not tested",
    ),
    ("data_efficiency", "enabled seed data_sampling data_routing.enabled", "not tested"),
    ("autotuning", "*", "the launcher reads it; not tested"),
)
WITH: tuple[tuple[str, str, str], ...] = (
    # section, its keys that belong to an option which is refused, that option
    ("zero_optimization.offload_param", "nvme_path buffer_count buffer_size max_in_cpu", "device: nvme"),
    ("zero_optimization.zenflow", "*", ""),
    ("compile", "*", "deepcompile"),
    ("hybrid_engine", "*", "enabled"),
    ("tensor_parallel", "*", "autotp_size"),
    ("expert_parallel", "*", "enabled"),
    ("pipeline", "*", "stages"),
)
OFFLOAD_IDLE = (
    *("buffer_count", "pin_memory", "pipeline_read", "pipeline_write"),
    *("fast_init", "ratio", "cpuadam_cores_perc"),
)
"""Keys of ``offload_optimizer`` without effect, which the start names."""


@dataclass(frozen=True, slots=True)
class Row:
    """What becomes of an option; ``path`` may end in ``*``, for all of a section that no other row names."""

    path: str
    verdict: str
    """"runs", "no effect", or "refused", with the values that are; others of the option run."""
    note: str


def rows() -> Iterator[Row]:
    """What becomes of each option, in the order of the documentation."""
    for section, keys, note in RUN:
        for key in keys.split():
            path = f"{section}.{key}".lstrip(".")
            yield Row(path, "runs", "; ".join(filter(None, [note, *_conditions(path)])))
    for path, why in IDLE.items():
        yield Row(path, "no effect", f"{why}; the log says so")
    yield Row("zero_optimization.elastic_checkpoint", "no effect", "the log says so")
    for key in OFFLOAD_IDLE:
        yield Row(f"zero_optimization.offload_optimizer.{key}", "no effect", "the log says so")
    for path, values, problem, fix in REFUSED:
        yield Row(path, f"refused: {values.name}", "; ".join([problem, fix, *_conditions(path)]))
    for section, keys, switch in WITH:
        for key in keys.split():
            whole = f"{section}.{switch}".rstrip(".")
            yield Row(f"{section}.{key}", "no effect", f"it acts with `{whole}` alone, which is refused")
    for path in [*REMOVED, *(f"zero_optimization.{key}" for key in REMOVED_OF_ZERO)]:
        if path not in {row[0].removesuffix(".enabled") for row in REFUSED}:
            yield Row(path, "refused: on", "by releases of DeepSpeed that have removed it; taken out if it is off")


def _conditions(path: str) -> list[str]:
    but = [how for name, how in CONDITIONS.items() if name.partition(" ")[0] == path]
    return [f"refused {when}: {why}; {fix}" for when, why, fix in but]


def refusal(name: str) -> tuple[str, str]:
    """Problem and fix of a condition."""
    _, problem, fix = CONDITIONS[name]
    return problem, fix
