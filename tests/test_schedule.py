import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grass_dist.method.schedule import Schedule, too_short_for


@st.composite
def clocks(draw):
    probe, update, sampling = (draw(st.integers(least, 20)) for least in (0, 1, 1))
    return Schedule(probe, update, sampling, draw(st.integers(0, min(update, sampling) - 1)))


# For each lead, steps done when a refresh falls due, when a round is drawn, when it begins to train.
BY_HAND = {
    0: (Schedule(3, 4, 2, 0), [7, 11], {3: 0, 5: 1, 7: 2, 9: 3, 11: 4, 13: 5}, {3: 0, 5: 1, 7: 2, 9: 3, 11: 4, 13: 5}),
    1: (Schedule(3, 4, 3, 1), [6, 10], {3: 0, 5: 1, 8: 2, 11: 3}, {3: 0, 6: 1, 9: 2, 12: 3}),
    2: (Schedule(1, 3, 4, 2), [2, 5, 8, 11], {1: 0, 3: 1, 7: 2, 11: 3}, {1: 0, 5: 1, 9: 2, 13: 3}),
}


@pytest.mark.parametrize("lead", BY_HAND)
def test_a_run_by_hand(lead):
    clock, refreshed, drawn, switched = BY_HAND[lead]
    assert clock.lead == lead
    assert [s for s in range(14) if clock.probe_ends(s)] == [clock.probe_steps]
    assert [s for s in range(14) if clock.refresh_due(s)] == refreshed
    assert {s: clock.round_drawn(s) for s in range(14) if clock.draw_due(s)} == drawn
    assert {s: clock.round(s) for s in range(14) if clock.switch_due(s)} == switched


def test_between_a_draw_and_its_switch():
    clock = Schedule(probe_steps=3, update_interval=4, sampling_interval=3, lead=1)
    assert [clock.phase(s) for s in range(5)] == ["probe", "probe", "probe", "train", "train"]
    assert [clock.round(s) for s in range(1, 10)] == [-1, -1, 0, 0, 0, 1, 1, 1, 2]
    assert [clock.round_drawn(s) for s in range(1, 10)] == [-1, -1, 0, 0, 1, 1, 1, 2, 2]
    assert [clock.steps_to_switch(s) for s in range(3, 10)] == [3, 2, 1, 3, 2, 1, 3]


def test_without_a_probe_the_first_step_trains():
    clock = Schedule(probe_steps=0, update_interval=5, sampling_interval=5, lead=2)
    assert clock.phase(0) == "train" and clock.draw_due(0) and clock.switch_due(0) and clock.round_drawn(0) == 0
    assert not clock.probe_ends(0) and not clock.refresh_due(0)


@given(clocks())
def test_each_round_is_drawn_once_lead_steps_before_it_trains(clock):
    steps = range(clock.probe_steps + 6 * clock.sampling_interval)
    drawn = [(s, clock.round_drawn(s)) for s in steps if clock.draw_due(s)]
    switched = [s for s in steps if clock.switch_due(s)]
    assert [number for _, number in drawn] == list(range(7 if clock.lead else 6))  # the last one waits for its switch
    assert switched == [clock.probe_steps + k * clock.sampling_interval for k in range(6)]
    assert drawn[0] == (switched[0], 0)
    for (at, _), switch in zip(drawn[1:], switched[1:], strict=False):
        assert at == switch - clock.lead
        assert clock.lead == 0 or clock.steps_to_switch(at) == clock.lead


@given(clocks(), st.integers(0, 200))
def test_rounds_change_exactly_at_switches_and_draws(clock, step):
    for number, due in ((clock.round, clock.switch_due), (clock.round_drawn, clock.draw_due)):
        assert due(step) == (number(step) != (number(step - 1) if step else -1))


@given(clocks())
def test_refreshes_are_update_interval_apart_the_first_lead_less(clock):
    refreshed = [s for s in range(clock.probe_steps + 6 * clock.update_interval) if clock.refresh_due(s)]
    assert refreshed[0] == clock.probe_steps + clock.update_interval - clock.lead
    assert len(refreshed) >= 5
    assert all(b - a == clock.update_interval for a, b in itertools.pairwise(refreshed))


def test_layers_that_a_run_did_not_reach_are_told():
    assert too_short_for((), 8, "grass") is None and too_short_for((1, 2), 8, "fixed") is None
    assert too_short_for((3, 7), 8, "grass") == (
        "2 of 8 layers never trained (3, 7): no draw of this run chose them. More steps, a smaller "
        "grass.sampling_interval or more grass.active_layers give every layer a turn."
    )
    assert "(0, 1, 2, " in (told := too_short_for(range(80), 80, "grass") or "") and " 39 and others)" in told
