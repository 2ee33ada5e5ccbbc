"""`accelerate.Accelerator.prepare` while GRASS is enabled: the optimizer becomes a `GrassOptimizer`."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn

from grass_dist.checkpoint.marker import write_marker
from grass_dist.checkpoint.torch_states import method_of
from grass_dist.config import GrassConfig
from grass_dist.errors import CheckpointError, ConfigError, GrassError
from grass_dist.huggingface.arguments import arguments_of, release_embeddings
from grass_dist.huggingface.fsdp import (
    FsdpStates,
    StatesBeside,
    check_no_note,
    checking_load,
    sharded_at_load,
    step_past_scaler,
)
from grass_dist.huggingface.resume import start_again
from grass_dist.huggingface.switch import RESUMED, TRAINING, Switch, configured, give_back_later
from grass_dist.huggingface.zero import trains_by_grass
from grass_dist.method.controller import GrassController
from grass_dist.optimizer import GrassOptimizer
from grass_dist.ranks import say
from grass_dist.states.refused import check_class
from grass_dist.states.unit_optimizer import step_over


def prepare_with_grass(stock: Callable[..., Any], accelerator: Any, *args: Any, **kwargs: Any) -> Any:
    trainer = next((t for t in reversed(TRAINING) if t.accelerator is accelerator), None)
    if accelerator.distributed_type == "DEEPSPEED":
        ds_config = accelerator.deepspeed_plugin.deepspeed_config
        if trains_by_grass(ds_config):
            if trainer is not None:
                release_embeddings(trainer)
            # or Accelerate makes a DeepSpeedCPUAdam of the optimizer, where the ds_config has offload_optimizer
            ds_config["zero_force_ds_cpu_optimizer"] = False
        prepared = stock(accelerator, *args, **kwargs)
        for item in prepared if isinstance(prepared, Sequence) else (prepared,):
            if isinstance(grass := getattr(item, "grass", None), GrassController):
                _mark_states(accelerator, grass)
        return prepared
    trains = any(isinstance(item, torch.optim.Optimizer) for item in args)
    config = configured() if trains else Switch.config
    prepared = stock(accelerator, *args, **kwargs)
    if config is not None and trainer is not None:
        release_embeddings(trainer)
    if config is not None:
        from accelerate.optimizer import AcceleratedOptimizer

        items = prepared if isinstance(prepared, Sequence) else (prepared,)
        # The models that this accelerator has prepared, in that order; it keeps them for us.
        known = vars(accelerator).setdefault("grass_models", weakref.WeakKeyDictionary())
        known.update({item: None for item in items if isinstance(item, nn.Module)})
        for item in items:
            if isinstance(item, AcceleratedOptimizer):
                put_grass_in(item, accelerator, list(known), config)
    return prepared


def put_grass_in(accelerated: Any, accelerator: Any, models: Sequence[nn.Module], config: GrassConfig) -> None:
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
    trainer = next((t for t in reversed(TRAINING) if t.accelerator is accelerator), None)
    if trainer is not None and sharded_at_load(trainer):
        model = trainer.model  # which Trainer does not prepare
    model = checked_model(inner, accelerator, model)
    grass = GrassOptimizer(
        model,
        type(inner),
        arguments_of(inner),
        config=config,
        params=inner.param_groups,
        gradient_accumulation_steps=(trainer.args if trainer else accelerator).gradient_accumulation_steps,
        observers=Switch.observers,
        shard_states=False,  # under DDP, Trainer and Accelerate save the optimizer of rank 0 alone
    )
    give_back_later(grass, "detach")
    for own, group in zip(grass.param_groups, inner.param_groups, strict=True):
        group.update({k: v for k, v in own.items() if k not in group})
    grass.param_groups = inner.param_groups  # which schedulers that were made before write to
    # Or they would warn that this one has not stepped. Classes without a schedule ask the first group for their mode.
    nothing = [{**g, "params": [], **({"train_mode": True} if "train_mode" in g else {})} for g in inner.param_groups]
    step_over(inner, nothing, {})
    # Its constructor, once more: it keeps the method `step` of its optimizer, where it has a scaler.
    accelerated.__init__(grass, device_placement=False, scaler=accelerated.scaler)
    _mark_states(accelerator, grass.grass)
    for name in ("clip_grad_norm_", "clip_grad_value_"):
        setattr(accelerator, name, _after_finishing(getattr(accelerator, name), accelerator, grass.grass))
    _tie_states(accelerated, accelerator, grass, model, trainer)


def _tie_states(accelerated: Any, accelerator: Any, grass: GrassOptimizer, model: nn.Module, trainer: Any) -> None:
    """Gives ``accelerated`` the state dicts that are saved and loaded where its model is wrapped as it is."""
    load, folder = functools.partial(_load_state, grass), RESUMED.get(id(trainer))
    if accelerator.distributed_type == "FSDP":
        states = FsdpStates(grass, load, folder)
        accelerator.load_state = checking_load(accelerator.load_state, accelerator, states)
        accelerated.step = MethodType(step_past_scaler, accelerated)
    elif sharded_at_load(trainer):
        states = StatesBeside(model, grass, folder)
    else:
        accelerated.load_state_dict = load
        return
    accelerated.state_dict, accelerated.load_state_dict = states.state_dict, states.load_state_dict


def _mark_states(accelerator: Any, grass: GrassController) -> None:
    """Marks what `Accelerator.save_state` saves from now on."""
    known = weakref.ref(grass)  # the accelerator outlives the run

    def mark(models: Any, weights: Any, folder: str) -> None:
        if accelerator.is_main_process and (alive := known()) is not None:
            write_marker(Path(folder), alive)

    accelerator.register_save_state_pre_hook(mark)


def checked_model(inner: torch.optim.Optimizer, accelerator: Any, model: Any) -> nn.Module:
    """The model, if ``inner`` can be replaced.

    Raises:
        GrassError: it cannot.
    """
    check_class(type(inner))
    name, kind = type(inner).__name__, accelerator.distributed_type
    if kind in ("XLA", "MEGATRON_LM"):
        raise GrassError(f"GRASS does not run under {kind}; use DDP, FSDP2 or DeepSpeed ZeRO.")
    if model is None:
        raise GrassError(
            f"Accelerator.prepare was given an optimizer ({name}) before the model whose parameters it trains; prepare "
            "both in one call, and start one process for each GPU (nn.DataParallel is not supported)."
        )
    if inner.state and not isinstance(inner, torch.optim.Adagrad):  # which has them from the start, all equal
        raise ConfigError("optimizer", name, f"it has {len(inner.state)} states already", "pass one without")
    if isinstance(inner, torch.optim.Adagrad) and any(float(own["step"]) for own in inner.state.values()):
        raise ConfigError("optimizer", name, "it has taken a step already", "pass one that has not")
    return model


def _load_state(grass: GrassOptimizer, state_dict: dict[str, Any]) -> None:
    """Loads the state of a GRASS run. Of an ordinary run's it takes the learning rates alone, and says so.

    Raises:
        CheckpointError: the run cannot go on from it.
    """
    check_no_note(state_dict)
    saved = state_dict.get("param_groups")
    if saved is None or method_of(state_dict) is not None:
        try:
            return grass.load_state_dict(state_dict)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    if len(saved) == len(grass.param_groups):
        for own, group in zip(grass.param_groups, saved, strict=True):
            own["lr"] = group.get("lr", own["lr"])
    say(
        grass.grass.backend.ranks,
        "The checkpoint was saved without GRASS: its weights are taken over and its optimizer states are not. "
        + start_again(grass.grass.schedule.probe_steps),
    )


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
