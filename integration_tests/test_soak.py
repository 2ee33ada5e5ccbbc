"""The soak in short: a training on each backend, in settings drawn at random, of which `make soak` takes many."""

from __future__ import annotations

import pytest

from integration_tests.soak_offload import BACKENDS, drawn, main

FIRST = 2300
"""Of numbers whose settings differ in all that is asked for below."""


@pytest.mark.long
def test_states_that_move_are_those_that_stay():
    assert main(["--first", str(FIRST), "--trainings", str(len(BACKENDS)), "--minutes", "4"]) == 0


def test_what_is_drawn_reaches_what_there_is():
    cases = [drawn(0, FIRST + i) for i in range(len(BACKENDS))]
    assert [case["backend"] for case in cases] == list(BACKENDS)
    assert {case["offload"]["mode"] for case in cases} == {"interval", "stream"}
    assert any(case["offload"]["update_in_backward"] for case in cases)
    assert sum(case["offload"]["chaos"] is not None for case in cases) >= 3
    assert any(case["dtype"].itemsize == 2 for case in cases) and any(case["uneven"] for case in cases)
    streams = [case for case in cases if case["offload"]["mode"] == "stream"]
    assert sum(case["offload"]["slots"] < case["settings"]["active_layers"] for case in streams) >= 2
    known = [case["settings"]["draw_ahead"] for case in cases if case["offload"]["prefetch_steps"]]
    assert any(known) and any(case["settings"]["draw_ahead"] == 0 for case in cases)
