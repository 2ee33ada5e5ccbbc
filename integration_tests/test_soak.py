"""The soak in short: a training on each backend, in settings drawn at random, of which `make soak` takes many."""

from __future__ import annotations

from integration_tests.soak_offload import BACKENDS, drawn, main


def test_states_that_move_are_those_that_stay():
    assert main(["--trainings", str(len(BACKENDS)), "--minutes", "4"]) == 0


def test_the_settings_drawn_reach_what_there_is():
    cases = [drawn(0, number) for number in range(100)]
    assert {case["backend"] for case in cases} == set(BACKENDS)
    for name in ("mode", "prefetch_steps", "slots", "update_in_backward"):
        assert len({case["offload"][name] for case in cases}) >= 2
    streams = [case for case in cases if case["offload"]["mode"] == "stream"]
    assert any(case["offload"]["slots"] < case["settings"]["active_layers"] for case in streams)
    assert drawn(0, 7) == drawn(0, 7) != drawn(1, 7)
