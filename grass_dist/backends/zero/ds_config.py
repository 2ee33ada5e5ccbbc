"""The ``"grass"`` block of a DeepSpeed configuration, and the configuration that DeepSpeed then gets."""

from __future__ import annotations

import base64
import contextlib
import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, TypeAdapter

from grass_dist.config import GrassConfig
from grass_dist.errors import ConfigError


@dataclass(frozen=True)
class ZeroSetup:
    """What a ds_config with a ``"grass"`` block comes down to."""

    grass: GrassConfig
    ds_config: dict[str, Any]
    """What DeepSpeed gets: no ``"grass"``, no ``"scheduler"``, and its other options as they run under GRASS."""
    scheduler: tuple[str, dict[str, Any]] | None
    """Type and parameters of the ``"scheduler"`` section. It is built on the user's optimizer, not by DeepSpeed."""
    stage: int
    """The ZeRO stage that the user wrote; 0 if none."""
    any_optimizer: bool
    """Whether the user vouches for an optimizer class that is not known (``zero_allow_untested_optimizer``)."""
    said: tuple[str, ...]
    """Sentences for the log about what became of the user's options."""


def _is(*names: str) -> Callable[[Any], bool]:
    return lambda value: str(value).strip().lower() in names


def _is_not(*names: str) -> Callable[[Any], bool]:
    return lambda value: not _is(*names)(value)


def _above(limit: float) -> Callable[[Any], bool]:
    def above(value: Any) -> bool:
        try:
            return not float(value) <= limit  # DeepSpeed reads "8" as 8
        except (TypeError, ValueError, OverflowError):
            return True

    return above


_INTEGER = TypeAdapter(int)
"""Reads a number as DeepSpeed's models of a section do: "3" and 3.0 are 3, and 2.5 is no integer."""


def _enabled(section: Any) -> bool:
    """Whether a section, or one at any depth of it, is enabled; one without a switch is on unless it is empty."""
    if not isinstance(section, Mapping):
        return _on(section)
    switches = list(_switches(section))
    return any(map(_on, switches)) if switches else bool(section)


def _switches(section: Mapping[Any, Any]) -> Iterator[Any]:
    for key, value in section.items():
        if key == "enabled":
            yield value
        elif isinstance(value, Mapping):
            yield from _switches(value)


_OFF = ("false", "0", "0.0", "no", "off", "n", "f", "none", "")
_off, _on = _is(*_OFF), _is_not(*_OFF)

_ON_DEVICE = "GRASS trains parameters that stay on the device, for now"
_ONE_PARTITION = "GRASS needs weights and states in one partition over all ranks"
_EXACT = "GRASS needs weights and gradients that are not quantized"
_TOGETHER = "it gathers layers together, and GRASS needs each by itself"
_FP32_STATES = "GRASS keeps masters and moments in fp32"
_PLAIN_MEAN = "GRASS needs gradients that are plain means over the ranks"
_COPIES = "GRASS takes all ranks for copies of one model, each with data of its own"
_DATA_PARALLEL = "leave it out, and use ZeRO-3 if the model is too large"
_ALL_TOKENS = "GRASS compares layers that each see all tokens of a step"
_BF16 = ("bf16", "bfloat16")
_BF16_STATES = ("bf16_master_weights_and_grads", "bf16_master_weights_and_gradients", "bf16_optimizer_states")

