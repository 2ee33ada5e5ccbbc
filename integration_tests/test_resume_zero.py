"""ZeRO runs that stop and go on from a checkpoint: to the bit on as many ranks, and on any others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from grass_dist.checkpoint.convert import to_dcp
from grass_dist.checkpoint.loading import open_checkpoint
from grass_dist.errors import CheckpointError
from integration_tests.resume import Setting, Training
from integration_tests.resume_zero import CASES, GRASS, exactly, unequal
from integration_tests.resume_zero_elsewhere import (
    ALONE,
    LEGS,
    OF_RANKS,
    SAVED,
    SAVED_AT,
    on_four_ranks,
    on_three_ranks,
    on_two_ranks,
)
from integration_tests.support.ranks import run_ranks

pytestmark = [pytest.mark.timeout(420), pytest.mark.long]  # test_program_convert.py has a part of it
BOUND = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def exact(folder):
    return run_ranks(2, exactly, str(folder), timeout=400)


@pytest.fixture(scope="module")
def legs(folder, exact):
    told = run_ranks(4, on_four_ranks, str(folder), timeout=200)[0]
    told |= run_ranks(2, on_two_ranks, str(folder), timeout=200)[0]
    return told | run_ranks(3, on_three_ranks, str(folder), timeout=200)[0]


@pytest.fixture(scope="module")
def reference():
    """One process that was never stopped: (parameters after each step at which a leg ends, layers of each step)."""
    training, params = Training(0, 1, Setting("single", GRASS)), {}
    for end in sorted({*(end for _, end in LEGS.values()), *ALONE.values()}):
        params[end] = training.run(end).params()
    return params, training.active


def difference(a, b) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in b)


@pytest.mark.parametrize("case", [*("-".join(map(str, case)) for case in CASES), "changed formats"])
def test_a_run_goes_on_to_the_bit_and_saving_does_not_disturb_it(exact, case):
    assert [told[case] for told in exact] == [[], []]


def test_a_rank_that_cannot_write_makes_all_ranks_refuse(exact):
    assert [told["a file that cannot be written"] for told in exact] == [[], []]


def test_a_state_of_another_run_is_refused_before_anything_is_changed(exact):
    assert [told["states of another run"] for told in exact] == [[], []]


def test_a_run_that_lost_its_measurements_draws_other_layers(exact):
    assert [told["without measurements"] for told in exact] == [[], []]


@pytest.mark.parametrize("name", [*LEGS, *ALONE])
def test_other_ranks_and_other_backends_go_on_with_the_same_draws(legs, reference, name):
    params, drawn = reference
    begins = dict(zip(LEGS, [0, *(save_at for save_at, _ in LEGS.values())], strict=False))
    begin, end = begins.get(name, SAVED_AT), ALONE.get(name) or LEGS[name][1]
    assert legs[name]["active"] == drawn[begin:end] and len(set(drawn[3:])) > 3
    print(name, difference(legs[name]["params"], params[end]))  # shown by pytest -rP
    assert difference(legs[name]["params"], params[end]) <= BOUND


def test_what_was_moved_is_the_same_to_the_bit(legs):
    assert set(legs["padded"]) == OF_RANKS
    assert not [key for key in legs["bf16"] if key != "groups"]  # which say how each optimizer computes, too


@pytest.fixture(scope="module")
def converted(folder, exact):
    return to_dcp(folder / SAVED, folder / "converted")


def test_a_process_alone_goes_on_from_deepspeeds_files_and_from_what_they_were_converted_to(
    folder, converted, reference
):
    params, drawn = reference
    ends = []
    for source in (folder / SAVED, converted):
        training = Training(0, 1, Setting("single", GRASS)).load(source).run(22)
        assert training.active == drawn[6:] and difference(training.params(), params[22]) <= BOUND
        ends.append(training.params())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("case", ["2-fp32-interval-deepspeed", "3-bf16-interval-deepspeed", "1-bf16-none-deepspeed"])
def test_a_converted_checkpoint_holds_the_same(folder, exact, tmp_path, case):
    source = sorted((folder / case).iterdir())[-1]
    made = open_checkpoint(to_dcp(source, tmp_path))
    assert unequal(open_checkpoint(source), made) == []
    assert made.manifest.kind == "dcp" and made.manifest.world_size == 2 and made.state.deepspeed is None
    assert not [name for name in made.manifest.files if name.startswith("deepspeed")]


def test_a_flipped_bit_in_a_master_is_found(folder, exact):
    file = folder / "1-bf16-none-deepspeed/step-000001/deepspeed/state/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(f"{file} is damaged: its SHA-256 is not that")):
        open_checkpoint(file.parents[2])
