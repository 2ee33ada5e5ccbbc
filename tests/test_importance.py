import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from grass_dist.config import EffectiveLayers
from grass_dist.errors import ConfigError
from grass_dist.method.importance import ImportanceTracker, effective_layers, mean_gradient_norm, sampling_probabilities

nan = math.nan
importance_arrays = arrays(np.float64, st.integers(1, 40), elements=st.floats(1e-9, 1e3))


def test_mean_gradient_norm_is_the_rms_of_the_gradient():
    # a gradient (3, 4) has norm 5 over 2 entries; (2, 2, 2, 2) has norm 4 over 4 entries
    got = mean_gradient_norm(np.array([[25.0, 16.0]]), np.array([2.0, 4.0]))
    assert got[0] == pytest.approx([5 / math.sqrt(2), 2.0], rel=1e-15)


def test_probabilities_by_hand():
    # m / mean = (0.5, 1, 1.5), over τ = 0.5: (1, 2, 3)
    e = [math.exp(1), math.exp(2), math.exp(3)]
    got = sampling_probabilities(np.array([1e-4, 2e-4, 3e-4]), temperature=0.5)
    assert got == pytest.approx([x / sum(e) for x in e], rel=1e-14)


def test_probabilities_without_scaling_are_exactly_the_formula():
    got = sampling_probabilities(np.array([1.0, 3.0]), temperature=2.0, scale="none")
    assert got[1] / got[0] == pytest.approx(math.exp(1.0), rel=1e-14)


def test_a_layer_not_yet_measured_counts_as_an_average_one():
    got = sampling_probabilities(np.array([1.0, nan, 3.0]), temperature=1.0)
    assert got == pytest.approx(sampling_probabilities(np.array([1.0, 2.0, 3.0]), temperature=1.0))
    assert sampling_probabilities(np.full(4, nan), temperature=0.1) == pytest.approx([0.25] * 4)


def test_importances_of_zero_give_equal_probabilities():
    assert sampling_probabilities(np.zeros(5), temperature=0.01) == pytest.approx([0.2] * 5)


def test_a_probability_that_underflows_is_an_error_with_a_fix():
    m = np.array([1.0, 1.0, 40.0])
    with pytest.raises(ConfigError, match=r"temperature=0.001: .*layer 0 underflows.*at least 0.00464") as caught:
        sampling_probabilities(m, temperature=0.001)
    proposed = float(caught.value.fix.split()[-1])
    assert (sampling_probabilities(m, temperature=proposed) > 0).all()


@given(importance_arrays, st.floats(0.05, 100))
def test_probabilities_are_a_distribution_ordered_by_importance(m, temperature):
    p = sampling_probabilities(m, temperature=max(temperature, len(m) / 500))
    assert p.sum() == pytest.approx(1.0, abs=1e-12) and (p > 0).all()
    order = np.argsort(m, kind="stable")
    assert (np.diff(p[order]) >= -1e-15).all()


@given(importance_arrays, st.floats(1e-6, 1e6))
def test_mean_scaling_frees_the_temperature_of_the_models_scale(m, factor):
    assert sampling_probabilities(m * factor, temperature=1.0) == pytest.approx(
        sampling_probabilities(m, temperature=1.0), rel=1e-6
    )


@given(importance_arrays, st.randoms(use_true_random=False))
def test_probabilities_follow_a_permutation_of_the_layers(m, random):
    order = list(range(len(m)))
    random.shuffle(order)
    assert sampling_probabilities(m[order], temperature=1.0) == pytest.approx(
        sampling_probabilities(m, temperature=1.0)[order], rel=1e-9
    )


def test_effective_layers_by_hand():
    assert effective_layers(np.full(30, 1 / 30)) == pytest.approx(30)
    assert effective_layers(np.array([1.0, 0.0, 0.0])) == 1
    # entropy of (1/2, 1/4, 1/4) is 1.5 bits
    assert effective_layers(np.array([0.5, 0.25, 0.25])) == pytest.approx(2**1.5)


@given(importance_arrays)
def test_effective_layers_are_between_one_and_all(m):
    at = [effective_layers(sampling_probabilities(m, temperature=t)) for t in (0.5, 1.0, 2.0)]
    assert 1 - 1e-9 <= at[0] <= at[1] * (1 + 1e-9) and at[1] <= at[2] * (1 + 1e-9) <= len(m) * (1 + 1e-8)


def test_a_probe_sets_all_importances_training_those_of_active():
    tracker = ImportanceTracker([1, 4], ema_alpha=0.25)
    tracker.observe(np.array([[4.0, 16.0], [16.0, 64.0]]), [(0, 1), (0, 1)])
    assert tracker.importances.tolist() == [3.0, 3.0]  # means of (2, 4) and (2, 4)
    tracker.observe(np.array([[49.0], [121.0]]), [(0,), (0,)])
    # measured (7 + 11) / 2 = 9: 0.25 * 9 + 0.75 * 3; layer 1 was frozen and keeps its own
    assert tracker.importances.tolist() == [4.5, 3.0]


