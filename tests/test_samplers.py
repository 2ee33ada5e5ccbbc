import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from grass_dist.config import GrassConfig
from grass_dist.errors import ConfigError, GrassError
from grass_dist.method import samplers
from grass_dist.method.importance import sampling_probabilities
from grass_dist.method.samplers import RoundGenerator, draw_layers, make_sampler, register_sampler

IMPORTANCES = np.array([2.0, 1.0, 0.5, 1.5, 1.0])
PINNED = [0.4821286018761155, 0.7241355726248441]


def draws(config, count, importances=IMPORTANCES):
    sampler = make_sampler(config, len(importances))
    return [draw_layers(sampler, importances, config, r) for r in range(count)]


def test_single_draws_have_the_softmax_frequencies():
    config = GrassConfig(active_layers=1, temperature=0.7, seed=3)
    p = sampling_probabilities(IMPORTANCES, temperature=0.7)
    counts = Counter(layer for (layer,) in draws(config, 20_000))
    assert stats.chisquare([counts[i] for i in range(5)], p * 20_000).pvalue > 1e-3


def test_pairs_have_the_frequencies_of_successive_draws():
    config = GrassConfig(active_layers=2, temperature=0.7, seed=11)
    p = sampling_probabilities(IMPORTANCES, temperature=0.7)
    expected = {
        (i, j): p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j]) for i, j in itertools.combinations(range(5), 2)
    }
    assert sum(expected.values()) == pytest.approx(1.0)
    counts = Counter(draws(config, 20_000))
    assert set(counts) <= set(expected)
    assert stats.chisquare([counts[k] for k in expected], [v * 20_000 for v in expected.values()]).pvalue > 1e-3


def test_inclusion_frequencies_are_those_of_numpys_choice():
    config = GrassConfig(active_layers=3, seed=5)
    p = sampling_probabilities(IMPORTANCES, temperature=1.0)
    reference = np.random.default_rng(0)
    theirs = Counter(i for _ in range(8000) for i in reference.choice(5, 3, replace=False, p=p))
    ours = Counter(itertools.chain.from_iterable(draws(config, 8000)))
    table = [[ours[i] for i in range(5)], [theirs[i] for i in range(5)]]
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_uniform_is_uniform_whatever_the_importances():
    config = GrassConfig(active_layers=1, sampler="uniform", seed=1)
    counts = Counter(layer for (layer,) in draws(config, 10_000))
    assert stats.chisquare([counts[i] for i in range(5)]).pvalue > 1e-3


def test_a_draw_depends_on_seed_and_round_alone():
    config = GrassConfig(active_layers=2, seed=9)
    before = draws(config, 20)
    torch.manual_seed(123), random.seed(4), np.random.seed(5)
    torch.rand(7), random.random(), np.random.rand(3)
    assert draws(config, 20) == before
    assert (
        list(reversed([draw_layers(make_sampler(config, 5), IMPORTANCES, config, r) for r in range(19, -1, -1)]))
        == before
    )
    assert draws(GrassConfig(active_layers=2, seed=10), 20) != before


def test_the_generator_gives_the_same_numbers_on_any_machine():
    # Philox 4x64, key (7, 3), counter 0: pinned, so that a numpy that changes the stream is noticed
    assert RoundGenerator(7, 3).random(2).tolist() == PINNED


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 500), st.sampled_from(sorted(samplers._REGISTRY)))
def test_every_sampler_draws_active_layers_different_layers(num_layers, count, round, name):
    count = min(count, num_layers)
    fixed = tuple(range(count)) if name == "fixed" else ()
    config = GrassConfig(active_layers=count, sampler=name, fixed_layers=fixed)
    sampler = make_sampler(config, num_layers)
    chosen = draw_layers(sampler, np.linspace(0.5, 2, num_layers), config, round)
    assert len(set(chosen)) == count and list(chosen) == sorted(chosen)
    assert set(chosen) <= set(range(num_layers))
    assert sampler.probabilities(np.linspace(0.5, 2, num_layers)).sum() == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["cyclic", "random-cyclic"])
