"""Which lists of blocks are the layers of a model: its stacks."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from grass_dist.errors import ConfigError, UnsupportedModel

_LARGE_SHARE = 0.25
_WIDER = 2  # how many times as large the largest block of a stage is than that of another one
_LISTS = (nn.ModuleList, nn.Sequential)
# What DDP, torch.compile, FSDP1, activation checkpointing and adapters put into an FQN.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}


class _Stack(NamedTuple):
    """A list of blocks, or of stages that hold lists of blocks."""

    numel: int  # elements that train
    layer: int  # of them those of its largest block
    name: str
    parts: tuple[str, ...]  # FQNs of the lists whose blocks are the layers: its own, or one of each stage
    whole: bool  # whether all in it that has parameters is a block; else it is taken only when it is named
    leaf: bool  # whether a block has one weight at most, as in a list of heads or of convolutions with their norms


def large_stacks(model: nn.Module, trained: Collection[int]) -> list[str]:
    """FQNs of the stacks that compete unless others are named: the largest, and what is too large to train always.

    That is a list of blocks with a quarter of the elements of the largest one, or more than one of its layers. The
    first may be of a kind that is taken only when it is named.

    Args:
        trained: ids of the parameters that train. Lists of which nothing trains do not count, unless that is all.
    """
    found = _stacks(model, trained)
    found = [stack for stack in found if stack.numel] or _stacks(model, None)
    found = [stack for stack in found if not stack.leaf] or found
    first = next(iter(found), None)
    return [
        part
        for stack in found
        if stack is first
        or (first and stack.whole and (stack.numel >= _LARGE_SHARE * first.numel or stack.numel > first.layer))
        for part in stack.parts
    ]


def choose_stacks(model: nn.Module, modules: Mapping[str, nn.Module], large: Sequence[str]) -> list[str]:
    """Those of `large_stacks`, in the order of the model.

    Raises:
        UnsupportedModel: there is none, or one that is to be named.
    """
    whole = {part for stack in _stacks(model, None) if stack.whole for part in stack.parts}
    if large and large[0] in whole:
        return sorted(large, key=list(modules).index)
    none = _none_in(model)
    if large:
        raise UnsupportedModel(
            f'{none}; set layers="FQN of the layer stack", e.g. layers="{large[0]}", whose blocks are of several '
            "classes and not all layers."
        )
    if alone := _single_blocks(model):
        raise UnsupportedModel(one_block(model, alone[0]))
    raise UnsupportedModel(f'{none}; set layers="FQN of the layer stack".')


def one_block(model: nn.Module, name: str) -> str:
    """The sentence on a list with a single block."""
    return (
        f"{_none_in(model)}: {name} holds one block, which the forward may use many times, and GRASS needs layers that "
        f'train one by one; layers="{name}" with active_layers=1 trains that block at every step.'
    )


def _none_in(model: nn.Module) -> str:
    return f"{class_of(model).__name__} has no nn.ModuleList or nn.Sequential of two or more equal layers"


def given_stacks(model: nn.Module, modules: Mapping[str, nn.Module], layers: str | Sequence[str]) -> list[str]:
    """The stacks that a user has named, in the order of the model.

    Raises:
        ConfigError: one is no list with parameters, or is named twice, or within another one.
    """
    names = [layers] if isinstance(layers, str) else list(layers)
    found = [_given_stack(model, modules, name) for name in names]
    for at, stack in enumerate(found):
        for other in found[:at] + found[at + 1 :]:
            if f"{stack}.".startswith(f"{other}.") or not other:
                raise ConfigError("layers", names[at], f"it is named twice, or is within {other!r}", "leave out one")
    return sorted(found, key=list(modules).index)


def sides_of(stacks: Sequence[str], large: Sequence[str]) -> list[str]:
    """FQNs of the parts around those of ``large`` that are none of ``stacks``: of an encoder, of a vision tower."""
    trunk = {name for stack in stacks for name in prefixes(stack)}
    sides = [next((name for name in prefixes(stack) if name not in trunk), None) for stack in large]
    within = tuple(f"{stack}." for stack in stacks)
    return [side for side in sides if side is not None and not f"{side}.".startswith(within)]


def prefixes(name: str) -> list[str]:
    """The modules around what has this FQN, from the model ("") to itself."""
    parts = name.split(".") if name else []
    return [".".join(parts[:n]) for n in range(len(parts) + 1)]


def outermost(model: nn.Module, chosen: Collection[int]) -> dict[str, str]:
    """For the names of some parameters the outermost modules with nothing else in them; else the name itself.

    Args:
        chosen: ids of the parameters.
    """
    params = list(model.named_parameters())
    mixed = {at for name, p in params if id(p) not in chosen for at in prefixes(name)} | {""}
    return {name: next(at for at in prefixes(name) if at not in mixed) for name, p in params if id(p) in chosen}


def _stacks(model: nn.Module, trained: Collection[int] | None) -> list[_Stack]:
    """The outermost lists of blocks, largest first.

    Args:
        trained: ids of the parameters that count; None: all.
    """
    found: list[_Stack] = []
    hidden: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, _LISTS) or f"{name}.".startswith(tuple(hidden)):
            continue
        if stages := _stages(name, module):
            blocks = [block for _, inner in stages for _, block in _with_params(inner)]
            parts, whole = tuple(inner for inner, _ in stages), True
            inside = [join(name, child) for child, _ in children_of(module)]
        else:
            children, kinds = _with_params(module), Counter(_kind(m) for _, m in _with_params(module))
            equal = len(children) >= 2 and len(kinds) == 1 and len(children) == len(children_of(module))
            # Blocks of several classes, some repeated (attention and Mamba): then the experts inside of them, or a
            # vision tower next to it, may not be taken for the layers in their place.
            some = [(n, m) for n, m in children if kinds[_kind(m)] >= 2 and is_block(m)]
            mixed = bool(some) and all(is_block(m) for _, m in children)
            taken = children if equal or mixed else some
            blocks, parts, whole = [block for _, block in taken], (name,), equal or mixed
            inside = [join(name, child) for child, _ in taken]
        if blocks:
            sizes = [_size(block, trained) for block in blocks]
            leaf = not all(_has_matrices(block) for block in blocks)
            found.append(_Stack(sum(sizes), max(sizes), name, parts, whole, leaf))
            hidden += [f"{child}." for child in inside]
    return sorted(found, key=lambda stack: -stack.numel)


def _stages(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The lists of blocks in the stages of a list, with their FQNs, if it is one of stages (Swin, ConvNeXt, ResNet).

    A stage is a list of blocks, some of one class, or holds one. Equal modules with a list in them, such as a list of
    experts, are layers; stages differ in width, and what they have beside their blocks is small.
    """
    inner = [found for child, stage in _with_params(module) if (found := _blocks_of(join(name, child), stage))]
    sizes = [[_size(block, None) for _, block in _with_params(stage)] for _, stage in inner]
    repeats = any(max(Counter(_kind(block) for _, block in _with_params(stage)).values()) > 1 for _, stage in inner)
    if len(inner) < 2 or not repeats:
        return []
    if all(isinstance(stage, _LISTS) for _, stage in _with_params(module)):
        return inner
    largest = [max(stage) for stage in sizes]
    beside = _size(module, None) - sum(map(sum, sizes))
    return inner if max(largest) >= _WIDER * min(largest) and beside <= max(largest) else []


