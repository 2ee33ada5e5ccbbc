"""Finds the decoder layers of a model by structure, and gives every other parameter a role.

No class of any model is named here. The stack is the list of equal blocks with most parameters. The modules on the way
down to it are the *trunk*. All else hangs off the trunk in *branches* (an embedding, a norm, a head, a vision tower).
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from grass_dist.config import ROLES, Role
from grass_dist.errors import ConfigError, UnsupportedModel

NamedParameter = tuple[str, nn.Parameter]

_RIVAL_SHARE = 0.25
_LISTS = (nn.ModuleList, nn.Sequential)
# What DDP, torch.compile, FSDP1 and activation checkpointing put into an FQN.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


@dataclass(frozen=True, slots=True)
class Unit:
    """What trains or freezes as one: a decoder layer, or the always-active parameters of one role."""

    name: str  # FQN of the layer, e.g. "model.layers.7", or the role
    index: int | None  # index among the layers, of a `GrassController` among those that compete; None for a role
    params: tuple[NamedParameter, ...] = field(repr=False)  # with FQNs in the model, in the order of named_parameters()
    number: int | None = None  # of a layer in the model's stack, where layers that do not compete are counted too

    @property
    def numel(self) -> int:
        """Number of elements of all its parameters."""
        return sum(_numel(p) for _, p in self.params)


@dataclass(frozen=True, slots=True)
class LayerMap:
    """Every parameter of a model, exactly once: in a layer, in a role, or in neither."""

    stack: str  # FQN of the layer stack, e.g. "model.layers" (empty where the model itself is the stack)
    layers: tuple[Unit, ...]  # in their order; a child of the stack without parameters is no layer
    roles: tuple[Unit, ...]  # those that the model has, in the order of ROLES
    other: tuple[NamedParameter, ...] = field(repr=False)  # no role (a vision tower, a value head): they stay frozen

    @property
    def numel(self) -> int:
        """Number of elements of all parameters."""
        return sum(unit.numel for unit in (*self.layers, *self.roles)) + sum(_numel(p) for _, p in self.other)


def find_layers(model: nn.Module, layers: str | None = None) -> LayerMap:
    """Finds the decoder layers of ``model`` and sorts the parameters outside of them.

    A parameter that several modules share is listed once, under the name that ``named_parameters()`` gives it: tied
    embeddings are embeddings, and what several layers share is the first one's.

    Args:
        model: any module, wrapped in DDP, torch.compile or FSDP2 or not. It is not changed.
        layers: FQN of the layer stack, with or without the prefixes of wrappers. Left out: the ``nn.ModuleList`` or
            ``nn.Sequential`` of two or more blocks of one class that has most parameters.

    Raises:
        UnsupportedModel: there is no stack, or more than one it could be; or a layer has no parameter of its own.
        ConfigError: ``layers`` names no ``nn.ModuleList`` or ``nn.Sequential`` with parameters.
    """
    # With every name of a shared module: an embedding can be the encoder's by its first name, the decoder's by another.
    modules = dict(model.named_modules(remove_duplicate=False))
    stack = _choose_stack(model) if layers is None else _given_stack(model, modules, layers)
    blocks = {_join(stack, name): block for name, block in _children(modules[stack]) if _has_params(block)}

    # Roles first: a layer that holds the embedding or the head too (multi-token prediction) leaves them their role.
    home: dict[int, int | Role] = dict(_roles(modules, stack, blocks))
    for index, block in enumerate(blocks.values()):
        for p in block.parameters():
            home.setdefault(id(p), index)
    params: dict[int | Role | None, list[NamedParameter]] = {key: [] for key in (*range(len(blocks)), *ROLES, None)}
    for name, p in model.named_parameters():
        params[home.get(id(p))].append((name, p))

    for index, name in enumerate(blocks):
        if not params[index]:
            raise UnsupportedModel(
                f"layer {name} of {_class(model).__name__} shares all its parameters with earlier layers or the "
                'embeddings, so it cannot train on its own; untie it, or choose another stack with layers="FQN".'
            )
    return LayerMap(
        stack=stack,
        layers=tuple(Unit(name, index, tuple(params[index]), index) for index, name in enumerate(blocks)),
        roles=tuple(Unit(role, None, tuple(params[role])) for role in ROLES if params[role]),
        other=tuple(params[None]),
    )


def _stacks(model: nn.Module) -> list[tuple[int, str, bool]]:
    """(parameters, FQN, whether all blocks are of one class) of the outermost lists of blocks, largest first."""
    found: list[tuple[int, str, bool]] = []
    hidden: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, _LISTS) or f"{name}.".startswith(tuple(hidden)):
            continue
        children = _children(module)
        kinds = Counter(_kind(block) for _, block in children)
        equal = len(children) >= 2 and len(kinds) == 1 and all(_has_params(block) for _, block in children)
        # A mixed list that repeats a block (attention and Mamba) is not chosen unasked, but neither may the experts
        # inside of its blocks, or a vision tower next to it, be taken for the layers in its place.
        blocks = children if equal else [(n, m) for n, m in children if kinds[_kind(m)] >= 2 and _is_block(m)]
        if blocks:
            found.append((sum(_numel(p) for _, block in blocks for p in block.parameters()), name, equal))
            hidden += [_join(name, child) + "." for child, _ in blocks]
    return sorted(found, key=lambda stack: -stack[0])


def _choose_stack(model: nn.Module) -> str:
    stacks = _stacks(model)
    near = [(name, equal) for size, name, equal in stacks if size >= _RIVAL_SHARE * stacks[0][0]]
    if len(near) > 1:
        raise UnsupportedModel(
            f"{_class(model).__name__} has more than one stack of layers ({', '.join(name for name, _ in near)}); "
            f'set layers="..." to one of them, e.g. layers="{near[0][0]}".'
        )
    if not near or not near[0][1]:
        hint = f', e.g. layers="{near[0][0]}", whose blocks are of several classes' if near else ""
        raise UnsupportedModel(
            f"{_class(model).__name__} has no nn.ModuleList or nn.Sequential of two or more equal layers; "
            f'set layers="FQN of the layer stack"{hint}.'
        )
    return near[0][0]


def _given_stack(model: nn.Module, modules: dict[str, nn.Module], layers: str) -> str:
    def bare(name: str) -> str:
        return ".".join(part for part in name.split(".") if part not in _WRAPPERS)

    names = [layers] if layers in modules else [name for name in modules if bare(name) == bare(layers)]
    lists = [name for name, module in modules.items() if isinstance(module, _LISTS)]
    usable = [name for name in lists if any(_has_params(block) for _, block in _children(modules[name]))]
    if chosen := [name for name in names if name in usable]:
        return chosen[0]
    if not names:
        problem = f"{_class(model).__name__} has no module of that name"
    elif names[0] in lists:
        problem = "none of its children has parameters"
    else:
        problem = f"it is a {_class(modules[names[0]]).__name__}, and no nn.ModuleList or nn.Sequential"
    options = dict.fromkeys([name for _, name, _ in _stacks(model)] + difflib.get_close_matches(layers, usable))
    raise ConfigError("layers", layers, problem, f"use {' or '.join(map(repr, options)) or 'another model'}")


class _Widths(NamedTuple):
    """Width of the input embedding and of the residual stream; None where it is not known."""

    embedding: int | None
    layers: int | None

    def is_norm(self, *params: nn.Parameter) -> bool:
        """Whether there are parameters and all are vectors of one of the widths."""
        return bool(params) and all(len(_shape(p)) == 1 and _shape(p)[0] in self for p in params)

    def is_position(self, name: str, *params: nn.Parameter) -> bool:
        """Whether it is a table of position embeddings. By its name too: many a weight has such a shape."""
        named = any(word in _leaf(name) for word in ("pos", "emb", "wpe"))
        return named and all(len(_shape(p)) >= 2 and _shape(p)[-1] in self for p in params)

    def projection(self, linear: nn.Linear) -> Role | None:
        """Role of a projection between the two widths, if it is one."""
        # OPT-350m registers project_out before project_in, and both before the layers: only the shapes tell.
        shape = (linear.in_features, linear.out_features)
        if self.embedding == self.layers:
            return None
        return "embeddings" if shape == self else "lm_head" if shape == self[::-1] else None


def _roles(modules: dict[str, nn.Module], stack: str, blocks: dict[str, nn.Module]) -> dict[int, Role]:
    """The roles of the parameters that have one, by their ids. A tied parameter has the first of its roles."""
    parts = stack.split(".") if stack else []
    trunk = {name: modules[name] for name in (".".join(parts[:n]) for n in range(len(parts) + 1))}
    order = {name: i for i, name in enumerate(modules)}
    children = [(_join(above, name), m) for above in trunk if above != stack for name, m in _children(trunk[above])]
    branches = dict(sorted(((n, m) for n, m in children if m not in trunk.values()), key=lambda item: order[item[0]]))
    # A branch with layers of its own (a vision tower, an encoder) has no role as a whole.
    inside = {name: () if _has_blocks(m) else tuple(m.modules()) for name, m in branches.items()}
    loose = [m for name in branches for m in inside[name]]

    # The innermost answer for the input: around a language model, others may answer with the embedding of an image.
    asked = _ask(reversed(trunk.values()), "get_input_embeddings")
    tables = [asked] if isinstance(asked, nn.Embedding) else [m for m in loose if isinstance(m, nn.Embedding)]
    source = asked or next(iter(tables), None)
    rows = {m.num_embeddings for m in tables}
    heads = [m for m in loose if isinstance(m, nn.Linear) and m.out_features in rows]
    head = _ask(trunk.values(), "get_output_embeddings") or next(reversed(heads), None)

    embedding: int | None = getattr(source, "embedding_dim", None)
    # Nearly every parameter of a block has the width of the residual stream among its dimensions.
    sizes = Counter(d for block in blocks.values() for p in block.parameters() for d in set(_shape(p)) if d > 1)
    widths = _Widths(embedding, max(sizes, key=lambda d: (sizes[d], d == embedding), default=None))

    roles: dict[str, Role | None] = {}
    for name, module in branches.items():
        if any(m is source for m in inside[name]):
            roles[name] = "embeddings"
        elif any(m is head for m in inside[name]) or _leaf(name) == "lm_head":
            roles[name] = "lm_head"
        else:
            roles[name] = _role_of_small(name, module, widths)
    norms = [name for name, module in branches.items() if roles[name] is None and widths.is_norm(*module.parameters())]
    roles |= _roles_of_norms(norms, {name for name in norms if order[name] < order[stack]})

    found = [(roles[name], p) for name, module in branches.items() for p in module.parameters()]
    # Parameters without a module around them: only beside the layers, for further out they may be an image's.
    for module in list(trunk.values())[-2:]:
        for name, p in module.named_parameters(recurse=False):
            is_embedding = widths.is_position(name, p) or "emb" in _leaf(name)
            found.append(("embeddings" if is_embedding else "final_norm" if widths.is_norm(p) else None, p))
    found += [("lm_head", p) for p in (head.parameters() if head else ())]
    found += [("embeddings", p) for p in (source.parameters() if source else ())]
    return {id(p): last_wins for last_wins in reversed(ROLES) for role, p in found if role == last_wins}


def _role_of_small(name: str, branch: nn.Module, widths: _Widths) -> Role | None:
    """Role of a branch that is no norm and holds neither the input embedding nor the head."""
    owners = [m for m in branch.modules() if any(True for _ in m.parameters(recurse=False))]
    tables = [m for m in owners if isinstance(m, nn.Embedding)]
    if tables and all(m in tables or widths.is_norm(*m.parameters(recurse=False)) for m in owners):
        return "embeddings"
    if len(owners) == 1 and isinstance(owners[0], nn.Linear):
        return widths.projection(owners[0])
    return "embeddings" if len(owners) == 1 and widths.is_position(name, *branch.parameters()) else None


def _roles_of_norms(norms: list[str], before: set[str]) -> dict[str, Role]:
    """Tells the embeddings' norms (BLOOM) from the final one; ``before`` are those registered before the layers."""
    # OPT registers its final norm before the layers and mBART the embeddings' norm after them: order is not enough.
    # Before the layers a norm is the embeddings' if named so or if another norm follows the layers; after them, if
    # named so and not the only one (LFM2's "embedding_norm" is its final norm).
    named = {name for name in norms if "emb" in _leaf(name)}
    final_follows = any(name not in named | before for name in norms)
    of_embeddings = {n for n in before if n in named or final_follows} | (named - before if len(norms) > 1 else set())
    return {name: "embeddings" if name in of_embeddings else "final_norm" for name in norms}


