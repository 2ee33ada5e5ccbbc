"""The DeepSpeed JSON of a fine-tune: who says what, the JSON or our YAML. Dicts in, dicts out; no DeepSpeed here.

A setting that both know ("auto" in the JSON, or nothing) is the YAML's; two values that differ are an error, so that
neither wins without a word.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grass_dist.backends.zero.ds_config import ZeroSetup, has_grass, load_ds_config, split_ds_config
from grass_dist.config import GrassConfig
from grass_dist.errors import ConfigError
from grass_dist.finetune.config import TrainConfig

FIELD = "parallel.config"
_EQUAL = 'write "auto" there, or make the two equal'
_FREE = {"torch_adam", "fused", "foreach", "capturable"}
"""Parameters of an AdamW that say how it computes, not what."""


def find_file(name: str, beside: Path) -> Path:
    """The file ``name``, relative to the folder ``beside`` or else to the working directory.

    Raises:
        ConfigError: it is in neither.
    """
    for file in (beside / name, Path(name)):
        if file.is_file():
            return file.absolute()
    problem = f"there is no such file in {beside.absolute()} or here"
    raise ConfigError(FIELD, name, problem, "give the path of a DeepSpeed JSON")


def read_ds_config(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON in ``file``; a ``"grass"`` that is "auto" or null is left out.

    Raises:
        ConfigError: it cannot be read, or its ``"grass"`` is misspelt, misplaced, switched off or no section.
    """
    try:
        ds_config = load_ds_config(file)
        block = ds_config.pop("grass", None)
        has_grass(ds_config)
    except ConfigError as error:
        whole = error.field == "config"  # the file as a whole, and not a setting in it
        raise (ConfigError(FIELD, error.value, error.problem, error.fix) if whole else error.under(FIELD)) from None
    if block is None or block == "auto":
        return ds_config
    if not isinstance(block, Mapping):
        problem = "this program trains by GRASS, by the settings of a section"
        raise ConfigError(f"{FIELD}.grass", block, problem, 'write "auto" or {"active_layers": 4}, or leave it out')
    return {**ds_config, "grass": block}


def merge_grass(ds_config: Mapping[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The settings of the method that the JSON and the YAML's section ``grass`` give together; None if neither does.

    Raises:
        ConfigError: they give one of them different values.
    """
    block = ds_config.get("grass")
    if block is None and given is None:
        return None
    return _merged("grass", given or {}, block or {})


def _merged(section: str, given: Mapping[str, Any], block: Mapping[str, Any]) -> dict[str, Any]:
    # "auto" leaves a setting to the YAML; but it is a mode of the section offload.
    mine, theirs = dict(given), {str(k): v for k, v in block.items() if v != "auto" or section == "grass.offload"}
    for name, value in mine.items():
        other = theirs.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            mine[name] = _merged(f"{section}.{name}", value, other)
        elif name in theirs and not _same(value, other):
            problem = f"the DeepSpeed JSON has {other!r}"
            raise ConfigError(f"{section}.{name}", value, problem, f'change one, or write "{name}": "auto" there')
    return {**theirs, **mine}


def fill(
    ds_config: Mapping[str, Any], train: TrainConfig, grass: GrassConfig, *, accumulation: int, dtype: str
) -> dict[str, Any]:
    """``ds_config`` with everything that the YAML says, for `grass_dist.initialize` and an AdamW of our own.

    Args:
        accumulation: micro-batches of a step.
        dtype: of the weights, e.g. "bfloat16".

    Raises:
        ConfigError: the JSON says something else, or asks for another optimizer or scheduler.
    """
    filled = load_ds_config(ds_config)
    low = "bfloat16" if "bfloat16" in filled and "bf16" not in filled else "bf16"  # the older name
    batch, micro, clip = train.global_batch_size, train.micro_batch_size, train.clip_grad_norm
    for path, value, because in (
        ("train_batch_size", batch, f"train.global_batch_size is {batch}"),
        ("train_micro_batch_size_per_gpu", micro, f"train.micro_batch_size is {micro}"),
        ("gradient_accumulation_steps", accumulation, f"train.global_batch_size={batch} takes {accumulation} here"),
        ("gradient_clipping", clip or 0.0, f"train.clip_grad_norm is {clip}"),
        (f"{low}.enabled", dtype == "bfloat16", f"the weights are {dtype} (model.dtype)"),
        ("fp16.enabled", dtype == "float16", f"the weights are {dtype} (model.dtype)"),
    ):
        _settle(filled, path, value, because)
    _drop_optimizer(filled, train)
    if filled.pop("scheduler", "auto") not in ("auto", None, {}):
        problem = "the learning rate follows train.schedule and train.warmup_steps"
        raise ConfigError(f"{FIELD}.scheduler", ds_config["scheduler"], problem, "leave the section out")
    return {**_without_auto(filled), "grass": grass.model_dump(mode="json")}


def check(filled: Mapping[str, Any]) -> ZeroSetup:
    """Returns what `grass_dist.initialize` will make of ``filled``.

    Raises:
        ConfigError: an option that GRASS cannot run with.
    """
    try:
        return split_ds_config(filled)
    except ConfigError as error:
        raise error.under(FIELD) from None


def _settle(ds_config: dict[str, Any], path: str, value: Any, because: str) -> None:
    """Writes ``value`` at a dotted path, or finds it there."""
    *sections, key = path.split(".")
    at = ds_config
    for name in sections:
        section = at.get(name)
        if section is None or section == "auto":
            section = at[name] = {}
        if not isinstance(section, dict):
            raise ConfigError(f"{FIELD}.{name}", section, "it must be a section", f'write {{"{key}": "auto"}}')
        at = section
    if (have := at.get(key)) is None or have == "auto":
        at[key] = value
    elif not _same(have, value):
        raise ConfigError(f"{FIELD}.{path}", have, because, _EQUAL)


def _drop_optimizer(ds_config: dict[str, Any], train: TrainConfig) -> None:
    """Takes the section out, which has to be our AdamW: `initialize` is given that as an object."""
    if ds_config.get("optimizer") in (None, "auto"):
        ds_config.pop("optimizer", None)
        return
    _settle(ds_config, "optimizer.type", "AdamW", "this program trains with AdamW")
    _settle(ds_config, "optimizer.params.adam_w_mode", True, "this program trains with AdamW")
    own = {
        "lr": ("learning_rate", train.learning_rate),
        "betas": ("betas", list(train.betas)),
        "eps": ("eps", train.eps),
        "weight_decay": ("weight_decay", train.weight_decay),
    }
    for name, (field, value) in own.items():
        _settle(ds_config, f"optimizer.params.{name}", value, f"train.{field} is {value}")
    params = ds_config.pop("optimizer")["params"]
    if other := sorted(set(params) - {"adam_w_mode", *own, *_FREE}):
        problem = "the optimizer is torch.optim.AdamW, by the settings of train"
        raise ConfigError(f"{FIELD}.optimizer.params.{other[0]}", params[other[0]], problem, "leave it out")


def _same(a: Any, b: Any) -> bool:
    a, b = ([*x] if isinstance(x, list | tuple) else x for x in (a, b))
    if isinstance(a, str) and isinstance(b, str):
        return a.lower() == b.lower()
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _without_auto(section: Mapping[str, Any]) -> dict[str, Any]:
    """Drops what Hugging Face's Trainer would still fill in: there DeepSpeed's own defaults hold."""
    kept = {key: value for key, value in section.items() if not (isinstance(value, str) and value == "auto")}
    return {key: _without_auto(value) if isinstance(value, Mapping) else value for key, value in kept.items()}
