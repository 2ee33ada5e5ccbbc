"""Sets up the model and the optimizer of a `RunConfig`: it loads, checks the ranks, and groups the parameters."""

from __future__ import annotations

import errno
import logging
import math
import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from grass_dist.config import check_num_layers
from grass_dist.errors import ConfigError, UnsupportedModel, shorten
from grass_dist.finetune.config import ModelConfig, RunConfig, TrainConfig
from grass_dist.finetune.data.batches import check_divides
from grass_dist.finetune.hub import hub_problem, loading_options
from grass_dist.finetune.tasks.base import Task
from grass_dist.job.world import World
from grass_dist.model.always import always_active_roles
from grass_dist.model.chunked_loss import chunk_loss
from grass_dist.model.discovery import find_layers
from grass_dist.model.foreign import too_deep
from grass_dist.model.names import freeze_named
from grass_dist.model.packaged import resolve_model

log = logging.getLogger("grass_dist")


def weight_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """Returns the dtype of the weights: as configured, else bf16 on a GPU that has it and fp32 elsewhere."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def load_tokenizer(config: ModelConfig) -> Any:
    """Loads the model's tokenizer; its eos token pads where it names no pad token.

    Raises:
        ConfigError: there is no such model.
    """
    from transformers import AutoTokenizer

    source = resolve_model(config.name)
    try:
        _check_depth(source, config)
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=config.trust_remote_code, **loading_options(config.name)
        )
        tokenizer("A text.")  # what is of a wrong type may be found now alone
    except ConfigError:
        raise
    except Exception as error:  # whatever transformers makes of a folder that nobody has checked
        raise _no_model(config, error) from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: RunConfig, device: torch.device, task: Task | None = None) -> nn.Module:
    """Loads the pretrained model of a task into host memory; under an `HfDeepSpeedConfig` of ZeRO-3, its shards.

    Args:
        task: with what it has found in the data; None loads a causal language model.

    Raises:
        ConfigError: there is no such model, its files lack some of its weights (see
            `ModelConfig.allow_missing_weights`), it is none for the task, or settings of ``grass`` do not fit it.
        UnsupportedModel: it has no layer stack.
    """
    from transformers import AutoModelForCausalLM

    settings = config.model
    load = AutoModelForCausalLM.from_pretrained if task is None else task.load
    try:
        _check_depth(resolve_model(settings.name), settings)
        loaded: Any = load(
            resolve_model(settings.name),
            dtype=weight_dtype(settings, device),
            attn_implementation=settings.attention,
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
            **loading_options(settings.name),
        )
    except ConfigError:
        raise
    except Exception as error:  # as above
        raise _no_model(settings, error) from error
    model, found = loaded
    new = set() if task is None else {name for name in found["missing_keys"] if task.is_new(model, name)}
    _check_complete(settings, found, new)
    if task is not None:
        task.check_model(model)
    _check_dropout(settings, model.config.to_dict())
    try:
        freeze_named(model, config.grass)
        layers = find_layers(model, config.grass.layers)
        check_num_layers(config.grass, len(layers.layers))
        always_active_roles(model, layers, config.grass)
    except ConfigError as error:
        raise error.under("grass") from None
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    if settings.activation_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        if (release := getattr(model, "disable_input_require_grads", None)) is not None:
            release()  # which only reentrance needs: the backward would pass all frozen layers down to the embeddings
    _set_logits(settings, model, device)
    return model.train()


def _set_logits(settings: ModelConfig, model: Any, device: torch.device) -> None:
    """Has the model make its loss as ``model.logits`` says.

    Raises:
        ConfigError: the model or this machine cannot.
    """
    if settings.logits == "chunked":
        try:
            chunk_loss(model)
        except UnsupportedModel as error:
            raise ConfigError("model.logits", "chunked", str(error).rstrip("."), "use whole") from error
    elif settings.logits == "liger":
        if device.type != "cuda":
            raise ConfigError("model.logits", "liger", f"its kernels do not run on {device.type}", "use chunked")
        if find_spec("liger_kernel") is None:
            problem = "liger-kernel is not installed"
            raise ConfigError("model.logits", "liger", problem, "pip install 'grass-dist[liger]', or use chunked")
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(model, {})


def check_ranks(config: RunConfig, world: World) -> None:
    """Checks what depends on the number of ranks.

    Raises:
        ConfigError: the global batch or the mesh does not divide among the ranks.
    """
    parallel, train = config.parallel, config.train
    if parallel.backend == "single" and world.size > 1:
        fix = "use fsdp2 or ddp, or start one process"
        raise ConfigError("parallel.backend", "single", f"{world.size} ranks were started", fix)
    mesh = parallel.mesh
    if world.size % mesh.replicate:
        problem = f"it does not divide the {world.size} ranks"
        raise ConfigError("parallel.mesh.replicate", mesh.replicate, problem, "use a divisor")
    if mesh.shard not in (None, world.size // mesh.replicate):
        problem = f"with replicate={mesh.replicate} it makes {mesh.replicate * mesh.shard} ranks, not {world.size}"
        raise ConfigError("parallel.mesh.shard", mesh.shard, problem, "leave it out, or start as many ranks")
    check_divides(train.global_batch_size, world.size, train.micro_batch_size)


def accumulation_steps(config: RunConfig, world: World) -> int:
    """Returns the number of micro-batches of a step on each rank."""
    return config.train.global_batch_size // (world.size * config.train.micro_batch_size)


def adamw_settings(train: TrainConfig) -> dict[str, Any]:
    """Returns the arguments of `torch.optim.AdamW`, except the weight decay, which depends on the parameter group."""
    return {"lr": train.learning_rate, "betas": train.betas, "eps": train.eps}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups the parameters: matrices have weight decay, vectors (norms, biases) have none."""
    matrices, vectors = [], []
    for param in model.parameters():
        shape = getattr(param, "ds_shape", param.shape)  # ZeRO-3 leaves an empty vector in the parameter
        (matrices if len(shape) >= 2 else vectors).append(param)
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def learning_rate_factor(train: TrainConfig, update_steps: int) -> Callable[[int], float]:
    """Factor of the learning rate at update number k of ``update_steps``: linear warm-up, then the schedule."""

    def factor(step: int) -> float:
        if step < train.warmup_steps:
            return (step + 1) / train.warmup_steps
        done = min(1.0, (step - train.warmup_steps) / max(1, update_steps - train.warmup_steps))
        falling = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
        floor = train.min_learning_rate_ratio if train.schedule != "constant" else 0.0
        return floor + (1 - floor) * falling[train.schedule]

    return factor


