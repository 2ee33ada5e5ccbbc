"""`enable`: GRASS under a Hugging Face Trainer, a trainer of TRL, or a loop over Accelerate.

Four public functions of these libraries are wrapped, once, and `disable` puts them back:

- `deepspeed.initialize`, which Accelerate looks up when it prepares, becomes `grass_dist.initialize`.
- `accelerate.Accelerator.prepare` replaces the optimizer by a `GrassOptimizer`, without DeepSpeed.
- `transformers.Trainer.train` tells of its micro-batches: Trainer counts them itself and tells Accelerate of one.
- `transformers.Trainer.log` adds the method's numbers to the logs.

It is no `TrainerCallback` because a callback gets neither the trainer nor the wrapped model, the engine and the DDP
wrapper are made inside `Trainer.train` before ``on_train_begin``, and a user's ``on_log`` comes after TensorBoard's.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from grass_dist.backends.zero.ds_config import has_grass, load_ds_config
from grass_dist.config import GrassConfig
from grass_dist.deepspeed import config_of, initialize_with
from grass_dist.errors import ConfigError, GrassError
from grass_dist.method.controller import GrassController
from grass_dist.method.importance import entropy
from grass_dist.method.schedule import too_short_for
from grass_dist.optimizer import GrassOptimizer
from grass_dist.ranks import say
from grass_dist.states.unit_optimizer import step_over

log = logging.getLogger("grass_dist")


class _Switch:
    """What `enable` was last told."""

    on = False
    config: GrassConfig | None = None


_WRAPPED: dict[tuple[Any, str], Callable[..., Any]] = {}
"""Our functions, by the owner and the name of the attribute that each replaces."""

_TRAINING: list[Any] = []  # in Trainer.train, the innermost last

_LOGGED: weakref.WeakKeyDictionary[GrassController, str] = weakref.WeakKeyDictionary()
"""The importances that were last logged, as text: NaN is not equal to itself."""


def enable(config: GrassConfig | None = None) -> None:
    """Makes Hugging Face Trainer, TRL's trainers and Accelerate train by GRASS.

    Call it before the trainer or the accelerator is made, on every rank. With DeepSpeed the block ``"grass"`` of the
    ds_config says how, and without a block nothing changes; an engine without an optimizer (a reference model, an
    evaluation) stays DeepSpeed's own. Probe steps are optimizer steps, so ``max_steps`` counts them.

    The training logs of a Trainer (those with ``"loss"``) get, for the step to come, ``grass/round`` (-1 in the
    probe), ``grass/entropy`` of the sampling probabilities in nats (ln L if they are even), ``grass/active_0`` and so
    on (layer indices; not in the probe), and ``grass/importance_00`` and so on when they have changed since the last
    log. TensorBoard shows them below ``train/``.

    Args:
        config: for runs without DeepSpeed (DDP, FSDP2, one process); None leaves those runs as they are. A second
            call replaces it.
    """
    _Switch.on, _Switch.config = True, config
    if deepspeed := _module("deepspeed"):
        _wrap(deepspeed, "initialize", _initialize)
    if accelerate := _module("accelerate"):
        _wrap(accelerate.Accelerator, "prepare", _prepare)
    if transformers := _module("transformers"):
        _wrap(transformers.Trainer, "train", _train)
        _wrap(transformers.Trainer, "log", _log)


def disable() -> None:
    """Undoes `enable`. Models that train by GRASS already go on doing so."""
    _Switch.on, _Switch.config = False, None
    for (owner, name), wrapper in list(_WRAPPED.items()):
        if getattr(owner, name) is wrapper:  # else another library has wrapped ours, which only passes on from now
            setattr(owner, name, wrapper.__wrapped__)  # type: ignore[attr-defined]
            del _WRAPPED[owner, name]


def _module(name: str) -> Any:
    """The module; None where it is not installed, or where nothing could use it either."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.import_module(name)
    except Exception as error:  # deepspeed raises its own kinds, for example without a compiler
        log.warning("%s is installed but cannot be imported (%s), so GRASS is not enabled for it.", name, error)
        return None


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    if (owner, name) in _WRAPPED:
        return
    stock = getattr(owner, name)

    @functools.wraps(stock)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(stock, *args, **kwargs) if _Switch.on else stock(*args, **kwargs)

    setattr(owner, name, wrapper)
    _WRAPPED[owner, name] = wrapper


