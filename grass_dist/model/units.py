"""What trains and what must be equal on all ranks: what every front door works out first."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from torch import nn

from grass_dist.config import GrassConfig, check_competing, parameter_budget
from grass_dist.errors import UnsupportedModel
from grass_dist.events import Started
from grass_dist.model.always import always_active_roles
from grass_dist.model.discovery import LayerMap, Unit
from grass_dist.model.stacks import numel_of, outermost, shape_of


class GradientHook:
    """A post-accumulate-grad hook of the method; calls ``method(name, slot, param)`` for as long as its object lives.

    Python's collector does not see hooks of tensors: what they referred to would live as long as the process, and the
    parameter with it.
    """

    def __init__(self, method: Callable[[str, int, nn.Parameter], None], name: str, slot: int) -> None:
        self._method, self._name, self._slot = weakref.WeakMethod(method), name, slot

    @property
    def alive(self) -> bool:
        """Whether there still is an object whose method is called."""
        return self._method() is not None

    def __call__(self, param: torch.Tensor) -> None:
        if (call := self._method()) is not None:
            call(self._name, self._slot, cast(nn.Parameter, param))


def refuse_second(model: nn.Module) -> None:
    """
    Raises:
        UnsupportedModel: a parameter of the model has a `GradientHook` of an optimizer that is still in use.
    """
    if _is_hooked(model):
        gc.collect()  # an optimizer without a reference may not have been collected
        if _is_hooked(model):
            raise UnsupportedModel(
                "The model has a GrassOptimizer already, whose hooks are in its parameters; detach that one "
                "(optimizer.detach(), or engine.destroy() under DeepSpeed), load a state into it, or build a new model."
            )


def _is_hooked(model: nn.Module) -> bool:
    for param in model.parameters():
        if not param.requires_grad:
            continue
        handle = param.register_post_accumulate_grad_hook(_nothing)  # whose handle shows the other hooks
        others = handle.hooks_dict_ref() or {}
        handle.remove()
        if any(isinstance(hook, GradientHook) and hook.alive for hook in others.values()):
            return True
    return False


def _nothing(_: torch.Tensor) -> None:
    pass


def choose_units(
    model: nn.Module, found: LayerMap, config: GrassConfig, groups: Sequence[Mapping[str, Any]]
) -> tuple[tuple[Unit, ...], tuple[Unit, ...]]:
    """The layers that compete and the always-active roles, each with those of its parameters that the groups train.

    A layer of which the user has frozen or left out every parameter does not compete; the others keep their numbers.

    Raises:
        UnsupportedModel: no layer has a parameter to train, or one that trains is of complex numbers.
        ConfigError: fewer layers compete than are to train at a time, or a fixed layer does not; or as
            `parameter_budget` and `always_active_roles` have it.
    """
    trained = {id(p) for g in groups for p in g["params"] if p.requires_grad}

    def narrowed(unit: Unit) -> Unit:
        return dataclasses.replace(unit, params=tuple((n, p) for n, p in unit.params if id(p) in trained))

    competing = [unit for unit in map(narrowed, found.layers) if unit.params]
    if not competing:
        raise UnsupportedModel(
            f"None of the {len(found.layers)} layers of {found.stack or 'the model'} has a parameter to train; leave "
            "requires_grad on for those that are to compete for sampling, and pass them to the optimizer."
        )
    check_competing(config, [unit.index for unit in competing if unit.index is not None], len(found.layers))
    layers = tuple(dataclasses.replace(unit, index=position) for position, unit in enumerate(competing))
    parameter_budget(config, [unit.numel for unit in layers])
    roles = always_active_roles(model, found, config, trained)
    _refuse_quantised(model, found, layers)
    for name, param in (named for unit in (*layers, *roles) for named in unit.params):
        if param.is_floating_point() and param.dtype.itemsize == 1:
            raise UnsupportedModel(
                f"{name} is of {param.dtype}, in which nothing can be trained: load the model without quantization, or "
                "freeze it."
            )
        if param.is_complex():
            raise UnsupportedModel(
                f"{name} is of {param.dtype}, and grass_dist measures and keeps real numbers: freeze it, leave it out "
                "of params=, or store it as pairs of real numbers (torch.view_as_real)."
            )
    return layers, roles


def freeze_others(units: Iterable[Unit], params: Iterable[nn.Parameter]) -> None:
    """Freezes those of ``params`` that are in none of ``units``."""
    trains = {id(p) for unit in units for _, p in unit.params}
    for param in params:
        if id(param) not in trains:
            param.requires_grad_(False)


def restore_flags(flags: Iterable[tuple[nn.Parameter, bool]]) -> None:
    """Gives parameters their ``requires_grad`` back."""
    for param, flag in flags:
        param.requires_grad_(flag)


def shown_names(names: Sequence[str]) -> str:
    """A list of names, cut where it is long."""
    return ", ".join(names) if len(names) <= 8 else f"{names[0]}, {names[1]}, ... {names[-1]}"


def frozen_layers(found: LayerMap, layers: Sequence[Unit]) -> str | None:
    """A sentence on the layers that do not compete, if there are any."""
    compete = {unit.name for unit in layers}
    if not (frozen := [unit.name for unit in found.layers if unit.name not in compete]):
        return None
    return (
        f"{len(frozen)} of {len(found.layers)} layers do not compete, since none of their parameters has requires_grad "
        f"and is in the optimizer: {shown_names(frozen)}; the other {len(layers)} compete."
    )


def several_stacks(found: LayerMap) -> str | None:
    """A sentence on the stacks, if there are several."""
    if len(found.stacks) == 1:
        return None
    counts = [sum(unit.name.startswith(f"{stack}.") for unit in found.layers) for stack in found.stacks]
    ends = list(accumulate(counts))
    shown = [f"{s} ({end - count} to {end - 1})" for s, count, end in zip(found.stacks, counts, ends, strict=True)]
    return (
        f"The layers of {', '.join(shown[:-1])} and {shown[-1]} compete as one set of {len(found.layers)}; to train "
        f'those of one stack alone, set layers="{found.stacks[-1]}", say: then what is around the other'
        f"{'s' if len(shown) > 2 else ''} stays frozen."
    )


def started_with(model: nn.Module, found: LayerMap, layers: Sequence[Unit], roles: Sequence[Unit]) -> Started:
    """What a run trains, and what is frozen for good. Call it after `freeze_others`.

    Frozen are layers and roles of which nothing trains, and for other parameters the outermost modules of which all is
    frozen. What was left out of this optimizer with ``requires_grad`` on, so that another one may train it, is apart.
    """
    trains = {id(p) for unit in (*layers, *roles) for _, p in unit.params}
    still = [(name, p) for name, p in model.named_parameters() if id(p) not in trains and not p.requires_grad]
    frozen = {id(p) for _, p in still}
    left = {id(p) for p in model.parameters() if id(p) not in trains and p.requires_grad}
    whole = [unit for unit in (*found.layers, *found.roles) if all(id(p) in frozen for _, p in unit.params)]
    home = {id(p): unit.name for unit in whole for _, p in unit.params}
    places = outermost(model, frozen - set(home))
    names = [home.get(id(p)) or places[name] for name, p in still]
    numel = found.numel
    return Started(
        stacks=found.stacks,
        layers=tuple(unit.name for unit in layers),
        num_layers=len(found.layers),
        roles={unit.name: tuple(name for name, _ in unit.params) for unit in roles},
        frozen=tuple(dict.fromkeys(names)),
        frozen_share=sum(numel_of(p) for _, p in still) / numel if numel else 0.0,
        left_out=tuple(dict.fromkeys(outermost(model, left).values())),
    )


_INDEXES = (torch.bool, torch.int64)
"""Dtypes of buffers that are masks and tables of positions, and no weights."""


def is_quantised(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a dtype that weights have only when they are quantised."""
    if tensor.is_floating_point():
        return tensor.dtype.itemsize == 1
    return not tensor.is_complex() and tensor.dtype not in _INDEXES


