"""The arguments that another optimizer like a given one takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from grass_dist.errors import ConfigError
from grass_dist.ranks import describe_error
from grass_dist.states.refused import check_class
from grass_dist.states.update_rule import same

_OF_TORCH = frozenset(vars(torch.optim.Optimizer([nn.Parameter(torch.zeros(1))], {})))
"""Attributes of every optimizer: groups, states, defaults, hooks."""


def arguments_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The arguments with which the class makes an optimizer like this one, but for its parameter groups.

    They are looked up in its defaults, its attributes and, as bitsandbytes keeps them, in its ``args``. Another one is
    then made of them, which must have the same attributes.

    Raises:
        ConfigError: it has not, or the class is one that GRASS cannot train with.
    """
    check_class(type(optimizer))
    places = [optimizer.defaults, vars(optimizer), getattr(vars(optimizer).get("args"), "__dict__", {})]
    takes = list(inspect.signature(type(optimizer)).parameters)[1:]
    found = {name: next(p[name] for p in places if name in p) for name in takes if any(name in p for p in places)}
    name, wanted = type(optimizer).__name__, _attributes(optimizer)
    fix = "call GrassOptimizer with the class and its arguments"
    try:
        made = _attributes(type(optimizer)(_stand_ins(optimizer), **found))
    except Exception as error:  # whatever a class raises
        problem = f"another one cannot be made from its attributes ({describe_error(error)})"
        raise ConfigError("optimizer", name, problem, fix) from error
    odd = sorted(
        k for k in wanted.keys() | made.keys() if k not in made or k not in wanted or not _like(k, wanted, made)
    )
    if odd:
        problem = f"it cannot be told with which arguments it was made: another one has another {odd[0]!r}"
        raise ConfigError("optimizer", name, problem, fix)
    return found


def _attributes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What the class keeps beside its parameter groups; functions are those with which others have wrapped it."""
    return {k: v for k, v in vars(optimizer).items() if k not in _OF_TORCH and not _is_wrapper(v)}


def _is_wrapper(value: Any) -> bool:
    return isinstance(value, Callable) and hasattr(value, "__wrapped__")


def _like(key: str, wanted: Mapping[str, Any], made: Mapping[str, Any]) -> bool:
    a, b = wanted[key], made[key]
    if same(a, b):
        return True
    plain = type(a) is type(b) and type(a).__eq__ is object.__eq__ and hasattr(a, "__dict__")
    return plain and same(vars(a), vars(b))


def _stand_ins(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Its groups over small parameters with as many dimensions."""
    return [
        {**group, "params": [nn.Parameter(torch.zeros([1] * p.ndim)) for p in group["params"]]}
        for group in optimizer.param_groups
    ]


def is_reentrant(args: Any) -> bool:
    """Whether Trainer's activation checkpointing, if these arguments have it on, is the reentrant one."""
    import transformers
    from packaging.version import Version  # transformers depends on it

    given = args.gradient_checkpointing_kwargs or {}
    return bool(given.get("use_reentrant", Version(transformers.__version__) < Version("5")))


def release_embeddings(trainer: Any) -> None:
    """Lets a backward end at the lowest layer that trains, where Trainer recomputes activations without reentrance.

    transformers has the output of the embeddings require a gradient as soon as it recomputes, which only reentrant
    checkpointing needs: a backward would go through all frozen layers to the very first.
    """
    release = getattr(getattr(trainer, "model", None), "disable_input_require_grads", None)
    if release is not None and trainer.args.gradient_checkpointing and not is_reentrant(trainer.args):
        release()
