"""`engine.save_checkpoint` and `load_checkpoint`: the states of all layers and of the method in DeepSpeed's files.

And what else the engine gives of the model's weights, where it is asked to leave out frozen ones.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, cast

import torch
from torch import nn

from grass_dist.backends.zero.groups import groups_of
from grass_dist.backends.zero.narrow import NarrowZero
from grass_dist.backends.zero.private import ENGINE_BOUNDARY, ENGINE_EXPORTS
from grass_dist.backends.zero.whole import complete, resume, trainable, whole, with_still
from grass_dist.errors import GrassError
from grass_dist.ranks import say, world


def add_checkpoints(engine: Any) -> None:
    """Wraps the two methods of this engine; their arguments and files are DeepSpeed's."""
    engine.save_checkpoint = _saving(engine, engine.save_checkpoint)
    engine.load_checkpoint = _loading(engine, engine.load_checkpoint)


def add_exports(engine: Any) -> None:
    """Has this engine take for frozen what never trains, and not what rests now."""
    zero: NarrowZero = engine.optimizer
    for name in ENGINE_EXPORTS:
        setattr(engine, name, _exporting(zero, getattr(engine, name)))


def _exporting(zero: NarrowZero, stock: Any) -> Any:
    @functools.wraps(stock)
    def export(*args: Any, **kwargs: Any) -> Any:
        with trainable([param for group in zero.every for param in group.params]):
            return stock(*args, **kwargs)

    return export


def _saving(engine: Any, stock: Any) -> Any:
    @functools.wraps(stock)
    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        # Set where the caller says which micro-batch ends a step (Accelerate does); micro_steps then counts steps.
        ends_step = getattr(engine, ENGINE_BOUNDARY, None)
        counted = engine.micro_steps % engine.gradient_accumulation_steps()
        done = counted if ends_step is None else 0 if ends_step else "some"
        if done:
            raise GrassError(
                f"save_checkpoint was called after {done} of {engine.gradient_accumulation_steps()} micro-batches; "
                "call it after an engine.step() that ends an accumulation, since gradients are not saved."
            )
        zero: NarrowZero = engine.optimizer
        with with_still(zero):
            complete(zero)
            _finish_copies()
            with whole(zero):
                return stock(*args, **kwargs)

    return save_checkpoint


def _loading(engine: Any, stock: Any) -> Any:
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        zero: NarrowZero = engine.optimizer
        given = signature.bind(*args, **kwargs).arguments
        zero.loaded = None
        if given.get("load_module_only"):
            given["load_optimizer_states"] = False  # or ZeRO-3 would load nothing
        try:
            with whole(zero):
                found = stock(**given)
        except KeyError:  # it was saved with other parameters frozen: DeepSpeed misses them among its frozen ones
            with whole(zero), trainable(list(engine.module.parameters())):
                found = stock(**given)
        if found[0] is None:
            return found
        tag = given.get("tag")
        if zero.loaded is None and (tag is None or engine.zero_optimization_stage() < 3):
            _begin_from_weights(engine)
        elif not zero.loaded:  # of full fine-tuning; or of ZeRO-3, which reads the latest tag's, whatever it is told
            _begin_from_full(engine, given["load_dir"], tag)
        else:
            zero.grass.load_state_dict(zero.loaded)
        zero.loaded = None
        zero.states.settle()
        return found

    return load_checkpoint


def _begin_from_weights(engine: Any) -> None:
    """New masters of the weights as they were loaded, and no moments."""
    zero: NarrowZero = engine.optimizer
    current = list(zero.groups)
    zero.forget()
    resume(zero, current)
    say(
        world(),
        "Took over the weights of the checkpoint, whose optimizer states were not to be loaded: masters and moments "
        "begin anew, and the draws go on.",
    )


def _begin_from_full(engine: Any, load_dir: str, tag: str | None) -> None:
    """Takes the fp32 weights of a checkpoint, of full fine-tuning say; every rank reads them all into host memory."""
    from deepspeed.utils import safe_set_full_fp32_param
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    zero: NarrowZero = engine.optimizer
    weights = cast(dict[str, torch.Tensor], get_fp32_state_dict_from_zero_checkpoint(load_dir, tag))
    current = list(zero.groups)
    zero.forget()
    trained = {param for group in zero.every for param in group.params}
    for name, param in engine.module.named_parameters():
        if param not in trained and name in weights:
            _set_weight(param, weights[name])
    for unit in dict.fromkeys(group.unit for group in zero.every):
        with trainable([param for _, param in unit.params]):  # DeepSpeed sets nothing of a frozen one
            zero.narrow(groups_of([unit], zero.user_optimizer.param_groups))
            for name, param in unit.params:
                value = weights[name if name in weights else name.removeprefix("module.")]
                _set_weight(param, value)
                safe_set_full_fp32_param(param, value.to(param.device))
        for group in zero.groups:
            zero.states.of[group.key].changed = True  # 16-bit weights are rounded
    resume(zero, current)
    say(
        world(),
        "Took over the fp32 weights of the checkpoint and left its moments, which are cut by other parameter groups or "
        "were not to be loaded: moments begin anew, and the draws go on.",
    )


@torch.no_grad()
def _set_weight(param: nn.Parameter, value: torch.Tensor) -> None:
    import deepspeed

    with deepspeed.zero.GatheredParameters([param], modifier_rank=0, enabled=hasattr(param, "ds_id")):
        param.copy_(value.to(param.dtype))


def _finish_copies() -> None:
    """States that go to the host are copied on a stream; a file is written from the host."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
