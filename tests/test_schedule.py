from hypothesis import given
from hypothesis import strategies as st

from grass_dist.schedule import Schedule

schedules = st.builds(Schedule, st.integers(0, 20), st.integers(1, 20), st.integers(1, 20))


def test_a_run_by_hand():
    clock = Schedule(probe_steps=3, update_interval=4, sampling_interval=2)
    assert [clock.phase(s) for s in range(5)] == ["probe", "probe", "probe", "train", "train"]
    assert [s for s in range(14) if clock.probe_ends(s)] == [3]
    assert [s for s in range(14) if clock.draw_due(s)] == [3, 5, 7, 9, 11, 13]
    assert [s for s in range(14) if clock.refresh_due(s)] == [7, 11]
    assert [clock.round(s) for s in range(8)] == [-1, -1, -1, 0, 0, 1, 1, 2]


def test_without_a_probe_the_first_step_trains():
    clock = Schedule(probe_steps=0, update_interval=5, sampling_interval=5)
    assert clock.phase(0) == "train" and clock.draw_due(0)
    assert not clock.probe_ends(0) and not clock.refresh_due(0)


@given(schedules, st.integers(0, 200))
def test_rounds_change_exactly_where_layers_are_drawn(clock, step):
    assert clock.draw_due(step) == (clock.round(step) != (clock.round(step - 1) if step else -1))


@given(schedules, st.integers(0, 200))
def test_every_window_between_refreshes_has_update_interval_steps(clock, step):
    if clock.refresh_due(step):
        window = range(step - clock.update_interval + 1, step)
        assert not any(clock.refresh_due(s) for s in window)
        assert all(clock.phase(s) == "train" for s in range(step - clock.update_interval, step))