def _check_depth(source: str, config: ModelConfig) -> None:
    """Checks the number of layers.

    Raises:
        ConfigError: the model has more layers than can be made.
    """
    from transformers import PreTrainedConfig

    try:
        found, _ = PreTrainedConfig.get_config_dict(source, **loading_options(config.name))
        deep = too_deep(found)
    except Exception:  # whoever loads it says why
        return
    if deep is not None:
        raise ConfigError("model.name", config.name, deep, "repair its config.json")


def _check_dropout(config: ModelConfig, settings: Mapping[str, Any]) -> None:
    """Checks what would only fail in the first forward.

    Raises:
        ConfigError: a rate of dropout is no such rate.
    """
    for name, value in settings.items():
        if isinstance(value, Mapping):
            _check_dropout(config, value)
        elif "drop" in str(name) and isinstance(value, int | float) and not 0 <= value <= 1:
            problem = f"its config.json has {name}={value!r:.40}, which is no rate"
            raise ConfigError("model.name", config.name, problem, "write a number from 0 to 1 there")
        elif name == "attention_dropout" and value is None:
            problem = "its config.json has no number for attention_dropout"
            raise ConfigError("model.name", config.name, problem, "write one from 0 to 1 there")


def _check_complete(config: ModelConfig, found: dict[str, Any], new: set[str]) -> None:
    """Checks what `from_pretrained` tells of the weights. One that is tied to another that is there is not missing.

    Args:
        new: those that the task brings along, which nobody has trained yet.

    Raises:
        ConfigError: some are missing or have another shape, and this is not allowed.
    """
    if new and (not dist.is_initialized() or dist.get_rank() == 0):
        log.warning("%s is new on %s, and begins at random", ", ".join(sorted(new)), config.name)
    missing = sorted({*found["missing_keys"], *(odd := [str(each[0]) for each in found["mismatched_keys"]])} - new)
    if not missing:
        return
    if odd and not config.allow_missing_weights:
        problem = f"its {odd[0]} is of another size than the data need"
        fix = "name the labels that it knows in data.labels, or set model.allow_missing_weights=true for a new head"
        raise ConfigError("model.name", config.name, problem, fix)
    named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    if not config.allow_missing_weights:
        problem = f"its files lack {named}, which would begin at random"
        fix = "complete the model's files, or set model.allow_missing_weights=true to train it so"
        raise ConfigError("model.name", config.name, problem, fix)
    if not dist.is_initialized() or dist.get_rank() == 0:
        log.warning("the files of %s lack %s: these weights begin at random", config.name, named)


def _no_model(config: ModelConfig, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split()) or type(error).__name__
    fix = "give a model's name or folder"
    if "ignore_mismatched_sizes" in reason:  # transformers prints a table of them
        reason, fix = "its weights have other shapes than its config.json says", "give it the one it was saved with"
    if "Unrecognized configuration class" in reason:  # the list of all classes follows
        return ConfigError(
            "model.name", config.name, "it is no model for this task", "choose another one, or another task"
        )
    if unreachable := hub_problem(config.name):
        reason = f"there is no such folder, it is not in the cache of the Hub, and {unreachable}"
        fix = f"{fix}, or load it once where the Hub can be reached"
    if (denied := _denied(error)) is not None:
        own = os.path.isdir(config.name) and os.path.realpath(denied).startswith(os.path.realpath(config.name))
        home = f"set HF_HOME to a folder that you can write in; {denied} is not one"
        fix = f"let this user read {denied}" if own else home
    return ConfigError("model.name", config.name, f"it cannot be loaded ({shorten(reason, 300)})", fix)


def _denied(error: BaseException | None) -> str | None:
    """Returns the path that could not be written or read, if that is why something failed."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            return str(error.filename or "the present one")
        error = error.__cause__ or error.__context__
    return None
