"""What a caller reads and sets of a ZeRO engine: right at any moment, of every layer, and alike on all ranks."""

from __future__ import annotations

import pytest

from integration_tests.support.ranks import run_ranks
from integration_tests.zero_doors import DOORS, compare_doors, without_waits
from integration_tests.zero_reads import everything

pytestmark = pytest.mark.timeout(420)
STAGES = [pytest.param(1, marks=pytest.mark.integration), 2, pytest.param(3, marks=pytest.mark.integration)]


@pytest.mark.parametrize("stage", STAGES)
def test_every_door_waits_for_its_own_copies(stage, tmp_path):
    """After steps, switches and loads, with copies that come late: as if no state ever moved, to the bit."""
    for told in run_ranks(2, compare_doors, stage, str(tmp_path), timeout=400):
        assert told["odd"] == {"interval": [], "stream": []}
        assert {door for door, values in told["seen"].items() if values < 50} <= ({"local"} if stage < 3 else set())
        assert told["seen"].keys() == {*DOORS, "gradients"}


@pytest.mark.integration
def test_the_doors_show_a_missing_wait(tmp_path):
    for told in run_ranks(2, without_waits, 2, str(tmp_path), timeout=300):
        assert told["at_hand"] >= {"masters", "moments"} and told["settle"] & {"state_dict", "base_state", "checkpoint"}


@pytest.fixture(
    scope="module",
    params=[pytest.param(stage, marks=pytest.mark.integration) for stage in (1, 2, 3)],
    ids=lambda stage: f"stage{stage}",
)
def ranks(request, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp(f"stage{request.param}"))
    return run_ranks(2, everything, request.param, folder, timeout=400)


def test_what_cannot_be_set_is_refused_on_all_ranks(ranks):
    for told in ranks:
        last = "model.layers.7.mlp.up_proj.weight"
        assert told["set at rest"] == {
            "a moment before its first step": f"GrassError: 'exp_avg' of {last} cannot be set: the optimizer makes it "
            "when the layer is first updated. Set it after that step.",
            "a moment that is not kept": "GrassError: The optimizer keeps no 'exp_agv' for each entry of a parameter; "
            "it keeps exp_avg, exp_avg_sq.",
            "another size": "GrassError: A value of 8128 elements was given for model.layers.0.mlp.up_proj.weight, "
            "which takes 8192.",
            "a gradient at rest": "GrassError: The gradient of model.layers.0.mlp.up_proj.weight cannot be set: the "
            "layer does not train in this step. Leave out the parameters whose safe_get_full_grad is None.",
        }


def test_frozen_is_what_never_trains(ranks):
    for moment, names in ranks[0]["left out"].items():
        assert names == ["lm_head.weight"], moment


def test_offloading_states_is_refused_before_anything_moves(ranks):
    for told in ranks:
        assert told["offload_states"].startswith("GrassError: engine.offload_states() does not work with GRASS")