@pytest.mark.parametrize(("num_layers", "count"), [(6, 2), (6, 6), (5, 1), (7, 3)])
def test_a_cycle_trains_every_layer(name, num_layers, count):
    config = GrassConfig(active_layers=count, sampler=name, seed=2)
    sampler = make_sampler(config, num_layers)
    blocks = math.ceil(num_layers / count)
    for cycle in range(5):
        seen = Counter()
        for block in range(blocks):
            seen.update(draw_layers(sampler, np.ones(num_layers), config, cycle * blocks + block))
        assert set(seen) == set(range(num_layers))
        assert sum(seen.values()) == blocks * count and max(seen.values()) <= 2


def test_cyclic_goes_in_order_and_random_cyclic_reshuffles():
    config = GrassConfig(active_layers=2, sampler="cyclic")
    assert draws(config, 4, np.ones(6)) == [(0, 1), (2, 3), (4, 5), (0, 1)]
    orders = {
        tuple(draws(GrassConfig(active_layers=1, sampler="random-cyclic"), 60, np.ones(6))[i : i + 6])
        for i in range(0, 60, 6)
    }
    assert len(orders) > 5


def test_fixed_trains_the_given_layers():
    config = GrassConfig(active_layers=2, sampler="fixed", fixed_layers=(4, 1))
    assert draws(config, 3) == [(1, 4)] * 3


def test_important_layers_are_drawn_more_temperature_flattens():
    hot = Counter(itertools.chain.from_iterable(draws(GrassConfig(active_layers=1, temperature=100.0), 3000)))
    cold = Counter(itertools.chain.from_iterable(draws(GrassConfig(active_layers=1, temperature=0.2), 3000)))
    assert cold[0] > 0.7 * 3000 > 0.25 * 3000 > hot[0] > 0.15 * 3000


def test_a_sampler_of_ones_own():
    name = "test-greedy"
    register_sampler(name, lambda importances, generator: np.argsort(-importances)[:2])
    try:
        assert draws(GrassConfig(active_layers=2, sampler=name), 2) == [(0, 3), (0, 3)]
        with pytest.raises(ConfigError, match="registered already"):
            register_sampler(name, lambda importances, generator: [0, 1])
    finally:
        samplers._REGISTRY.pop(name)


@pytest.mark.parametrize("result", [[0], [0, 0], [0, 5], [-1, 2], [0.5, 1], [], [0, 1, 2]])
def test_a_sampler_that_returns_nonsense_is_named(result):
    register_sampler("test-bad", lambda importances, generator: result)
    try:
        with pytest.raises(
            GrassError, match=r"sampler 'test-bad' returned .* in round 0; it must return active_layers=2"
        ):
            draws(GrassConfig(active_layers=2, sampler="test-bad"), 1)
    finally:
        samplers._REGISTRY.pop("test-bad")


def test_an_unknown_sampler_is_named_with_the_known_ones():
    with pytest.raises(ConfigError, match="sampler='gras': there is no such sampler; use one of cyclic, fixed, grass"):
        make_sampler(GrassConfig(sampler="gras"), 8)


def test_a_user_sampler_cannot_change_the_importances():
    def spoil(importances, generator):
        importances[:] = 0
        return [0]

    register_sampler("test-spoil", spoil)
    try:
        importances = IMPORTANCES.copy()
        draws(GrassConfig(active_layers=1, sampler="test-spoil"), 1, importances)
        assert np.array_equal(importances, IMPORTANCES)
    finally:
        samplers._REGISTRY.pop("test-spoil")


