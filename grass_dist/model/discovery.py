"""Finds the layers of a model by structure, and gives every other parameter a role.

No class of any model is named here. The modules on the way down to a stack of layers are its *trunk*. All else hangs
off the trunk in *branches* (an embedding, a norm, a head, a vision tower). Each stack gives roles around its own trunk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from grass_dist.config import ADAPTERS, ROLES, Role
from grass_dist.errors import UnsupportedModel
from grass_dist.model.stacks import (
    children_of,
    choose_stacks,
    class_of,
    given_stacks,
    has_blocks,
    has_params,
    join,
    large_stacks,
    numel_of,
    one_block,
    shape_of,
    sides_of,
)

NamedParameter = tuple[str, nn.Parameter]


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
        return sum(numel_of(p) for _, p in self.params)


@dataclass(frozen=True, slots=True)
class LayerMap:
    """Every parameter of a model, exactly once: in a layer, in a role, or among the others."""

    stacks: tuple[str, ...]  # FQNs of the lists of layers, e.g. "model.layers" ("" where the model itself is the list)
    layers: tuple[Unit, ...]  # of all stacks, in the order of the model; a child without parameters is no layer
    roles: tuple[Unit, ...]  # those that the model has, in the order of ROLES and without "others"; then adapters
    other: tuple[NamedParameter, ...] = field(repr=False)  # no layer and no role of its own: a classifier, a projector
    aside: frozenset[str] = field(
        default=frozenset(), repr=False
    )  # names in `other`: around a stack that was not named

    @property
    def stack(self) -> str:
        """The stacks, for a sentence."""
        return ", ".join(self.stacks[:-1]) + " and " * (len(self.stacks) > 1) + self.stacks[-1]

    @property
    def others(self) -> tuple[nn.Parameter, ...]:
        """The parameters that the role ``others`` trains: of `other` what is not `aside`."""
        return tuple(p for name, p in self.other if name not in self.aside)

    @property
    def numel(self) -> int:
        """Number of elements of all parameters."""
        return sum(unit.numel for unit in (*self.layers, *self.roles)) + sum(numel_of(p) for _, p in self.other)


def find_layers(
    model: nn.Module,
    layers: str | Sequence[str] | None = None,
    params: Iterable[nn.Parameter] | None = None,
    *,
    added: Collection[int] = (),
) -> LayerMap:
    """Finds the layers of ``model`` and sorts the parameters outside of them.

    A parameter that several modules share is listed once, under the name that ``named_parameters()`` gives it: tied
    embeddings are embeddings, and what several layers share is the first one's. A block that is in the stacks twice is
    one layer.

    Args:
        model: any module, wrapped in DDP, torch.compile or FSDP2 or not. It is not changed.
        layers: FQN of the layer stack, or of several, with or without the prefixes of wrappers. Left out: the largest
            list of blocks of which something trains, and the other such lists that are large (docs/models.md).
        params: what is to train. Left out: what has ``requires_grad``, so call it before there is a `GrassOptimizer`.

    Raises:
        UnsupportedModel: there is no stack, or one of a single block that is used many times; or a layer has nothing
            but the embeddings or the head.
        ConfigError: ``layers`` names no ``nn.ModuleList`` or ``nn.Sequential`` with parameters, or one twice.
    """
    trained = {id(p) for p in (model.parameters() if params is None else params) if p.requires_grad}
    # With every name of a shared module: an embedding can be the encoder's by its first name, the decoder's by another.
    modules = dict(model.named_modules(remove_duplicate=False))
    large = large_stacks(model, trained)
    stacks = choose_stacks(model, modules, large) if layers is None else given_stacks(model, modules, layers)
    blocks = {
        stack: {join(stack, name): block for name, block in children_of(modules[stack]) if has_params(block)}
        for stack in stacks
    }
    every = {name: block for of in blocks.values() for name, block in of.items()}

    # Roles first: a layer that holds the embedding or the head too (multi-token prediction) leaves them their role.
    found = [_roles(modules, stack, blocks[stack], added) for stack in stacks]
    home: dict[int, int | str] = {
        at: role for role in reversed(ROLES) for roles in found for at, own in roles.items() if own == role
    }
    home |= dict.fromkeys(added, ADAPTERS)
    kept: list[str] = []
    for name, block in every.items():
        own = [id(p) for p in block.parameters()]
        if not all(isinstance(home.get(at), int) for at in own):  # else it is an earlier block, used once more
            for at in own:
                home.setdefault(at, len(kept))
            kept.append(name)
    keys = (*range(len(kept)), *ROLES, ADAPTERS, None)
    params_of: dict[int | str | None, list[NamedParameter]] = {key: [] for key in keys}
    for name, p in model.named_parameters():
        params_of[home.get(id(p))].append((name, p))

    for index, name in enumerate(kept):
        if not params_of[index]:
            raise UnsupportedModel(
                f"layer {name} of {class_of(model).__name__} shares all its parameters with the embeddings or the "
                'head, so it cannot train on its own; untie it, or choose another stack with layers="FQN".'
            )
    if layers is None and len(kept) == 1:
        raise UnsupportedModel(one_block(model, stacks[0]))
    beside = {id(p) for side in sides_of(stacks, large) for p in modules[side].parameters()}
    return LayerMap(
        stacks=tuple(stacks),
        layers=tuple(Unit(name, index, tuple(params_of[index]), index) for index, name in enumerate(kept)),
        roles=tuple(Unit(role, None, tuple(params_of[role])) for role in (*ROLES, ADAPTERS) if params_of[role]),
        other=tuple(params_of[None]),
        aside=frozenset(name for name, p in params_of[None] if id(p) in beside),
    )


class _Widths(NamedTuple):
    """Width of the input embedding and of the residual stream; None where it is not known."""

    embedding: int | None
    layers: int | None

    def is_norm(self, *params: nn.Parameter) -> bool:
        """Whether there are parameters and all are vectors of one of the widths."""
        return bool(params) and all(len(shape_of(p)) == 1 and shape_of(p)[0] in self for p in params)

    def is_position(self, name: str, *params: nn.Parameter) -> bool:
        """Whether it is a table of position embeddings. By its name too: many a weight has such a shape."""
        named = any(word in _leaf(name) for word in ("pos", "emb", "wpe"))
        return named and all(len(shape_of(p)) >= 2 and shape_of(p)[-1] in self for p in params)

    def projection(self, linear: nn.Linear) -> Role | None:
        """Role of a projection between the two widths, if it is one."""
        # OPT-350m registers project_out before project_in, and both before the layers: only the shapes tell.
        shape = (linear.in_features, linear.out_features)
        if self.embedding == self.layers:
            return None
        return "embeddings" if shape == self else "lm_head" if shape == self[::-1] else None


def _roles(
    modules: dict[str, nn.Module], stack: str, blocks: dict[str, nn.Module], added: Collection[int]
) -> dict[int, Role]:
    """The roles of the parameters that have one, by their ids. A tied parameter has the first of its roles."""
    parts = stack.split(".") if stack else []
    trunk = {name: modules[name] for name in (".".join(parts[:n]) for n in range(len(parts) + 1))}
    order = {name: i for i, name in enumerate(modules)}
    children = [(join(above, name), m) for above in trunk if above != stack for name, m in children_of(trunk[above])]
    branches = dict(sorted(((n, m) for n, m in children if m not in trunk.values()), key=lambda item: order[item[0]]))
    # A branch with layers of its own (a vision tower, an encoder) has no role as a whole.
    inside = {name: () if has_blocks(m) else tuple(m.modules()) for name, m in branches.items()}
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
    own = [p for block in blocks.values() for p in block.parameters() if id(p) not in added]
    sizes = Counter(d for p in own for d in set(shape_of(p)) if d > 1)
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


def _leaf(name: str) -> str:
    return name.rpartition(".")[2].lower()