def _refuse_quantised(model: nn.Module, found: LayerMap, layers: Sequence[Unit]) -> None:
    """
    Raises:
        UnsupportedModel: the matrices of a layer are of whole numbers or of 8-bit floats, in parameters or in buffers
            (GPTQ, AWQ, HQQ), and nothing but vectors would train.
    """
    whole = {unit.name: unit for unit in found.layers}
    for unit in layers:
        buffers = [(f"{unit.name}.{n}", b) for n, b in model.get_submodule(unit.name).named_buffers() if b.ndim > 1]
        odd = [(n, t) for n, t in (*whole[unit.name].params, *buffers) if is_quantised(t)]
        if odd and all(len(shape_of(p)) < 2 for _, p in unit.params):
            trains = shown_names([n.removeprefix(unit.name + ".") for n, _ in unit.params])
            raise UnsupportedModel(
                f"The layers are quantised: {odd[0][0]} is of {odd[0][1].dtype}, which has no gradient, so that of "
                f"{unit.name} only {trains} would train; load the model without quantization."
            )


def sparse_parameters(model: nn.Module, units: Sequence[Unit]) -> list[str]:
    """Names of the parameters of ``units`` whose module says that their gradients are sparse."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    sparse = {id(m.weight) for m in model.modules() if isinstance(m, kinds) and m.sparse}
    return [name for unit in units for name, param in unit.params if id(param) in sparse]


def check_one_device(units: Sequence[Unit], *, resting: torch.device | None = None) -> None:
    """
    Args:
        resting: weights of layers rest in host memory and come to this device, so they may be in either.

    Raises:
        UnsupportedModel: what trains is on several devices of this rank, or has no memory yet.
    """
    every = [named for unit in units for named in unit.params]
    if every and all(param.is_meta for _, param in every):
        raise UnsupportedModel(
            f"The model's parameters have no memory ({every[0][0]} is on the meta device): call "
            "model.to_empty(device=...) and load or initialize its weights before you make the optimizer."
        )
    on: dict[torch.device, str] = {}
    for unit in units:
        for name, param in unit.params:
            if resting is None or unit.index is None or param.device.type != "cpu":
                on.setdefault(param.device, name)
    if resting is not None:
        on.setdefault(resting, "the model")
    if len(on) > 1:
        shown = ", ".join(f"{name} on {device}" for device, name in on.items())
        raise UnsupportedModel(
            f"Parameters that train are on several devices ({shown}); grass_dist trains layers that are all on one "
            "device of each rank: load the model without device_map, and if it does not fit there, shard it by "
            "fully_shard or ZeRO-3."
        )


def fingerprint(
    config: GrassConfig,
    found: LayerMap,
    competing: Sequence[Unit],
    groups: Sequence[Mapping[str, Any]],
    optimizer_class: type,
    kwargs: Mapping[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """What must be equal on all ranks, by the names that an error shows; ``more`` is what one front door has."""
    layers = [(u.name, u.numel, len(u.params)) for u in (*found.layers, *found.roles)]
    return {
        **{f"grass.{name}": value for name, value in config.model_dump().items()},
        "model layers": layers,
        "layers that compete": [unit.name for unit in competing],
        "optimizer": (optimizer_class.__name__, sorted(kwargs.items(), key=repr)),
        "parameter groups": [len(group["params"]) for group in groups],
        "torch version": torch.__version__,
        **more,
    }
