"""What trains at every step: the roles, modules and parameters that `GrassConfig.always_active` names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import nn

from grass_dist.config import ADAPTERS, ROLES, GrassConfig
from grass_dist.errors import ConfigError
from grass_dist.model.discovery import LayerMap, NamedParameter, Unit
from grass_dist.model.names import matches, near
from grass_dist.model.stacks import bare_name, numel_of, outermost, shape_of

_MOMENTS, _MASTER = 8, 4
"""Bytes of state that AdamW keeps for an element, and of the fp32 master of a 16-bit weight."""


def always_active_roles(
    model: nn.Module, found: LayerMap, config: GrassConfig, trained: Collection[int] | None = None
) -> tuple[Unit, ...]:
    """What trains at every step, by role: of each role those parameters that are to train and can.

    Tied embeddings are one parameter, in the role embeddings: they train if either of their two roles is to.

    Args:
        trained: ids of the parameters that the user trains. None: those with ``requires_grad``.

    Raises:
        ConfigError: a name matches nothing outside the layers, or nothing that the user trains; or the parameters
            without a role are too large to train at every step unasked.
    """
    if trained is None:
        trained = {id(p) for p in model.parameters() if p.requires_grad}
    wanted, named = set(config.always_active), _named(model, found, config, trained)
    if config.adapters is not None:
        wanted.add(ADAPTERS)
    if "lm_head" in wanted and "lm_head" not in {unit.name for unit in found.roles}:
        wanted.add("embeddings")
    others = set(map(id, found.others))

    def is_to_train(role: str, p: nn.Parameter) -> bool:
        by_role = role in wanted and (role != "others" or id(p) in others)
        return id(p) in trained and (by_role or id(p) in named)

    every = [*found.roles, Unit("others", None, found.other)]
    units = [Unit(u.name, None, tuple((n, p) for n, p in u.params if is_to_train(str(u.name), p))) for u in every]
    _check_size(
        model, [(n, p) for n, p in units[-1].params if id(p) not in named], found, config.active_layers, trained
    )
    return tuple(unit for unit in units if unit.params)


def _named(model: nn.Module, found: LayerMap, config: GrassConfig, trained: Collection[int]) -> set[int]:
    """Ids of the parameters that ``always_active`` names by FQN or pattern."""
    if not (patterns := [name for name in config.always_active if name not in (*ROLES, ADAPTERS)]):
        return set()
    names = [(bare_name(name), id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    inside = {id(p): unit.name for unit in found.layers for _, p in unit.params}
    named: set[int] = set()
    for pattern in patterns:
        hit = [at for name, at in names if matches(bare_name(pattern), name)]
        if not hit:
            raise ConfigError(
                "always_active",
                pattern,
                "no role, module or parameter of the model has that name",
                near(pattern, [name for name, _ in names], ROLES),
            )
        if layers := list(dict.fromkeys(inside[at] for at in hit if at in inside)):
            raise ConfigError(
                "always_active",
                pattern,
                f"it matches parameters of the layer {layers[0]}, and layers train when they are drawn",
                "name what is outside of the layers, or raise active_layers",
            )
        if not any(at in trained for at in hit):
            raise ConfigError(
                "always_active",
                pattern,
                "nothing that it names has requires_grad and is in the optimizer",
                "leave requires_grad on and pass it in params=, or leave the name out",
            )
        named.update(hit)
    return named


def _check_size(
    model: nn.Module, others: Sequence[NamedParameter], found: LayerMap, active: int, trained: Collection[int]
) -> None:
    """
    Args:
        active: layers that train at a time.

    Raises:
        ConfigError: they have more elements than so many of the largest layers, and their states would stay on the
            device.
    """
    numel = sum(numel_of(p) for _, p in others)
    sizes = [sum(numel_of(p) for _, p in unit.params if id(p) in trained) for unit in found.layers]
    if numel <= (limit := sum(sorted(sizes)[-active:])):
        return
    held = sum(numel_of(p) * _bytes_of(p) for _, p in others)
    by_size = sorted(others, key=lambda named: -numel_of(named[1]))
    shown = ", ".join(f"{name} {'x'.join(map(str, shape_of(p)))}" for name, p in by_size[:6])
    more = f" and {len(others) - 6} more" if len(others) > 6 else ""
    raise ConfigError(
        "always_active",
        "others",
        f"{len(others)} parameters that train are in no layer and have no role, {numel:,} elements ({shown}{more}); "
        f"their states stay on the device ({_size(held)} with AdamW), and at most as many elements as the "
        f"{min(active, len(sizes))} largest layers have ({limit:,}) do so unasked",
        "freeze them or leave them out of params=, or name them in always_active (FQNs or patterns, e.g. "
        f"{' and '.join(map(repr, _enough(model, others, numel - limit)))})",
    )


def _enough(model: nn.Module, params: Sequence[NamedParameter], numel: int) -> list[str]:
    """The largest of the modules around parameters that have together as many elements as are asked for."""
    places, sizes = outermost(model, {id(p) for _, p in params}), Counter[str]()
    for name, p in params:
        sizes[places[name]] += numel_of(p)
    total, names = 0, []
    for name, size in sizes.most_common():
        if total < numel:
            names.append(bare_name(name))
        total += size
    return names


def _bytes_of(p: nn.Parameter) -> int:
    return _MOMENTS + (_MASTER if p.dtype in (torch.float16, torch.bfloat16) else 0)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.3g} MB" if nbytes < 1e9 else f"{nbytes / 1e9:.3g} GB"
