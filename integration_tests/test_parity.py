"""The measure of every backend: the same samples and weights as one process with an AdamW per layer, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from grass_dist.states.unit_optimizer import ELEMENTWISE
from integration_tests.checks import SETTINGS, STEPS, on_four_ranks, on_two_ranks
from integration_tests.support.model import FROZEN, LAYERS
from integration_tests.support.parity import check_parity
from integration_tests.support.ranks import run_ranks
from integration_tests.support.reference import run_reference
from integration_tests.support.training import train_grass

pytestmark = pytest.mark.timeout(420)


@pytest.fixture(scope="module")
def reference():
    return run_reference(SETTINGS, STEPS)


@pytest.fixture(scope="module")
def two():
    return run_ranks(2, on_two_ranks, timeout=360)


@pytest.fixture(scope="module")
def four():
    return run_ranks(4, on_four_ranks, timeout=360)


def test_the_reference_run_tests_something(reference):
    training = reference["active"][SETTINGS["probe_steps"] :]
    assert len(set(training)) >= 6 and len(reference["norms"]) == STEPS - 3
    assert min(reference["norms"]) > 0.5  # clipping binds at every step
    final = reference["importances"][-1]
    assert max(final) > 1.5 * min(final) and reference["importances"][3] != final


def test_one_process(reference):
    check_parity([train_grass(0, 1, "single", SETTINGS, STEPS)], reference)


@pytest.mark.parametrize("ahead", [0, 1])
def test_one_process_that_draws_less_far_ahead(reference, ahead):
    settings = {**SETTINGS, "draw_ahead": ahead}
    by_hand = run_reference(settings, STEPS)
    assert by_hand["active"] != reference["active"]
    check_parity([train_grass(0, 1, "single", settings, STEPS)], by_hand)


def test_one_process_without_accumulation(reference):
    check_parity([train_grass(0, 1, "single", SETTINGS, STEPS, accumulation=1)], reference)


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2 no sync", "fsdp2 one micro-batch", "ddp", "ddp no sync"])
def test_two_ranks(two, reference, name):
    check_parity([run[name] for run in two], reference)


@pytest.mark.parametrize("name", ["fsdp2 frozen layers", "ddp frozen layers"])
def test_layers_that_the_user_has_frozen_do_not_compete(two, name):
    reference = run_reference(SETTINGS, STEPS, frozen=FROZEN)
    assert max(map(max, reference["active"])) == LAYERS - len(FROZEN) - 1
    check_parity([run[name] for run in two], reference)


@pytest.mark.parametrize("name", ["fsdp2", "hsdp", "ddp"])
def test_four_ranks(four, reference, name):
    check_parity([run[name] for run in four], reference)


@pytest.mark.parametrize("name", ["fsdp2 bf16", "fsdp2 bf16 no sync", "ddp bf16"])
def test_bf16_weights_with_fp32_masters(two, name):
    reference = run_reference(SETTINGS, STEPS, torch.bfloat16)
    runs = [run[name] for run in two]
    assert runs[0]["active"] == runs[1]["active"] == reference["active"]
    moved = rounded = 0.0
    start = run_reference(SETTINGS, 0, torch.bfloat16)["params"]
    for name, theirs in reference["params"].items():
        moved += (theirs - start[name]).square().sum().item()
        rounded += (runs[0]["params"][name] - theirs).square().sum().item()
    assert runs[0]["state_bytes"] > 0
    assert math.sqrt(rounded / moved) < 0.1  # bf16 gradients differ by rounding; the trajectory is the same
    assert runs[0]["frozen_moved"] == runs[1]["frozen_moved"] == 0


@pytest.mark.parametrize(
    ("name", "width", "parts"),
    [
        ("fsdp2 wire", 8, 2),  # AdamW's two moments in fp32
        ("ddp wire", 8, 2),
        ("fsdp2 wire bf16", 12, 2),  # and the master
        ("ddp wire bf16", 12, 2),
        ("ddp wire, 4 ranks", 8, 4),
        ("hsdp wire, 4 ranks", 8, 2),
    ],
)
def test_a_rank_keeps_its_part_of_the_states_of_what_has_trained(two, four, name, width, parts):
    for run in four if "4" in name else two:
        for seen in run[name.split(",")[0]].values():
            (first, once), (second, more) = seen["states"]
            assert parts * first == width * once and parts * second == width * more
            assert more > once > 0


@pytest.mark.parametrize("name", ["fsdp2 full", "ddp full", "hsdp full"])
def test_with_all_layers_and_no_probe_it_is_adamw_to_the_bit(two, four, name):
    for run in four if name == "hsdp full" else two:
        assert run[name]["compared"] > 70 and run[name]["differing"] == []


@pytest.mark.parametrize("what", ["with roles", "layers only"])
def test_fsdp2_scatters_the_trainable_parameters_and_no_byte_more(two, what):
    for run in two:
        for name in ("fsdp2 wire", "fsdp2 wire bf16"):
            seen = run[name][what]
            assert [step["reduce_scatter"] for step in seen["counted"]] == seen["expected"] == seen["claimed"]
            assert all(step["all_reduce"] == 0 for step in seen["counted"])


@pytest.mark.parametrize("what", ["with roles", "layers only"])
def test_ddp_reduces_the_trainable_parameters_and_no_byte_more(two, what):
    for run in two:
        seen = run["ddp wire"][what]
        assert [step["all_reduce"] for step in seen["counted"]] == seen["expected"] == seen["claimed"]


@pytest.mark.parametrize(("name", "width"), [("ddp wire", 4), ("ddp wire, 4 ranks", 4), ("ddp wire bf16", 2)])
def test_ddp_gathers_the_weights_that_have_trained_and_no_byte_more(two, four, name, width):
    for run in four if "4" in name else two:
        for what, seen in run[name.split(",")[0]].items():
            gathered = [step["all_gather"] * 4 // width for step in seen["counted"]]
            assert gathered == seen["expected"]
            if what == "layers only":
                assert [8 * n for n in gathered] == [2 * seen["all layers"]] * 4  # γ of L layers


@pytest.mark.parametrize("name", [*sorted(cls.__name__ for cls in ELEMENTWISE), "bfloat16"])
def test_under_ddp_states_in_parts_make_the_update_of_whole_ones(four, name):
    runs = [run["ddp parts"][name] for run in four]
    whole = runs[0]["whole"]
    assert sum(run["parts"]["entries"] for run in runs) == whole["entries"]
    for run in runs:
        assert run["parts"]["gathered"] == run["parts"]["padded"] and not any(run["whole"]["gathered"])
        assert all(map(torch.equal, run["parts"]["params"], runs[0]["parts"]["params"]))
        worst = max((a - b).abs().max().item() for a, b in zip(run["parts"]["params"], whole["params"], strict=True))
        print(f"worst parameter difference {worst:.1e}, entries {run['parts']['entries']} of {whole['entries']}")
        assert worst <= 1e-6


def test_under_ddp_a_class_that_needs_whole_parameters_has_them(four):
    runs = [run["ddp parts"]["Adafactor"] for run in four]
    for run in runs:
        for kind in ("parts", "whole"):
            assert run[kind]["entries"] == runs[0]["whole"]["entries"] > 0 and not any(run[kind]["gathered"])
            assert all(map(torch.equal, run[kind]["params"], runs[0]["whole"]["params"]))


def test_under_ddp_parts_are_updated_in_the_backward_to_the_same_weights(four):
    assert [run["ddp in backward"] for run in four] == [[]] * 4


def test_ranks_that_disagree_about_dividing_states_say_so(four):
    for run in four:
        assert run["ddp disagree"].startswith("RanksDisagree: shard_states is False on rank 3 and True on rank 0; ")


def test_under_ddp_a_state_that_is_not_the_ranks_own_is_refused(four):
    for rank, run in enumerate(four):
        said = run["ddp foreign states"]
        assert said["own"] == said["own whole"] == "loaded"
        mine, whole = f"of part {rank} of 4", "of the whole"
        assert f" is {whole}, and this rank keeps {mine}: " in said["whole"]
        assert f" is {mine}, and this rank keeps {whole}: " in said["part"]
        assert f" is of part {rank} of 2, and this rank keeps {mine}: " in said["of fewer"]
        assert said["of rank 0"] == "loaded" if rank == 0 else " is of part 0 of 4, and this rank" in said["of rank 0"]


def test_hsdp_scatters_in_the_shard_group_and_reduces_shards_over_replicas(four):
    for run in four:
        seen = run["hsdp wire"]["with roles"]
        assert [step["reduce_scatter"] for step in seen["counted"]] == seen["expected"]
        assert [step["all_reduce"] * 2 for step in seen["counted"]] == seen["expected"]
        assert [2 * claimed for claimed in seen["claimed"]] == [3 * expected for expected in seen["expected"]]


def test_one_all_reduce_a_refresh_carries_the_measurements(two, four):
    for runs, name in ((two, "fsdp2 wire"), (four, "hsdp wire")):
        extra = [bytes_ for _, bytes_ in runs[0][name]["layers only"]["squares"]]
        assert extra == [0, 0, 3 * 2 * 8, 0]  # T_u = 3 steps of γ = 2 layers in fp64, and nothing on other steps
    calls = [calls for calls, _ in two[0]["fsdp2 wire"]["layers only"]["squares"]]
    assert calls == [0, 0, 1, 0]


def test_the_backward_stops_at_the_lowest_active_layer(two):
    for run in two:
        for name in ("fsdp2 wire", "ddp wire"):
            assert all(active == reached for active, reached in run[name]["layers only"]["lowest"])
            assert all(reached == 0 for _, reached in run[name]["with roles"]["lowest"])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_probe_holds_one_layers_gradient_and_updates_nothing(two, accumulation):
    for run in two:
        sharded, replicated = f"fsdp2 probe {accumulation}", f"ddp probe {accumulation}"
        assert 0 < run[sharded]["peak"] <= run[sharded]["layer"] < run[sharded]["all"] / 8
        # DDP: the layer that is being reduced and the one that the backward is at; training itself needs one
        assert 0 < run[replicated]["peak"] <= 2 * run[replicated]["layer"]
        for name in (sharded, replicated):
            assert run[name]["hooks"] > 0 and run[name]["left"] == run[name]["state"] == run[name]["moved"] == 0


def test_under_ddp_a_unit_without_a_gradient_holds_nothing_up(two):
    assert all(got == expected for got, expected in two[0]["ddp unused"]["reduced"])
    assert two[0]["ddp unused"] == two[1]["ddp unused"]


@pytest.mark.parametrize("backend", ["fsdp2", "ddp"])
def test_layers_that_are_cut_off_from_the_backward_end_every_rank(two, backend):
    for run in two:
        assert " active layers (" in run[f"{backend} cut off in a probe"]
        for what in ("in a probe", "in a round"):
            said = run[f"{backend} cut off {what}"]
            assert said.startswith("GrassError: ") and "use_reentrant=False" in said


@pytest.mark.parametrize("name", ["fsdp2 resume", "ddp resume"])
def test_a_saved_run_continues_to_the_bit(two, name):
    for run in two:
        assert run[name] == {"differing": [], "same layers": True, "step": 20}


@pytest.mark.parametrize("mode", ["each", "last", "none"])
@pytest.mark.parametrize("inputs", ["ids", "embeddings"])
def test_under_ddp_gradients_and_importances_are_the_average_whatever_synchronises(two, mode, inputs):
    for run in two:
        seen = run["ddp gradients"][mode, inputs]
        assert seen["worst"] < 1e-6 < seen["largest"]
        assert seen["importance"] == pytest.approx(seen["expected importance"], rel=1e-5)
        assert seen["reduced once"]


@pytest.mark.parametrize("name", ["fsdp2 not finite", "ddp not finite"])
def test_a_norm_that_is_not_finite_on_one_rank_is_dropped_on_all(two, name):
    for run in two:
        assert run[name]["dropped"] == 1
        assert all(math.isfinite(m) and m > 0 for m in run[name]["importances"])
    assert two[0][name] == two[1][name]
