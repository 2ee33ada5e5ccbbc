"""NaN on one rank: no rank updates, the run goes on, and ends when it happens too often."""

import pytest

from integration_tests.bad_steps import spoiled
from integration_tests.support.ranks import run_ranks

pytestmark = pytest.mark.timeout(240)

SPOIL = {1: "loss", 4: "gradients", 5: "loss"}
"""Step 1 is of the probe."""


@pytest.mark.parametrize(("backend", "clip"), [("fsdp2", 1.0), ("ddp", 1.0), ("fsdp2", None)], ids=str)
def test_a_step_that_is_not_finite_on_one_rank_updates_nothing_anywhere(backend, clip):
    spoil = {**SPOIL, 4: "loss"} if clip is None else SPOIL  # without a norm only the loss is looked at
    for told in run_ranks(2, spoiled, backend, clip, spoil):
        assert told["bad"] == [step in (1, 4, 5) if step != 1 or spoil[1] == "loss" else False for step in range(10)]
        assert told["moved"] == [step not in (0, 1, 4, 5) for step in range(10)]
        assert told["finite"] and told["error"] is None
        assert (told["skipped"], told["step"]) == (2, 8)  # the clock of the method stood still
        assert told["dropped"] == 1  # the measurement of the probe


def test_a_run_that_no_longer_learns_ends_on_all_ranks():
    for told in run_ranks(2, spoiled, "fsdp2", 1.0, dict.fromkeys(range(4, 10), "gradients")):
        step, sentence, everywhere = told["error"]
        assert step == 6 and everywhere and told["finite"]
        assert "not finite in each of the last 3 steps, up to step 7" in sentence and "step 4" in sentence
