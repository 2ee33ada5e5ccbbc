"""Samplers: which γ layers train next. Pure functions of (importances, counter-based generator), in a registry."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from grass_dist.config import GrassConfig, parameter_budget
from grass_dist.errors import ConfigError, GrassError
from grass_dist.method.importance import FloatArray, sampling_probabilities


class RoundGenerator(np.random.Generator):
    """A counter-based (Philox) numpy generator for one draw.

    Its numbers depend on (seed, round) alone: any rank, in any process, at any time gets the same ones, and no
    other random number generator moves them.

    Attributes:
        seed: the run's `GrassConfig.seed`.
        round: number of the draw, from 0.
    """

    def __init__(self, seed: int, round: int) -> None:
        super().__init__(np.random.Philox(key=np.array([seed, round], dtype=np.uint64)))
        self.seed, self.round = seed, round


DEFAULT_PROBE_STEPS = 8

DrawFunction = Callable[[FloatArray, RoundGenerator], Sequence[int]]
"""(importances of shape (L,), generator) → γ different layer indices."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """A draw, and what it needs to know of the layers."""

    draw: DrawFunction
    probabilities: Callable[[FloatArray], FloatArray]
    """importances (L,) → the probability, or for a cycle the share of the time, with which each layer is drawn
    first (L,)."""
    importance: Literal["gradient", "weight", "none"] = "gradient"
    """What the importances are: mean gradient norms, RMS weights, or nothing (then nothing is measured)."""
    refreshed: bool = True
    """Whether importances are measured again in training, or once in the probe."""


SamplerFactory = Callable[[GrassConfig, int], Sampler]
_REGISTRY: dict[str, SamplerFactory] = {}


def register_sampler(
    name: str, draw: DrawFunction, *, importance: Literal["gradient", "weight", "none"] = "gradient"
) -> None:
    """Adds a sampler of one's own under ``name``, for ``GrassConfig(sampler=name)``.

    Args:
        name: a name that is not taken.
        draw: function of (importances, generator) → the indices of `active_layers` different layers. It must use
            no other source of randomness than the generator, or the ranks will not agree.
        importance: "gradient" (measured in a probe and in training), "weight" or "none".

    Raises:
        ConfigError: the name is taken.
    """
    if name in _REGISTRY:
        raise ConfigError("sampler", name, "a sampler of this name is registered already", "choose another name")

    def factory(config: GrassConfig, num_layers: int) -> Sampler:
        return Sampler(draw, _softmax(config) if importance != "none" else _even(num_layers), importance)

    _REGISTRY[name] = factory


def make_sampler(config: GrassConfig, num_layers: int) -> Sampler:
    """The sampler that ``config`` names, for a model of ``num_layers`` layers.

    Raises:
        ConfigError: no sampler of that name.
    """
    if config.sampler not in _REGISTRY:
        raise ConfigError(
            "sampler",
            config.sampler,
            "there is no such sampler",
            f"use one of {', '.join(sorted(_REGISTRY))}, or add it with register_sampler first",
        )
    return _REGISTRY[config.sampler](config, num_layers)


def probe_steps(config: GrassConfig, sampler: Sampler) -> int:
    """T_p: as configured, else `DEFAULT_PROBE_STEPS` for a sampler that uses gradient norms and 0 for the others."""
    if config.probe_steps is not None:
        return config.probe_steps
    return DEFAULT_PROBE_STEPS if sampler.importance == "gradient" else 0


def draw_layers(
    sampler: Sampler, importances: FloatArray, config: GrassConfig, round: int, sizes: Sequence[int] = ()
) -> tuple[int, ...]:
    """The layers of draw number ``round``, sorted: γ, or fewer if `active_parameters` leaves no room for more.

    Args:
        sizes: parameters of each layer; needed with `active_parameters` only.

    Raises:
        GrassError: the sampler (a user's) gave something else than γ different indices of layers.
    """
    drawn = list(sampler.draw(importances.copy(), RoundGenerator(config.seed, round)))
    try:
        chosen = sorted({operator.index(i) for i in drawn})
    except TypeError:
        chosen = []
    budget = parameter_budget(config, sizes)
    counts = {config.active_layers, len(importances)} if budget is not None else {config.active_layers}
    if not (len(drawn) == len(chosen) and len(drawn) in counts and 0 <= chosen[0] <= chosen[-1] < len(importances)):
        raise GrassError(
            f"sampler {config.sampler!r} returned {drawn!r} in round {round}; it must return active_layers="
            f"{config.active_layers} different integers from 0 to {len(importances) - 1}."
        )
    return tuple(chosen if budget is None else sorted(_within(drawn, sizes, budget, config.active_layers)))


def _within(order: Sequence[int], sizes: Sequence[int], budget: int, count: int) -> list[int]:
    """Takes layers in their order while they fit, at most ``count``; one that does not fit is left out."""
    taken: list[int] = []
    for layer in order:
        if len(taken) < count and sizes[layer] <= budget:
            taken.append(layer)
            budget -= sizes[layer]
    return taken


def weighted_without_replacement(p: FloatArray, count: int, generator: np.random.Generator) -> list[int]:
    """``count`` different indices, drawn one after the other with probabilities ∝ p among those left.

    It is an exponential race (Efraimidis and Spirakis 2006): index i arrives at time ``-log(u_i) / p_i`` and the
    first ``count`` arrivals win, which has that distribution and takes exactly one number u_i an index.
    """
    u = generator.random(len(p))
    arrival = -np.log1p(-u) / p  # 1 - u is in (0, 1], so that no arrival is infinite
    return np.argsort(arrival, kind="stable")[:count].tolist()


def _softmax(config: GrassConfig) -> Callable[[FloatArray], FloatArray]:
    return lambda m: sampling_probabilities(
        m, temperature=config.temperature, scale=config.importance_scale, exploration=config.exploration
    )


def _wanted(config: GrassConfig, num_layers: int) -> int:
    """How many layers to draw: all of them in their order where a budget chooses among them."""
    return config.active_layers if config.active_parameters is None else num_layers


def _even(num_layers: int) -> Callable[[FloatArray], FloatArray]:
    return lambda _: np.full(num_layers, 1.0 / num_layers)


def _by_importance(importance: Literal["gradient", "weight"], refreshed: bool) -> SamplerFactory:
    def factory(config: GrassConfig, num_layers: int) -> Sampler:
        probabilities = _softmax(config)

        def draw(importances: FloatArray, generator: RoundGenerator) -> list[int]:
            return weighted_without_replacement(probabilities(importances), _wanted(config, num_layers), generator)

        return Sampler(draw, probabilities, importance, refreshed)

    return factory


def _uniform(config: GrassConfig, num_layers: int) -> Sampler:
    """LISA (Pan et al. 2024): every layer is as likely as any other."""
    p = np.full(num_layers, 1.0 / num_layers)
    count = _wanted(config, num_layers)
    return Sampler(lambda _, generator: weighted_without_replacement(p, count, generator), lambda _: p, "none")


def _cycle(shuffled: bool) -> SamplerFactory:
    """BAdam (Luo et al. 2024): blocks of γ layers, one after the other, until every layer had its turn.

    Where γ does not divide L the last block of a cycle is filled up from the start of that cycle's order.
    """

    def factory(config: GrassConfig, num_layers: int) -> Sampler:
        blocks = -(-num_layers // config.active_layers)

        def draw(_: FloatArray, generator: RoundGenerator) -> list[int]:
            cycle, block = divmod(generator.round, blocks)
            order = np.arange(num_layers)
            if shuffled:  # one order a cycle: seeded by the cycle, not by the round
                order = np.argsort(RoundGenerator(config.seed, cycle).random(num_layers), kind="stable")
            start = block * config.active_layers
            return [int(order[i % num_layers]) for i in range(start, start + config.active_layers)]

        return Sampler(draw, _even(num_layers), "none")

    return factory


def _without_replacement(config: GrassConfig, num_layers: int) -> Sampler:
    """Every layer once before any comes again, in an order of its own each time (OMGD).

    Where γ does not divide L, the draw that ends a pass is filled up by the first layers of the next pass that it does
    not have yet; these then come no more in that pass. Passes whose first draw is whole begin from scratch, so that a
    draw needs at most γ orders.
    """
    count = config.active_layers
    together = num_layers * count // math.gcd(num_layers, count)  # entries after which a pass begins with a draw

    def draw(_: FloatArray, generator: RoundGenerator) -> list[int]:
        start = generator.round * count
        first, chosen = start // together * (together // num_layers), list[int]()
        for number in range(first, (start + count - 1) // num_layers + 1):
            own = np.argsort(RoundGenerator(config.seed, number).random(num_layers), kind="stable").tolist()
            tail = chosen[len(chosen) // count * count :]  # of a draw that is not whole yet
            fill = [layer for layer in own if layer not in tail][: -len(tail) % count]
            chosen += fill + [layer for layer in own if layer not in fill]
        at = start - first * num_layers
        return chosen[at : at + count]

    return Sampler(draw, _even(num_layers), "none")


def _middle(config: GrassConfig, num_layers: int) -> Sampler:
    """The γ layers in the middle of the stack, always; of two middles the lower one."""
    start = (num_layers - config.active_layers) // 2
    return _always(range(start, start + config.active_layers), num_layers)


def _fixed(config: GrassConfig, num_layers: int) -> Sampler:
    return _always(config.fixed_layers, num_layers)


def _always(layers: Sequence[int], num_layers: int) -> Sampler:
    p = np.zeros(num_layers)
    p[list(layers)] = 1.0 / len(layers)
    return Sampler(lambda *_: layers, lambda _: p, "none")


_REGISTRY.update(
    {
        "grass": _by_importance("gradient", refreshed=True),
        "grass-static": _by_importance("gradient", refreshed=False),
        "weight-norm": _by_importance("weight", refreshed=True),
        "uniform": _uniform,
        "cyclic": _cycle(shuffled=False),
        "random-cyclic": _cycle(shuffled=True),
        "without-replacement": _without_replacement,
        "middle": _middle,
        "fixed": _fixed,
    }
)