@given(
    sizes=st.lists(st.integers(1, 50), min_size=2, max_size=8),
    room=st.integers(0, 100),
    round=st.integers(0, 20),
    name=st.sampled_from(["grass", "uniform", "weight-norm"]),
)
def test_a_budget_takes_what_fits_in_the_order_of_the_draw(sizes, room, round, name):
    layers, budget = len(sizes), max(sizes) + room
    limited = GrassConfig(active_layers=layers, active_parameters=budget, sampler=name)
    importances = np.linspace(1.0, 2.0, layers)
    chosen = draw_layers(make_sampler(limited, layers), importances, limited, round, sizes)
    assert chosen and sum(sizes[i] for i in chosen) <= budget
    # all in their order, and the first that does not fit is followed by smaller ones that do
    first = GrassConfig(active_layers=1, sampler=name)
    assert draw_layers(make_sampler(first, layers), importances, first, round)[0] in chosen
    left = budget - sum(sizes[i] for i in chosen)
    assert all(sizes[i] > left for i in range(layers) if i not in chosen)


def test_a_budget_and_active_layers_hold_both():
    sizes, ones = [10, 10, 10, 100], np.ones(4)
    for round in range(50):
        config = GrassConfig(active_layers=2, active_parameters=100)
        drawn = draw_layers(make_sampler(config, 4), ones, config, round, sizes)
        assert len(drawn) == 2 if 3 not in drawn else drawn == (3,)
        share = GrassConfig(active_layers=2, active_parameters=0.7692308)  # just 100 of 130
        assert draw_layers(make_sampler(share, 4), ones, share, round, sizes) == drawn


def test_a_budget_that_the_largest_layer_exceeds_is_refused():
    config = GrassConfig(active_parameters=0.5)
    with pytest.raises(ConfigError, match="active_parameters=0.5.*100 parameters.*use 100 or more .76.93%"):
        draw_layers(make_sampler(config, 4), np.ones(4), config, 0, [10, 10, 10, 100])


@pytest.mark.parametrize("value", [0, -1, 1.0, 0.0, 1e9, math.nan, True])
def test_a_budget_is_a_number_or_a_share(value):
    with pytest.raises(ConfigError, match="active_parameters"):
        GrassConfig(active_parameters=value)


@pytest.mark.parametrize("name", ["cyclic", "random-cyclic", "fixed"])
def test_blocks_of_layers_take_no_budget(name):
    fixed = (0, 1, 2, 3) if name == "fixed" else ()
    with pytest.raises(ConfigError, match=f"active_parameters=9.*sampler='{name}'"):
        GrassConfig(active_parameters=9, sampler=name, fixed_layers=fixed)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 40))
def test_without_replacement_takes_each_layer_once_a_pass(num_layers, count, passes):
    count = min(count, num_layers)
    config = GrassConfig(active_layers=count, sampler="without-replacement", seed=4)
    sampler = make_sampler(config, num_layers)
    blocks = [list(sampler.draw(np.ones(num_layers), RoundGenerator(4, r))) for r in range(passes + 3)]
    assert all(len(set(block)) == count for block in blocks)
    taken = [layer for block in blocks for layer in block]
    for start in range(0, len(taken) - num_layers + 1, num_layers):
        assert sorted(taken[start : start + num_layers]) == list(range(num_layers))


def test_without_replacement_reshuffles_each_pass():
    config = GrassConfig(active_layers=2, sampler="without-replacement", seed=1)
    passes = {tuple(draws(config, 60, np.ones(6))[i : i + 3]) for i in range(0, 60, 3)}
    assert len(passes) > 10
    assert draws(config, 60, np.ones(6)) != draws(config.model_copy(update={"seed": 2}), 60, np.ones(6))


@pytest.mark.parametrize(("count", "layers"), [(1, (2,)), (2, (1, 2)), (3, (1, 2, 3)), (5, (0, 1, 2, 3, 4))])
def test_the_middle_is_the_middle(count, layers):
    config = GrassConfig(active_layers=count, sampler="middle")
    assert draws(config, 2) == [layers] * 2
    assert make_sampler(config, 5).probabilities(IMPORTANCES).tolist() == [i in layers and 1 / count for i in range(5)]
    assert make_sampler(config, 5).importance == "none"
