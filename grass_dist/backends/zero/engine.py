"""The methods of a DeepSpeed engine that do more under GRASS: checkpoints, exports of weights, and `destroy`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from grass_dist.backends.zero.groups import groups_of, set_weight
from grass_dist.backends.zero.narrow import NarrowZero
from grass_dist.backends.zero.private import ENGINE_BOUNDARY, ENGINE_EXPORTS, ENGINE_HOOKS, refused_states
from grass_dist.backends.zero.saved_state import trainable
from grass_dist.backends.zero.universal import begin_from_universal
from grass_dist.errors import CheckpointError, GrassError
from grass_dist.model.compiled import compile_layers
from grass_dist.ranks import say, world

Flags = Sequence[tuple[nn.Parameter, bool]]
"""The parameters of a model, and whether each had ``requires_grad`` before an engine was made of it."""


def wrap_methods(engine: Any, flags: Flags) -> None:
    """Wraps methods of this engine; their arguments, results and files are DeepSpeed's."""
    around = {"save_checkpoint": _saving, "load_checkpoint": _loading, **dict.fromkeys(ENGINE_EXPORTS, _exporting)}
    around["destroy"] = functools.partial(_destroying, flags)
    around |= {"set_gradient_accumulation_boundary": _ending, "compile": _compiling}
    around |= dict.fromkeys(("no_sync", "coalesce_grad_reduction"), _accumulating)
    for name, wrap in around.items():
        if (stock := getattr(engine, name, None)) is None:  # of later releases
            continue
        setattr(engine, name, functools.wraps(stock)(wrap(engine, stock)))


def _ending(engine: Any, stock: Callable[[bool], None]) -> Callable[[bool], None]:
    """The caller says which micro-batch ends a step: a probe is told, so that it sums the gradients until then."""

    def set_gradient_accumulation_boundary(is_boundary: bool) -> None:
        stock(is_boundary)
        engine.grass.backend.accumulate(bool(is_boundary))

    return set_gradient_accumulation_boundary


def _compiling(engine: Any, stock: Callable[..., None]) -> Callable[..., None]:
    """`compile` compiles each layer by itself: of the whole model there would be another graph after each draw."""

    def compile(*args: Any, **kwargs: Any) -> None:
        module, layers = engine.module, [unit.name for unit in engine.grass.layers]

        def each(**options: Any) -> None:
            compile_layers(module, layers, **options)
            say(world(), f"engine.compile() compiles each of the {len(layers)} layers by itself, and nothing else.")

        module.compile = each  # which DeepSpeed calls
        try:
            stock(*args, **kwargs)
        finally:
            del module.compile

    return compile


def _accumulating(engine: Any, stock: Callable[[], Any]) -> Callable[[], Any]:
    """No backward in a block of these ends a step."""

    @contextmanager
    def block() -> Iterator[None]:
        with stock():
            before = engine.grass.backend.accumulate(False)
            try:
                yield
            finally:
                engine.grass.backend.accumulate(before)

    return block


def _exporting(engine: Any, stock: Callable[..., Any]) -> Callable[..., Any]:
    """An export takes for frozen what never trains, and not what rests now."""

    def export(*args: Any, **kwargs: Any) -> Any:
        with trainable([param for group in engine.optimizer.every for param in group.params]):
            return stock(*args, **kwargs)

    return export


def _destroying(flags: Flags, engine: Any, stock: Callable[[], None]) -> Callable[[], None]:
    """`destroy` also gives the model back as it was.

    Hooks of the method and of the engine are off, ``requires_grad`` is what ``flags`` say, no gradient is left, and
    the model may be given to `initialize` again. Its weights stay; at ZeRO-3 they stay in shards, as with DeepSpeed.
    A second call does nothing: DeepSpeed calls it when the engine is collected, and by then the model may have another
    engine.
    """
    zero: NarrowZero = engine.optimizer
    destroyed = False

    def destroy() -> None:
        nonlocal destroyed
        if destroyed:
            return
        destroyed = True
        try:
            stock()
        finally:
            zero.reads.remove(param for param, _ in flags)
            zero.grass.detach()
            for name in ENGINE_HOOKS:
                if (hook := getattr(engine, name, None)) is not None:
                    hook.remove()
            for param, flag in flags:
                param.requires_grad_(flag)
                param.grad = None

    return destroy


def _saving(engine: Any, stock: Callable[..., Any]) -> Callable[..., Any]:
    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        # Set where the caller says which micro-batch ends a step (Accelerate does); micro_steps then counts steps.
        ends_step = getattr(engine, ENGINE_BOUNDARY, None)
        counted = engine.micro_steps % engine.gradient_accumulation_steps()
        done = counted if ends_step is None else 0 if ends_step else "some"
        zero: NarrowZero = engine.optimizer
        if done and (missing := zero.without_masters()):
            raise GrassError(
                f"save_checkpoint was called after {done} of {engine.gradient_accumulation_steps()} micro-batches, and "
                f"{missing[0].unit.name} has not trained yet: making its fp32 masters for the file would lose the "
                "gradients so far; call it after an engine.step() that ends an accumulation."
            )
        zero.complete()
        _finish_copies()
        with zero.whole(saving=True), _fit_for_universal(engine.module):
            return stock(*args, **kwargs)

    return save_checkpoint