def _blocks_of(name: str, stage: nn.Module) -> tuple[str, nn.Module] | None:
    """The list of blocks that a stage is or has, with its FQN."""
    if isinstance(stage, _LISTS):
        lists = [(name, stage)]
    else:
        lists = [(join(name, n), m) for n, m in children_of(stage) if isinstance(m, _LISTS) and has_params(m)]
    found = max(lists, key=lambda pair: _size(pair[1], None), default=None)
    return found if found and all(_has_matrices(block) for _, block in _with_params(found[1])) else None


def _has_matrices(module: nn.Module) -> bool:
    """Whether it is a block of more than one weight, and no single layer of a network with its norm."""
    return is_block(module) and sum(len(shape_of(p)) >= 2 for p in module.parameters()) >= 2


def _size(module: nn.Module, trained: Collection[int] | None) -> int:
    """Elements of the parameters that count; None: of all."""
    return sum(numel_of(p) for p in module.parameters() if trained is None or id(p) in trained)


def _with_params(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in children_of(module) if has_params(child)]


def _single_blocks(model: nn.Module) -> list[str]:
    """FQNs of the outermost lists of one block, largest first."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        blocks = [block for _, block in children_of(module) if is_block(block)] if isinstance(module, _LISTS) else []
        if len(blocks) == 1 and not f"{name}.".startswith(tuple(f"{outer}." for outer in found)):
            found[name] = sum(numel_of(p) for p in blocks[0].parameters())
    return sorted(found, key=lambda name: -found[name])


def _given_stack(model: nn.Module, modules: Mapping[str, nn.Module], layers: str) -> str:
    names = [layers] if layers in modules else [name for name in modules if bare_name(name) == bare_name(layers)]
    lists = [name for name, module in modules.items() if isinstance(module, _LISTS)]
    usable = [name for name in lists if any(has_params(block) for _, block in children_of(modules[name]))]
    if chosen := [name for name in names if name in usable]:
        return chosen[0]
    if not names:
        problem = f"{class_of(model).__name__} has no module of that name"
    elif names[0] in lists:
        problem = "none of its children has parameters"
    else:
        problem = f"it is a {class_of(modules[names[0]]).__name__}, and no nn.ModuleList or nn.Sequential"
    known = [part for stack in _stacks(model, None) for part in stack.parts] or _single_blocks(model)
    options = dict.fromkeys(known + difflib.get_close_matches(layers, usable))
    raise ConfigError("layers", layers, problem, f"use {' or '.join(map(repr, options)) or 'another model'}")


def bare_name(name: str) -> str:
    """An FQN without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def class_of(module: nn.Module) -> type:
    """The class of a module, seen through the one that fully_shard() or replicate() generates."""
    cls = type(module)
    names = {f"{prefix}{base.__name__}": base for prefix in ("FSDP", "Replicate") for base in cls.__mro__[1:]}
    return names.get(cls.__name__, cls)


def _kind(module: nn.Module) -> Hashable:
    """What two blocks must have in common: their class, and of lists (which say nothing by it) their children's."""
    return (class_of(module), *(_kind(m) for _, m in children_of(module) if isinstance(module, _LISTS)))


def children_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Like ``namedchildren_of()``, but with a child as often as it occurs."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def has_params(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def is_block(module: nn.Module) -> bool:
    return bool(children_of(module)) and has_params(module) and not isinstance(module, _LISTS)


def has_blocks(module: nn.Module) -> bool:
    return any(isinstance(m, _LISTS) and any(is_block(child) for _, child in children_of(m)) for m in module.modules())


def shape_of(p: nn.Parameter) -> tuple[int, ...]:
    # DeepSpeed's ZeRO-3 leaves an empty tensor in the parameter, and its shape in this attribute.
    return tuple(getattr(p, "ds_shape", p.shape))


def numel_of(p: nn.Parameter) -> int:
    """Number of elements of a whole parameter, also where ZeRO-3 has left it empty."""
    return math.prod(shape_of(p))


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
