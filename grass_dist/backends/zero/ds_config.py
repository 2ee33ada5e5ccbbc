"""The ``"grass"`` block of a DeepSpeed configuration, and the configuration that DeepSpeed then gets."""

from __future__ import annotations

import base64
import contextlib
import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, TypeAdapter

from grass_dist.backends.zero.options import (
    BF16,
    IDLE,
    REFUSED,
    REMOVED,
    REMOVED_OF_ZERO,
    UNUSED,
    among,
    enabled,
    off,
    on,
    over,
    refusal,
)
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


_INTEGER = TypeAdapter(int)
"""Reads a number as DeepSpeed's models of a section do: "3" and 3.0 are 3, and 2.5 is no integer."""

OPTIMIZER_TYPES = "Adam, AdamW, Lion, SGD, Adadelta, Adagrad, Adamax, ASGD, NAdam, RAdam, RMSprop, Rprop"
"""The update rules that treat each entry by itself."""

_REFUSED_TYPES = {
    **dict.fromkeys(["onebitadam", "zerooneadam", "onebitlamb"], "it carries compression errors on for all layers"),
    **dict.fromkeys(["muadam", "muadamw", "musgd"], "mup's rates go by shape, and ZeRO's partitions are flat"),
    "lamb": "it works on whole tensors, and ZeRO's partitions are flat",
    "muon": "DeepSpeed puts Muon's update in the place of the gradient before GRASS can measure that",
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


def split_ds_config(config: Mapping[str, Any], mpu: Any = None) -> ZeroSetup:
    """Takes the GRASS settings out of ``config`` and makes the rest what DeepSpeed can run under GRASS.

    Args:
        mpu: as `deepspeed.initialize` takes it.

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
    if grass.offload.weights == "host":
        problem = "under DeepSpeed its own setting says where weights rest"
        fix = 'leave it out, and set zero_optimization.offload_param to {"device": "cpu"}, which ZeRO-3 has'
        raise ConfigError("grass.offload.weights", "host", problem, fix)
    said: list[str] = []
    stage = _normalise_zero(ds_config, said)
    _refuse(ds_config)
    _refuse_parts_of_sequences(ds_config, mpu)
    _take_disabled_out(ds_config)
    said += [f"{path} has no effect under GRASS: {why}." for path, why in IDLE.items() if _is_set(ds_config, path)]
    grass = _with_folder(grass, ds_config, said)
    _take_offload_out(ds_config, said)
    _take_elastic_out(ds_config, said)
    if ds_config.get("gradient_clipping") is None:
        ds_config.pop("gradient_clipping", None)  # DeepSpeed's default holds where there is no such key at all
    vouched = on(_at(ds_config, "zero_allow_untested_optimizer"))
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
        raise ConfigError("zero_optimization.stage", written, *refusal("zero_optimization.stage"))
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
        raise ConfigError(micro, config.get(micro), *refusal(micro))
    _refuse_scaling(config)
    zero = config["zero_optimization"]
    for key, given in (("offload_param.device", among("cpu")), ("cpu_offload_param", on)):
        if zero["stage"] < 3 and given(value := _at(zero, key)):
            raise ConfigError(path := f"zero_optimization.{key}", value, *refusal(path))
    sums = _at(config, "data_types.grad_accum_dtype")
    in_fp32 = among("fp32", "float32", "float", "torch.float32")(sums)
    in_bf16 = any(on(_at(config, f"{section}.enabled")) for section in BF16)
    if in_fp32 and in_bf16 and config["zero_optimization"]["stage"] == 1:
        raise ConfigError("data_types.grad_accum_dtype", sums, *refusal("data_types.grad_accum_dtype"))
    for section in BF16:
        low, states = "bf16_master_weights_and_grads", _at(config, f"{section}.bf16_optimizer_states")
        if on(value := _at(config, f"{section}.{low}") or False) and not on(states or False):
            raise ConfigError(f"{section}.{low}", value, *refusal(f"bf16.{low}"))
    kind = str(_at(_section(config, "optimizer"), "type") or "")
    if kind and kind.lower() not in OPTIMIZER_TYPES.lower().split(", "):
        problem = _REFUSED_TYPES.get(kind.lower(), refusal("optimizer.type")[0])
        raise ConfigError("optimizer.type", kind, problem, f"use one of {OPTIMIZER_TYPES}")


def _refuse_parts_of_sequences(config: Mapping[str, Any], mpu: Any) -> None:
    """Raises if DeepSpeed would take another number of ranks for a sequence, or average gradients over too few."""
    size, ranks = _at(config, "sequence_parallel_size"), sequence_ranks(mpu)
    if size is None or (not over(1)(size) and ranks == 1):
        return
    if not among(str(ranks), f"{ranks}.0")(size) or _at(config, "data_parallel_size") is not None:
        raise ConfigError("sequence_parallel_size", size, *refusal("sequence_parallel_size"))


def sequence_ranks(mpu: Any) -> int:
    """The number of ranks that share a sequence."""
    return getattr(mpu, "get_sequence_parallel_world_size", lambda: 1)()


def _refuse_scaling(config: Mapping[str, Any]) -> None:
    """Raises for what scales gradients, or the loss, in a way that the stage cannot."""
    stage, scatter = config["zero_optimization"]["stage"], _at(config, "zero_optimization.reduce_scatter")
    scatters = stage >= 2 and (scatter is None or on(scatter))
    if (value := _at(config, "prescale_gradients")) is not None and on(value) and scatters:
        raise ConfigError("prescale_gradients", value, *refusal("prescale_gradients"))
    name = "gradient_predivide_factor"
    if (factor := _at(config, name)) is not None and not among("1", "1.0")(factor):
        if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor < math.inf:
            raise ConfigError(name, factor, *refusal(name))
        if scatters:
            raise ConfigError(name, factor, *refusal(f"{name} with reduce_scatter"))
    cast, casts = _at(config, "torch_autocast.dtype"), _at(config, "torch_autocast.enabled")
    if casts is not None and on(casts) and not among(*BF16, "torch.bfloat16")(cast):
        raise ConfigError("torch_autocast.dtype", cast, *refusal("torch_autocast.dtype"))


def refuse_factor(config: Mapping[str, Any], ranks: int) -> None:
    """
    Args:
        config: for DeepSpeed, as `split_ds_config` makes it.
        ranks: over which it averages gradients.

    Raises:
        ConfigError: it would leave a factor in the gradients.
    """
    factor = _at(config, name := "gradient_predivide_factor")
    if config["zero_optimization"]["stage"] == 3 and ranks > 1 and factor == ranks:
        raise ConfigError(name, factor, *refusal(f"{name} at 3"))


def _with_folder(grass: GrassConfig, config: Mapping[str, Any], said: list[str]) -> GrassConfig:
    """Has the states in the folder that DeepSpeed would have swapped them to."""
    section, path = _section(config, "zero_optimization.offload_optimizer"), "zero_optimization.offload_optimizer"
    if not among("nvme")(_at(section, "device")):
        return grass
    folder, offload = _at(section, "nvme_path"), grass.offload
    if not isinstance(folder, str) or not folder:
        raise ConfigError(f"{path}.nvme_path", folder, "device 'nvme' needs a folder", "give one on a fast local disk")
    if offload.folder not in (None, folder):
        problem = f"{path}.nvme_path is {folder!r}"
        raise ConfigError("grass.offload.folder", offload.folder, problem, "write one of the two")
    if offload.mode == "none":
        problem = f"{path}.device is 'nvme'"
        raise ConfigError("grass.offload.mode", "none", problem, "leave one of the two out")
    idle = ", ".join(sorted(str(key) for key in section if key not in ("device", "nvme_path")))
    said.append(
        f"{path} with nvme means under GRASS that the states (fp32 masters and moments) of inactive layers are in "
        f"memory-mapped files in {folder} (grass.offload.folder), and those of the active layers on the device"
        f"{f' (no effect: {idle})' if idle else ''}."
    )
    return grass.model_copy(update={"offload": offload.model_copy(update={"folder": folder})})


def _take_offload_out(config: dict[str, Any], said: list[str]) -> None:
    """GRASS keeps states in host memory by itself; DeepSpeed's offload would move the update to the CPU as well."""
    offload = _section(config, "zero_optimization.offload_optimizer")
    legacy = _at(config, "zero_optimization.cpu_offload")
    for key in ("offload_optimizer", "cpu_offload"):
        config["zero_optimization"].pop(key, None)
    if among("cpu")(_at(offload, "device")) or on(legacy):
        idle = ", ".join(sorted(str(key) for key in offload if key != "device"))
        said.append(
            "zero_optimization.offload_optimizer means under GRASS that the states (fp32 masters and moments) of "
            "inactive layers live in (pinned) host memory and those of the active layers are brought to the device for "
            f"their interval, which is so with and without the block{f' (no effect: {idle})' if idle else ''}."
        )


def _take_disabled_out(config: dict[str, Any]) -> None:
    """Takes sections out that say that they are off. DeepSpeed refuses those that it has removed, on or off."""
    for key in REMOVED:
        if key in config and not enabled(config[key]):
            config.pop(key)
    zero = config["zero_optimization"]
    for key, refused in REMOVED_OF_ZERO.items():
        if key in zero and not refused(zero[key]):
            zero.pop(key)


def _is_set(config: Mapping[str, Any], path: str) -> bool:
    """Whether an option, or a section, is there and asks for something."""
    value = _at(config, path)
    if path == UNUSED:  # DeepSpeed's default is true
        return value is not None and off(value)
    return value is not None and value is not False and value != {}


def _take_elastic_out(config: dict[str, Any], said: list[str]) -> None:
    if on(config["zero_optimization"].pop("elastic_checkpoint", None)):
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