# --- with DeepSpeed


def _initialize(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(stock).bind(*args, **kwargs).arguments
    try:
        config = load_ds_config(config_of(given) or {})
        block = config["grass"] if has_grass(config) else None
        written = None if block is None else GrassConfig(**{str(key): value for key, value in block.items()})
    except ConfigError:
        return initialize_with(stock, args, kwargs, ())  # says so on all ranks
    section = config.get("optimizer")
    if given.get("optimizer") is None and not (isinstance(section, Mapping) and section.get("type")):
        return stock(*args, **kwargs)  # nothing is trained: a reference model, or an evaluation
    if _Switch.config is not None:
        _compare(_Switch.config, written)
    return initialize_with(stock, args, kwargs, ())


def _compare(config: GrassConfig, written: GrassConfig | None) -> None:
    """
    Raises:
        ConfigError: `enable` and the ds_config do not say the same.
    """
    for field, value in config.model_dump().items():
        there = None if written is None else getattr(written, field)
        if value != there:
            problem = f"enable() was given {value!r}, and under DeepSpeed the block in the ds_config rules"
            raise ConfigError(
                f"grass.{field}", there, problem, "write it there, or call enable() without a GrassConfig"
            )


# --- without DeepSpeed


def _train(stock: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
    _TRAINING.append(trainer)
    try:
        result = stock(trainer, *args, **kwargs)
    finally:
        _TRAINING.pop()
    if (grass := _controller_of(trainer)) is not None:
        layers = [grass.numbers[layer] for layer in grass.never_trained]
        if told := too_short_for(layers, len(grass.layers), grass.config.sampler):
            say(grass.backend.ranks, told)
    return result


def _prepare(stock: Callable[..., Any], accelerator: Any, *args: Any, **kwargs: Any) -> Any:
    if accelerator.distributed_type == "DEEPSPEED":
        ds_config = accelerator.deepspeed_plugin.deepspeed_config
        if has_grass(ds_config):
            # or Accelerate makes a DeepSpeedCPUAdam of the optimizer, where the ds_config has offload_optimizer
            ds_config["zero_force_ds_cpu_optimizer"] = False
        return stock(accelerator, *args, **kwargs)
    prepared = stock(accelerator, *args, **kwargs)
    if _Switch.config is not None:
        from accelerate.optimizer import AcceleratedOptimizer

        items = prepared if isinstance(prepared, Sequence) else (prepared,)
        # The models that this accelerator has prepared, in that order; it keeps them for us.
        known = vars(accelerator).setdefault("grass_models", weakref.WeakKeyDictionary())
        known.update({item: None for item in items if isinstance(item, nn.Module)})
        for item in items:
            if isinstance(item, AcceleratedOptimizer):
                _put_grass_in(item, accelerator, list(known), _Switch.config)
    return prepared


def _put_grass_in(accelerated: Any, accelerator: Any, models: Sequence[nn.Module], config: GrassConfig) -> None:
    """Replaces the optimizer that ``accelerated`` wraps by a `GrassOptimizer`."""
    if config.offload.update_in_backward:
        problem = "Trainer and Accelerate clip by calls of their own, which would come too late"
        raise ConfigError("grass.offload.update_in_backward", True, problem, "leave it out, or call GrassOptimizer")
    inner: torch.optim.Optimizer = accelerated.optimizer
    trained = {id(p) for group in inner.param_groups for p in group["params"]}
    model = next((m for m in reversed(models) if any(id(p) in trained for p in m.parameters())), None)
    if isinstance(inner, GrassOptimizer):
        if model is not None and model is not inner._model:
            raise GrassError("The model was wrapped again, as auto_find_batch_size does; GRASS needs a set batch size.")
        return
    trainer = next((t for t in reversed(_TRAINING) if t.accelerator is accelerator), None)
    model = _checked(inner, accelerated, accelerator, model, trainer)
    grass = GrassOptimizer(
        model,
        type(inner),
        _arguments_of(inner),
        config=config,
        params=inner.param_groups,
        gradient_accumulation_steps=(trainer.args if trainer else accelerator).gradient_accumulation_steps,
        shard_states=False,  # under DDP, Trainer and Accelerate save the optimizer of rank 0 alone
    )
    for own, group in zip(grass.param_groups, inner.param_groups, strict=True):
        group.update({k: v for k, v in own.items() if k not in group})
    grass.param_groups = inner.param_groups  # which schedulers that were made before write to
    step_over(inner, [], {})  # or they would warn that this one has not stepped
    accelerated.optimizer = grass
    for name in ("clip_grad_norm_", "clip_grad_value_"):
        setattr(accelerator, name, _after_finishing(getattr(accelerator, name), accelerator, grass.grass))
    if accelerator.distributed_type == "FSDP":
        accelerated.state_dict = accelerated.load_state_dict = _no_fsdp_state


def _checked(inner: torch.optim.Optimizer, accelerated: Any, accelerator: Any, model: Any, trainer: Any) -> nn.Module:
    """The model, if ``inner`` can be replaced.

    Raises:
        GrassError: it cannot.
    """
    name, kind = type(inner).__name__, accelerator.distributed_type
    if kind in ("XLA", "MEGATRON_LM"):
        raise GrassError(f"GRASS does not run under {kind}; use DDP, FSDP2 or DeepSpeed ZeRO.")
    if model is None:
        raise GrassError(
            f"Accelerator.prepare was given an optimizer ({name}) before the model whose parameters it trains; prepare "
            "both in one call, and start one process for each GPU (nn.DataParallel is not supported)."
        )
    if accelerated.scaler is not None:
        raise ConfigError("mixed_precision", "fp16", "GRASS measures gradients, which a GradScaler scales", "use bf16")
    if inner.state:
        raise ConfigError("optimizer", name, f"it has {len(inner.state)} states already", "pass one without")
    if kind == "FSDP" and trainer and trainer.args.save_strategy != "no" and not trainer.args.save_only_model:
        raise ConfigError("save_only_model", False, _NO_FSDP_STATE, "set it to true, or use DeepSpeed ZeRO-3")
    return model


_NO_FSDP_STATE = "Accelerate's FSDP checkpoints have no place for layers without an optimizer state"


def _no_fsdp_state(*_: Any, **__: Any) -> Any:
    raise GrassError(f"{_NO_FSDP_STATE}; save the model alone, or use DeepSpeed ZeRO-3, which continues from one.")


def _arguments_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What of the optimizer's defaults its class can be constructed with; AdamW's hold one that only Adam takes."""
    takes = inspect.signature(type(optimizer)).parameters
    return {k: v for k, v in optimizer.defaults.items() if k in takes}


def _after_finishing(clip: Callable[..., Any], accelerator: Any, grass: GrassController) -> Callable[..., Any]:
    """Finishes the gradients first: a parameter without a gradient can leave a DDP bucket unreduced."""

    @functools.wraps(clip)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if accelerator.sync_gradients:
            grass.finish_gradients()
        if grass.phase == "probe" and clip.__name__ == "clip_grad_value_":
            return None  # torch's fails where there is no gradient
        return clip(*args, **kwargs)

    return wrapper


# --- logs


def _log(stock: Callable[..., Any], trainer: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
    grass = _controller_of(trainer)
    if grass is not None and "loss" in logs:
        logs.update(_numbers(grass))
    return stock(trainer, logs, *args, **kwargs)


def _controller_of(trainer: Any) -> GrassController | None:
    """The controller of what the trainer's wrappers of an optimizer hold: ours for ZeRO, or a `GrassOptimizer`."""
    seen: list[Any] = [trainer]
    while (holder := getattr(seen[-1], "optimizer", None)) is not None and all(holder is not s for s in seen):
        if isinstance(grass := getattr(holder, "grass", None), GrassController):
            return grass
        seen.append(holder)
    return None


def _numbers(grass: GrassController) -> dict[str, float]:
    numbers = {
        "grass/round": float(grass.round),
        "grass/entropy": entropy(grass.probabilities),
    }
    if grass.phase == "train":
        numbers |= {f"grass/active_{i}": float(grass.numbers[layer]) for i, layer in enumerate(grass.active_layers)}
    importances = grass.importances
    if _LOGGED.get(grass) != repr(importances):
        _LOGGED[grass] = repr(importances)
        measured = zip(grass.numbers, importances, strict=True)
        numbers |= {f"grass/importance_{layer:02d}": m for layer, m in measured if not math.isnan(m)}
    return numbers