REFUSED: tuple[tuple[str, Callable[[Any], bool], str, str], ...] = (
    # dotted path, the values that are refused, the problem, the fix
    ("zero_optimization.offload_param.device", _is("cpu", "nvme"), _ON_DEVICE, "use ZeRO-3 with device 'none'"),
    ("zero_optimization.cpu_offload_param", _on, _ON_DEVICE, "use ZeRO-3 without it"),
    ("zero_optimization.offload_optimizer.device", _is_not("none", "cpu"), "states go to host memory", "use 'cpu'"),
    ("zero_optimization.offload_optimizer.super_offload", _on, "it has an optimizer step of its own", "use false"),
    ("zero_optimization.zenflow", _on, "it decides by itself which gradients a step applies", "leave it out"),
    ("zero_optimization.zero_hpz_partition_size", _above(1), _ONE_PARTITION, "use 1"),
    ("zero_optimization.zero_quantized_weights", _on, _EXACT, "use false"),
    ("zero_optimization.zero_quantized_nontrainable_weights", _on, _EXACT, "use false"),
    ("zero_optimization.zero_quantized_gradients", _on, _EXACT, "use false"),
    ("zero_optimization.mics_shard_size", _above(0), _ONE_PARTITION, "leave it out (plain ZeRO-3)"),
    ("zero_optimization.mics_hierarchical_params_gather", _on, _ONE_PARTITION, "leave it out (plain ZeRO-3)"),
    ("zero_optimization.stage3_module_granularity_threshold", _above(0), _TOGETHER, "use 0"),
    ("zero_optimization.module_granularity_threshold", _above(0), _TOGETHER, "use 0"),
    ("zero_optimization.legacy_stage1", _on, "GRASS works on today's ZeRO-1", "use false"),
    ("zero_optimization.parameter_alignment", _on, "GRASS reads partitions without gaps", "use false"),
    ("zero_optimization.compute_grad_norm", _off, "GRASS relies on the norm that ZeRO computes", "use true"),
    ("checkpoint.load_universal", _on, "it knows no layers without states", "use false, on as many ranks as before"),
    ("optimizer.params.max_grad_norm", _above(-1), "DeepSpeed does not clip by it", "set gradient_clipping instead"),
    ("zero_allow_untested_optimizer", _off, "GRASS hands DeepSpeed an optimizer that it does not know", "use true"),
    *((f"{name}.enabled", _on, "it casts in a way of its own", "use 'bf16'") for name in ("amp", "torch_autocast")),
    *((f"{section}.{key}", _on, _FP32_STATES, "use false") for section in _BF16 for key in _BF16_STATES),
    ("fp16.fp16_master_weights_and_grads", _on, _FP32_STATES, "use false"),
    ("compile.deepcompile", _on, "it compiles one graph, and the layers that train change", "use false"),
    ("prescale_gradients", _on, _PLAIN_MEAN, "use false"),
    ("gradient_predivide_factor", _is_not("1", "1.0"), _PLAIN_MEAN, "use 1.0"),
    ("gradient_allreduce_op", _is("sum"), _PLAIN_MEAN, "use 'mean'"),
    ("sparse_gradients", _on, "GRASS takes the norms of dense gradients", "use false"),
    ("managed_gradient_accumulation", _off, "GRASS counts steps as DeepSpeed accumulates them", "use true"),
    ("tensor_parallel.autotp_size", _above(1), _COPIES, _DATA_PARALLEL),
    ("pipeline.stages", _above(1), _COPIES, _DATA_PARALLEL),
    ("sequence_parallel_size", _above(1), _COPIES, _DATA_PARALLEL),
    *((f"{name}.enabled", _on, _COPIES, _DATA_PARALLEL) for name in ("expert_parallel", "moe")),
    ("elasticity.enabled", _on, "the number of ranks cannot change", "set train_micro_batch_size_per_gpu instead"),
    ("progressive_layer_drop.enabled", _on, _ALL_TOKENS, "leave it out"),
    ("data_efficiency.data_routing.random_ltd.enabled", _on, _ALL_TOKENS, "use false (data_sampling may stay)"),
    ("eigenvalue.enabled", _on, "it needs the gradients of all layers at each step", "leave it out"),
    ("quantize_training", _enabled, _EXACT, "leave it out and quantize the trained model"),
    ("compression_training", _enabled, _EXACT, "leave it out and compress the trained model"),
    ("hybrid_engine.enabled", _on, "it swaps layers for inference kernels", "generate outside the engine"),
)

_REMOVED = (
    *("amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting", "nebula"),
    *("progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients"),
)
_REMOVED_OF_ZERO = {
    "mics_shard_size": _above(0),
    "mics_hierarchical_params_gather": _on,
    "zeropp_loco_param": _on,
}
"""Options that newer releases of DeepSpeed no longer have."""

OPTIMIZER_TYPES = "Adam, AdamW, Lion, SGD, Adadelta, Adamax, ASGD, NAdam, RAdam, RMSprop, Rprop"
"""The update rules that treat each entry by itself and make their state at the first step."""

_REFUSED_TYPES = {
    **dict.fromkeys(["onebitadam", "zerooneadam", "onebitlamb"], "it carries compression errors on for all layers"),
    **dict.fromkeys(["muadam", "muadamw", "musgd"], "mup's rates go by shape, and ZeRO's partitions are flat"),
    **dict.fromkeys(["muon", "lamb"], "it works on whole tensors, and ZeRO's partitions are flat"),
    "adagrad": "it makes the states of all layers when it is constructed",
}