def _ask(trunk: Iterable[nn.Module], method: str) -> nn.Module | None:
    """The first module that ``method`` of one of the modules returns."""
    for module in trunk:
        try:
            answer = getattr(module, method)()
        except (AttributeError, NotImplementedError, TypeError):  # no such method, no embedding, or it wants arguments
            continue
        if isinstance(answer, nn.Module):
            return answer
    return None


def _class(module: nn.Module) -> type:
    """The class of a module, seen through the one that fully_shard() or replicate() generates."""
    cls = type(module)
    names = {f"{prefix}{base.__name__}": base for prefix in ("FSDP", "Replicate") for base in cls.__mro__[1:]}
    return names.get(cls.__name__, cls)


def _kind(module: nn.Module) -> Hashable:
    """What two blocks must have in common: their class, and of lists (which say nothing by it) their children's."""
    return (_class(module), *(_kind(m) for _, m in _children(module) if isinstance(module, _LISTS)))


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Like ``named_children()``, but with a child as often as it occurs."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def _has_params(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_block(module: nn.Module) -> bool:
    return bool(_children(module)) and _has_params(module) and not isinstance(module, _LISTS)


def _has_blocks(module: nn.Module) -> bool:
    return any(isinstance(m, _LISTS) and any(_is_block(child) for _, child in _children(m)) for m in module.modules())


def _shape(p: nn.Parameter) -> tuple[int, ...]:
    # DeepSpeed's ZeRO-3 leaves an empty tensor in the parameter, and its shape in this attribute.
    return tuple(getattr(p, "ds_shape", p.shape))


def _numel(p: nn.Parameter) -> int:
    return math.prod(_shape(p))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _leaf(name: str) -> str:
    return name.rpartition(".")[2].lower()