def test_layers_that_changed_in_a_window_average_their_own_steps():
    tracker = ImportanceTracker([1, 1, 1], ema_alpha=1.0)
    tracker.observe(np.array([[1.0, 4.0], [9.0, 16.0], [25.0, 36.0]]), [(0, 1), (1, 2), (1, 2)])
    assert tracker.importances.tolist() == [1.0, (2 + 3 + 5) / 3, (4 + 6) / 2]


def test_steps_may_have_measured_different_numbers_of_layers():
    tracker = ImportanceTracker([1, 1, 1], ema_alpha=1.0)
    tracker.observe(np.array([[1.0, 4.0], [9.0, 0.0]]), [(0, 1), (2,)])
    assert tracker.importances.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, nan])
def test_a_step_that_is_not_finite_is_dropped_whole_and_counted(bad):
    tracker = ImportanceTracker([1, 1], ema_alpha=1.0)
    tracker.observe(np.array([[4.0, bad], [9.0, 25.0]]), [(0, 1), (0, 1)])
    assert tracker.importances.tolist() == [3.0, 5.0] and tracker.dropped == 1
    tracker.observe(np.array([[bad, 1.0]]), [(0, 1)])
    assert tracker.importances.tolist() == [3.0, 5.0] and tracker.dropped == 2


def test_a_probe_without_a_finite_step_leaves_p_uniform():
    tracker = ImportanceTracker([1, 1], ema_alpha=1.0)
    tracker.observe(np.array([[nan, 1.0]]), [(0, 1)])
    assert np.isnan(tracker.importances).all()
    assert sampling_probabilities(tracker.importances, temperature=1.0).tolist() == [0.5, 0.5]


@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3), st.floats(0.01, 1.0))
def test_the_moving_average_stays_between_old_and_new(old, new, alpha):
    tracker = ImportanceTracker([1], ema_alpha=alpha)
    tracker.observe(np.array([[old**2]]), [(0,)])
    tracker.observe(np.array([[new**2]]), [(0,)])
    got = tracker.importances[0]
    assert min(old, new) * (1 - 1e-9) <= got <= max(old, new) * (1 + 1e-9)


def test_replace_sets_all_importances_and_refuses_non_finite():
    tracker = ImportanceTracker([4, 1], ema_alpha=0.5)
    tracker.replace(np.array([16.0, 9.0]))
    assert tracker.importances.tolist() == [2.0, 3.0]
    tracker.replace(np.array([nan, 9.0]))
    assert tracker.importances.tolist() == [2.0, 3.0] and tracker.dropped == 1


def test_tracker_state_round_trip():
    tracker = ImportanceTracker([1, 1], ema_alpha=0.5)
    tracker.observe(np.array([[4.0], [nan]]), [(1,), (1,)])
    other = ImportanceTracker([1, 1], ema_alpha=0.5)
    other.load_state_dict(tracker.state_dict())
    assert np.array_equal(other.importances, tracker.importances, equal_nan=True) and other.dropped == 1


@given(arrays(np.float64, st.integers(2, 40), elements=st.floats(0.1, 10), unique=True), st.floats(0.05, 0.95))
def test_a_temperature_is_solved_for_from_the_layers(m, share):
    wanted = 1 + share * (len(m) - 1)
    p = sampling_probabilities(m, temperature=EffectiveLayers(effective_layers=wanted), scale="none")
    spread = np.sort(m)
    if spread[-1] - spread[-2] > 0.01 * (spread[-1] - spread[0]):  # a near tie at the top allows no sharper draw
        assert effective_layers(p) == pytest.approx(wanted, rel=1e-6)
    again = sampling_probabilities(1e-5 * m, temperature=EffectiveLayers(effective_layers=wanted), scale="none")
    assert again == pytest.approx(p, rel=1e-6), "it is free of the scale"
    assert sampling_probabilities(m, temperature=EffectiveLayers(effective_layers=wanted)) == pytest.approx(p, rel=1e-6)


def test_what_cannot_be_solved_for_is_the_nearest():
    two = EffectiveLayers(effective_layers=2)
    assert sampling_probabilities(np.ones(5), temperature=two) == pytest.approx([0.2] * 5)
    tie = sampling_probabilities(np.array([1.0, 1.0, 1.0, 0.0]), temperature=two)
    assert tie[:3] == pytest.approx([1 / 3] * 3) and tie[3] > 0
    assert sampling_probabilities(np.full(4, nan), temperature=two) == pytest.approx([0.25] * 4)
    every = sampling_probabilities(np.array([1.0, 2.0, 9.0]), temperature=EffectiveLayers(effective_layers=3))
    assert every == pytest.approx([1 / 3] * 3, rel=1e-6)
    one = sampling_probabilities(np.array([1.0, 2.0, 9.0]), temperature=EffectiveLayers(effective_layers=1))
    assert one[2] == pytest.approx(1) and (one > 0).all()


def test_exploration_mixes_in_a_uniform_draw():
    m = np.array([1e-4, 2e-4, 3e-4])
    alone = sampling_probabilities(m, temperature=0.5)
    mixed = sampling_probabilities(m, temperature=0.5, exploration=0.3)
    assert mixed == pytest.approx(0.7 * alone + 0.1, rel=1e-14)
    sharp = sampling_probabilities(np.array([1.0, 1.0, 40.0]), temperature=1e-3, exploration=0.06)
    assert sharp == pytest.approx([0.02, 0.02, 0.96]), "no probability underflows"