def load_ds_config(config: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Reads the configuration from whatever DeepSpeed takes: a file (comments allowed), base64 of JSON, or a dict.

    Sections and lists of a dict are copied, and their values become those that a file would hold (`_plain`); other
    values, which may be handles of process groups, are shared.

    Raises:
        ConfigError: there is no such file, it cannot be read, is not JSON, or has a key twice.
    """
    if isinstance(config, Mapping):
        return _plain(config)
    if not isinstance(config, str | os.PathLike):
        raise ConfigError("config", config, "this is no ds_config", "give a path, base64 of JSON or a dict")
    source = os.fspath(config)
    if os.path.exists(source):
        try:
            return _parse(Path(source).read_text(encoding="utf-8"), source)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("config", source, f"it cannot be read ({error})", "give a JSON file") from None
    try:
        text = base64.urlsafe_b64decode(source).decode()
    except ValueError:
        text = ""
    # The name of a missing file may happen to be base64, too, but hardly of a section.
    if "{" not in text:
        raise ConfigError("config", source, "there is no such file", "give a path, base64 of JSON or a dict")
    return _parse(text, source)


def has_grass(config: Mapping[str, Any]) -> bool:
    """Whether there is a top-level ``"grass"`` block. ``null`` and ``false`` switch it off.

    Raises:
        ConfigError: the block is misspelt, stands inside another section, or is no block.
    """
    for section, value in config.items():
        if section == "grass":
            continue
        key = str(section).strip().lower()
        if key.startswith("grass") or difflib.get_close_matches(key, ["grass"], cutoff=0.8):
            raise ConfigError(str(section), value, "there is no such section", "did you mean 'grass'")
        if found := _nested(value, str(section)):
            outer = found[0].rpartition(".")[0]
            reader = "DeepSpeed refuses it" if outer == "zero_optimization" else "nothing reads it"
            problem = f"the block stands inside {outer}, where {reader}"
            raise ConfigError(*found, problem, "move it to the top level of the ds_config")
    block = config.get("grass")
    if block is not None and block is not False and not isinstance(block, Mapping):
        raise ConfigError("grass", block, "it must be a section", 'write {"active_layers": 4} or leave it out')
    return isinstance(block, Mapping)


def split_ds_config(config: Mapping[str, Any]) -> ZeroSetup:
    """Takes the GRASS settings out of ``config`` and makes the rest what DeepSpeed can run under GRASS.

    Raises:
        ConfigError: no block, a setting that cannot work, or an option that GRASS cannot run with.
    """
    ds_config = load_ds_config(config)
    if not has_grass(ds_config):
        raise ConfigError("grass", config.get("grass"), "there is no such section", 'add {"active_layers": 4} as one')
    try:
        grass = GrassConfig(**{str(key): value for key, value in ds_config.pop("grass").items()})
    except ConfigError as error:
        raise error.under("grass") from None
    if grass.offload.update_in_backward:
        problem = "DeepSpeed updates after the backward, when it knows the norm of all gradients"
        raise ConfigError("grass.offload.update_in_backward", True, problem, "leave it out")
    said: list[str] = []
    stage = _normalise_zero(ds_config, said)
    _refuse(ds_config)
    _take_disabled_out(ds_config)
    _take_offload_out(ds_config, said)
    _take_elastic_out(ds_config, said)
    if ds_config.get("gradient_clipping") is None:
        ds_config.pop("gradient_clipping", None)  # DeepSpeed's default holds where there is no such key at all
    vouched = _on(_at(ds_config, "zero_allow_untested_optimizer"))
    ds_config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return ZeroSetup(grass, ds_config, _take_scheduler_out(ds_config), stage, vouched, tuple(said))


def _normalise_zero(config: dict[str, Any], said: list[str]) -> int:
    """Makes ``zero_optimization`` a section with a stage of 1 to 3; returns the stage that the user wrote."""
    zero = config.get("zero_optimization")
    if isinstance(zero, bool):  # an old form
        size = {"allgather_bucket_size": config["allgather_size"]} if zero and "allgather_size" in config else {}
        config["zero_optimization"] = {"stage": int(zero), **size}
    zero = config["zero_optimization"] = _section(config, "zero_optimization")
    written = zero.get("stage", 0)
    try:
        stage = -1 if isinstance(written, bool) else _INTEGER.validate_python(written)
    except ValueError:
        stage = -1
    if not 0 <= stage <= 3:
        raise ConfigError("zero_optimization.stage", written, "there is no such stage", "use 1, 2 or 3 (0 runs as 1)")
    if "stage" in zero:
        zero["stage"] = stage
    if stage == 0:
        zero["stage"] = 1
        said.append("ZeRO stage 0 runs as ZeRO-1 under GRASS: same gradients, states sharded rather than replicated.")
    return stage


def _refuse(config: Mapping[str, Any]) -> None:
    """Raises a `ConfigError` for the first option that GRASS cannot run with."""
    for path, refused, problem, fix in REFUSED:
        value = _at(config, path)
        if value is not None and refused(value):
            raise ConfigError(path, value, problem, fix)
    micro = "train_micro_batch_size_per_gpu"
    if _at(config, micro) is None and _at(config, "train_batch_size") is None:
        raise ConfigError(micro, config.get(micro), "a ds_config without micro-batch", "set it or train_batch_size")
    sums = _at(config, "data_types.grad_accum_dtype")
    in_fp32 = _is("fp32", "float32", "float", "torch.float32")(sums)
    in_bf16 = any(_on(_at(config, f"{section}.enabled")) for section in _BF16)
    if in_fp32 and in_bf16 and config["zero_optimization"]["stage"] == 1:
        problem = "at stages 0 and 1 DeepSpeed then uses its BF16_Optimizer"
        raise ConfigError("data_types.grad_accum_dtype", sums, problem, "use stage 2, or leave it out")
    kind = str(_at(_section(config, "optimizer"), "type") or "")
    if kind and kind.lower() not in OPTIMIZER_TYPES.lower().split(", "):
        problem = _REFUSED_TYPES.get(kind.lower(), "it is not known to treat each entry by itself")
        raise ConfigError("optimizer.type", kind, problem, f"use one of {OPTIMIZER_TYPES}")


def _take_offload_out(config: dict[str, Any], said: list[str]) -> None:
    """GRASS keeps states in host memory by itself; DeepSpeed's offload would move the update to the CPU as well."""
    offload = _section(config, "zero_optimization.offload_optimizer")
    legacy = _at(config, "zero_optimization.cpu_offload")
    for key in ("offload_optimizer", "cpu_offload"):
        config["zero_optimization"].pop(key, None)
    if _is("cpu")(_at(offload, "device")) or _on(legacy):
        idle = ", ".join(sorted(str(key) for key in offload if key != "device"))
        said.append(
            "zero_optimization.offload_optimizer means under GRASS that the states (fp32 masters and moments) of "
            "inactive layers live in (pinned) host memory and those of the active layers are brought to the device for "
            f"their interval, which is so with and without the block{f' (no effect: {idle})' if idle else ''}."
        )


def _take_disabled_out(config: dict[str, Any]) -> None:
    """Takes sections out that say that they are off. DeepSpeed refuses those that it has removed, on or off."""
    for key in _REMOVED:
        if key in config and not _enabled(config[key]):
            config.pop(key)
    zero = config["zero_optimization"]
    for key, on in _REMOVED_OF_ZERO.items():
        if key in zero and not on(zero[key]):
            zero.pop(key)


def _take_elastic_out(config: dict[str, Any], said: list[str]) -> None:
    if _on(config["zero_optimization"].pop("elastic_checkpoint", None)):
        said.append(
            "zero_optimization.elastic_checkpoint has no effect under GRASS: DeepSpeed's files go on with as many "
            "ranks as saved them. Save and load with grass_dist.save_checkpoint and load_checkpoint to go on with "
            "another number."
        )


def _take_scheduler_out(config: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    kind, params = _at(_section(config, "scheduler"), "type"), _section(config, "scheduler.params")
    config.pop("scheduler", None)
    return (str(kind), params) if kind else None


def _section(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    section = _at(config, path)
    if section is not None and not isinstance(section, dict):
        raise ConfigError(path, section, "it must be a section", "write {...} with its settings, or leave it out")
    return {} if section is None else section


def _at(config: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None if it is not set, or still the "auto" that Hugging Face fills in."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return None if isinstance(value, str) and value == "auto" else value


def _nested(value: Any, path: str) -> tuple[str, Any] | None:
    """Path and value of a GRASS block below ``path``."""
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        here = f"{path}.{key}"
        if str(key).lower() == "grass" and inner is not None and inner is not False:
            return here, inner
        if found := _nested(inner, here):
            return found
    return None


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        from hjson import loads  # what DeepSpeed reads with, and depends on
    except ImportError:
        from json import loads

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise ValueError(f"a section has {', '.join(sorted(twice))} twice")
        return dict(pairs)

    try:
        if isinstance(config := loads(text, object_pairs_hook=once), Mapping):
            return _plain(config)
        problem = "it is a single value"
    except ValueError as error:
        problem = str(error)
    raise ConfigError("config", source, f"it is not a JSON object: {problem}", "correct it there")


def _plain(value: Any) -> Any:
    """A copy of ``value`` as a file would hold it, so that a setting is judged by what DeepSpeed reads in it.

    A configuration that code has made may hold enums, DeepSpeed's own models of a section, numpy's numbers, paths, or
    bytes.
    """
    if isinstance(value, BaseModel):  # one of DeepSpeed's, whose defaults are nobody's wish
        value = value.model_dump(by_alias=True, exclude_unset=True)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, os.PathLike):
        return _plain(os.fspath(value))
    if isinstance(value, bytes | bytearray):  # DeepSpeed's models read b"cpu" as "cpu"
        with contextlib.suppress(UnicodeDecodeError):  # they refuse what is no text
            return value.decode()
    return value