def _loading(engine: Any, stock: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(stock)

    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        zero: NarrowZero = engine.optimizer
        given = signature.bind(*args, **kwargs).arguments
        if given.get("load_module_only"):
            given["load_optimizer_states"] = False  # or ZeRO-3 would load nothing
        zero.grass.note_changed()
        try:
            with zero.whole():
                found = stock(**given)
        except refused_states() as error:
            raise _other_ranks(engine, given["load_dir"], error) from None
        except KeyError as error:
            if error.args == ("lr_scheduler",):
                raise CheckpointError(
                    f"{given['load_dir']} has no state of a scheduler, and the engine has a scheduler: call "
                    "load_checkpoint with load_lr_scheduler_states=False, and set the scheduler yourself."
                ).everywhere() from None
            # It was saved with other parameters frozen: DeepSpeed misses them among its frozen ones.
            with zero.whole(), trainable(list(engine.module.parameters())):
                found = stock(**given)
        if found[0] is None:
            return found
        if zero.universal is not None:
            wanted = given.get("load_optimizer_states", True) and not given.get("load_module_only")
            begin_from_universal(engine, zero.universal, optimizer_states=wanted)
            zero.states.settle()
            return found
        tag = given.get("tag")
        if zero.loaded is None and (tag is None or engine.zero_optimization_stage() < 3):
            _begin_from_weights(engine)
        elif not zero.loaded:  # of full fine-tuning; or of ZeRO-3, which reads the latest tag's, whatever it is told
            _begin_from_full(engine, given["load_dir"], tag)
        else:
            zero.grass.load_state_dict(zero.loaded)
        zero.states.settle()
        return found

    return load_checkpoint


def _other_ranks(engine: Any, folder: str, error: Exception) -> CheckpointError:
    """DeepSpeed refuses, on all ranks, states that another number of ranks has saved."""
    saved, ranks = engine.loaded_checkpoint_dp_world_size, engine.grass.backend.ranks.world_size
    if saved == ranks:
        return CheckpointError(f"{folder}: {str(error).rstrip('.')}.").everywhere()
    return CheckpointError(
        f"{folder} was saved by {saved} ranks and this run has {ranks}, and the states in DeepSpeed's files go on with "
        f"as many ranks as saved them: load it with {saved} ranks, save it there with grass_dist.save_checkpoint, and "
        "load that here with grass_dist.load_checkpoint, which takes any number of ranks."
    ).everywhere()


def _begin_from_weights(engine: Any) -> None:
    """Makes new masters from the weights as they were loaded, and starts without moments."""
    zero: NarrowZero = engine.optimizer
    current = list(zero.groups)
    zero.forget()
    zero.resume(current)
    say(
        world(),
        "Took over the weights of the checkpoint, whose optimizer states were not to be loaded: masters and moments "
        "start again, and the draws go on.",
    )


def _begin_from_full(engine: Any, load_dir: str, tag: str | None) -> None:
    """Takes the fp32 weights of a checkpoint, such as one of full fine-tuning; each rank reads all into host memory."""
    from deepspeed.utils import safe_set_full_fp32_param
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    zero: NarrowZero = engine.optimizer
    weights = cast(dict[str, torch.Tensor], get_fp32_state_dict_from_zero_checkpoint(load_dir, tag))
    current = list(zero.groups)
    zero.forget()
    trained = {param for group in zero.every for param in group.params}
    for name, param in engine.module.named_parameters():
        if param not in trained and name in weights:
            set_weight(param, weights[name])
    for unit in dict.fromkeys(group.unit for group in zero.every):
        with trainable([param for _, param in unit.params]):  # DeepSpeed sets nothing of a frozen one
            zero.narrow(groups_of([unit], zero.user_optimizer.param_groups))
            for name, param in unit.params:
                value = weights[name if name in weights else name.removeprefix("module.")]
                set_weight(param, value)
                safe_set_full_fp32_param(param, value.to(param.device))
        for group in zero.groups:
            zero.states.of[group.key].changed = True  # 16-bit weights are rounded
    zero.resume(current)
    say(
        world(),
        "Took over the fp32 weights of the checkpoint and left its moments, which are cut by other parameter groups or "
        "were not to be loaded: moments start again, and the draws go on.",
    )


@contextmanager
def _fit_for_universal(module: nn.Module) -> Iterator[None]:
    """While it lasts, DeepSpeed saves with the module what its ``ds_to_universal`` asks for."""
    from deepspeed.checkpoint import constants

    if hasattr(module, name := constants.UNIVERSAL_CHECKPOINT_INFO):
        yield
        return
    version = constants.UNIVERSAL_CHECKPOINT_VERSION_KEY, constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE
    setattr(module, name, dict([version]))
    try:
        yield
    finally:
        delattr(module, name)


def _finish_copies() -> None:
    """Waits for all copies: states go to the host on a stream, and a file is written from the host."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
