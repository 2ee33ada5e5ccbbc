"""DeepSpeed ZeRO-0, 1, 2, 3: the same samples and weights as one process, and as stock ZeRO on only those layers."""

from __future__ import annotations

import pytest

from integration_tests.support.model import FROZEN, LAYERS
from integration_tests.support.parity import check_parity
from integration_tests.support.ranks import run_ranks
from integration_tests.support.reference import run_reference
from integration_tests.zero_checks import OPTIONS, SETTINGS, STEPS, everything, fsdp2, on_four_ranks

pytestmark = pytest.mark.timeout(420)
STAGES = (1, 2, 3)


@pytest.fixture(scope="module")
def reference():
    return run_reference(SETTINGS, STEPS)


STAGES_HERE = [0, pytest.param(1, marks=pytest.mark.integration), 2, 3]


@pytest.fixture(scope="module", params=STAGES_HERE, ids=lambda stage: f"stage{stage}")
def ranks(request, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp(f"stage{request.param}"))
    return request.param, run_ranks(2, everything, request.param, folder, timeout=400)


@pytest.fixture
def sharded(ranks):
    """Results of rank 0, of a stage that shards."""
    stage, told = ranks
    if stage == 0:
        pytest.skip("stage 0 runs as stage 1")
    return stage, told[0]


def test_the_reference_run_tests_something(reference):
    drawn = reference["active"][SETTINGS["probe_steps"] :]
    assert len(set(drawn)) >= 3 and min(reference["norms"]) > 0.5  # clipping binds at every step


def test_parity_under_every_option(ranks, reference):
    stage, told = ranks
    assert len(told[0]["runs"]) == 1 + len(OPTIONS.get(stage, []))
    for name in told[0]["runs"]:
        print(name, end=": ")
        check_parity([rank["runs"][name] for rank in told], reference)


def test_parity_without_accumulation(sharded, reference):
    run = sharded[1]["one micro-batch"]
    assert run["active"] == reference["active"]
    assert max((run["params"][n] - p).abs().max().item() for n, p in reference["params"].items()) <= 5e-6


def test_layers_that_the_user_has_frozen_do_not_compete(ranks, sharded):
    reference = run_reference(SETTINGS, STEPS, frozen=FROZEN)
    assert max(map(max, reference["active"])) == LAYERS - len(FROZEN) - 1
    check_parity([rank["frozen layers"] for rank in ranks[1]], reference)


@pytest.mark.integration
def test_parity_on_four_ranks(reference):
    told = run_ranks(4, on_four_ranks, timeout=400)
    for stage in STAGES:
        check_parity([rank[stage] for rank in told], reference)


def test_the_same_layers_as_fsdp2(ranks):
    _, told = ranks
    assert told[0]["runs"]["as it is"]["active"] == run_ranks(2, fsdp2)[0]["active"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bit_training_equals_a_chain_of_stock_runs_to_the_bit(sharded, dtype):
    told = sharded[1][dtype]
    seen, returned = set(), False
    for before, layers in zip([(), *told["drawn"]], told["drawn"], strict=False):
        returned |= bool((set(layers) & seen) - set(before))
        seen |= set(layers)
    assert returned, "some layer must come back after having been away"
    assert told["differences"] == [0.0] * len(told["drawn"]) and told["moved"] > 1e-3


def test_bytes_on_the_wire_are_those_of_the_active_layers(sharded):
    stage, told = sharded
    few, all_ = told["wire"][2], told["wire"][LAYERS]
    print(told["wire"])  # shown by pytest -rP, as above
    share = 2 / LAYERS
    gradients = "reduce_scatter" if stage == 3 else "all_reduce"
    assert all_[gradients] > 1_000_000
    assert few[gradients] == pytest.approx(share * all_[gradients], abs=256)
    if stage < 3:
        assert few["all_gather"] == share * all_["all_gather"]
    else:  # frozen layers are gathered for their forward all the same
        assert few["all_gather"] <= all_["all_gather"]


def test_a_checkpoint_has_the_files_of_deepspeed(sharded):
    stage, told = sharded
    model = "zero_pp_rank_{}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    states = [f for f in told["files"] if f.endswith("optim_states.pt")]
    assert len(states) == 2 and {model.format(rank) for rank in (0, 1)} <= set(told["files"])


def test_a_model_that_is_partitioned_as_it_is_made(sharded, reference):
    stage, told = sharded
    if stage != 3:
        pytest.skip("zero.Init is ZeRO-3's")
    run = told["zero.Init"]
    assert run["active"] == reference["active"]
    assert max((run["params"][n] - p).abs().max().item() for n, p in reference["params"].items()) <= 5e-6
