"""ZeRO runs that stop and go on from a checkpoint: to the bit on as many ranks, and on any others."""

from __future__ import annotations

import gc
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from grass_dist.checkpoint.convert import to_dcp
from grass_dist.checkpoint.deepspeed_save import DeepSpeedSnapshot
from grass_dist.checkpoint.loading import Checkpoint, State, load, open_checkpoint
from grass_dist.checkpoint.saving import write_snapshot
from grass_dist.errors import CheckpointError
from grass_dist.ranks import Ranks
from integration_tests.support.ranks import refused, run_ranks
from integration_tests.support.resume import Setting, Training
from integration_tests.support.resume import leg as torch_leg
from integration_tests.support.resume_zero import GRASS, ZeroSetting, ZeroTraining, setting_of

pytestmark = [pytest.mark.timeout(420), pytest.mark.long]  # test_program_convert.py has a part of it
BOUND = 1e-6

STEPS = 9
"""The last one refreshes the importances and draws once more."""
EVERYWHERE = (1, 2, 3, 4, 6, 7)
"""In the probe, before its last step; at a switch, in an interval, between a draw and its switch, at a switch."""


# On as many ranks.


def compare_resumed(
    rank: int, world_size: int, setting: ZeroSetting, save_at: Sequence[int], folder: Path
) -> list[str]:
    """What differs in a bit between a training that was resumed and one that was not."""
    whole = ZeroTraining(rank, world_size, setting).run(STEPS, save_at, folder)
    undisturbed = ZeroTraining(rank, world_size, setting).run(STEPS)
    odd = [f"saving disturbed {what}" for what in differing(whole, undisturbed)]
    undisturbed.engine.destroy()
    for step in save_at:
        resumed = ZeroTraining(rank, world_size, setting)
        if step == save_at[-1]:
            resumed.run(5)  # it need not be a fresh one
        resumed.load(folder / f"step-{step:06d}")
        odd += [] if resumed.to_the_bit else [f"{step} was not loaded to the bit"]
        odd += [f"{step}: {unit} has a state" for unit in stateful(resumed) ^ drawn_before(whole, step)]
        resumed.run(STEPS)
        odd += [f"{what} differs after {step}" for what in differing(whole, resumed)]
        resumed.engine.destroy()
    whole.engine.destroy()
    return odd


def differing(a: ZeroTraining, b: ZeroTraining) -> list[str]:
    """Parameters, draws, and the method: its measurements too."""
    mine, theirs = a.params(), b.params()
    odd = [] if a.active[-len(b.active) :] == b.active else ["a draw"]
    odd += [] if repr(a.engine.grass.state_dict()) == repr(b.engine.grass.state_dict()) else ["the method"]
    return odd + [name for name in mine if not torch.equal(mine[name], theirs[name])]


def stateful(training: ZeroTraining) -> set[str]:
    """Units that have a state."""
    return {unit.name for unit in training.holdings.states()}


def drawn_before(training: ZeroTraining, step: int) -> set[str]:
    """Units that had been updated after ``step`` steps."""
    grass, probe = training.engine.grass, GRASS["probe_steps"]
    layers = {grass.layers[i].name for active in training.active[probe:step] for i in active}
    return layers | {unit.name for unit in grass.roles if step > probe}


CASES = {
    # stage, dtype, mode, kind: where it is saved, what else is set
    (1, "fp32", "interval", "dcp"): (EVERYWHERE, {}),
    (1, "bf16", "stream", "dcp"): ((1, 4, 6), {}),
    (2, "bf16", "interval", "dcp"): (EVERYWHERE, {"accumulation": 2, "zero": {"round_robin_gradients": True}}),
    (2, "fp32", "stream", "dcp"): ((2, 6, 7), {}),
    (2, "bf16", "none", "dcp"): ((4, 6), {}),
    (3, "fp32", "interval", "dcp"): ((1, 4, 6), {"zero": {"stage3_param_persistence_threshold": 100_000}}),
    (3, "bf16", "stream", "dcp"): ((2, 7), {}),
    (3, "fp32", "none", "dcp"): ((3, 6), {}),
    (1, "bf16", "none", "deepspeed"): ((1, 7), {"zero": {"round_robin_gradients": True}}),
    (2, "fp32", "interval", "deepspeed"): ((1, 2, 4, 6), {}),
    (3, "bf16", "interval", "deepspeed"): ((2, 6), {"grass": {"always_active": []}}),
}


def everything(rank: int, world_size: int, folder: str) -> dict[Any, list[str]]:
    """Every case of `CASES`, and what else two ranks can show; a list of what is wrong for each."""
    gc.freeze()  # ZeRO-3 has the collector run whenever it is constructed
    parent, told = Path(folder), {}
    for case, (save_at, more) in CASES.items():
        told[case] = compare_resumed(rank, world_size, setting_of(*case, **more), save_at, folder_of(parent, case))
    for function in (unwritable, changed_formats, foreign, without_measurements):
        told[function] = function(rank, world_size, parent)
    return told


def folder_of(parent: Path, case: tuple) -> Path:
    return parent / "-".join(str(part) for part in case)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def exact(folder):
    return run_ranks(2, everything, str(folder), timeout=400)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_run_continues_to_the_bit_and_saving_disturbs_nothing(exact, case):
    assert [told[case] for told in exact] == [[], []]


class Obstructed(DeepSpeedSnapshot):
    """A folder lies where a file of rank 1 goes."""

    def write_tensors(self, folder: Path, ranks: Ranks) -> None:
        (folder / "deepspeed/state/zero_pp_rank_1_mp_rank_00_optim_states.pt").mkdir(parents=True, exist_ok=True)
        dist.barrier()
        super().write_tensors(folder, ranks)


def unwritable(rank: int, world_size: int, parent: Path) -> list[str]:
    """All ranks are told, nothing is left, and the run goes on; the same in the background, where none could."""
    folder = parent / "unwritable"
    training = ZeroTraining(rank, world_size, setting_of(2, "fp32", "interval", "deepspeed")).run(1)
    ranks = Ranks(dist.new_group(backend="gloo"))
    snapshot = DeepSpeedSnapshot.take(training.holdings, 1)
    obstructed = Obstructed(**vars(snapshot))
    told = [refused(lambda: write_snapshot(folder, obstructed, ranks, 3))]
    with ThreadPoolExecutor(1) as thread:
        told.append(thread.submit(refused, lambda: write_snapshot(folder, snapshot, ranks, 3)).result())
    training.run(2)
    training.engine.destroy()
    problems = ("rank 1: ", "DeepSpeed's format cannot be written in the background")
    begin = "CheckpointError: The checkpoint of step 1 was not written: "
    good = all(sentence.startswith(begin + problem) for sentence, problem in zip(told, problems, strict=True))
    left = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return ([] if good else told) + left


def test_a_rank_that_cannot_write_makes_all_ranks_refuse(exact):
    assert [told[unwritable] for told in exact] == [[], []]


def changed_formats(rank: int, world_size: int, parent: Path) -> list[str]:
    """What has been loaded and is saved at once in the other format holds the same."""
    odd = []
    cases = ((2, "bf16", "interval", "dcp"), (3, "fp32", "interval", "dcp"), (3, "bf16", "interval", "deepspeed"))
    for case in cases:
        source = open_checkpoint(folder_of(parent, case) / "step-000006")
        other = "deepspeed" if case[3] == "dcp" else "dcp"
        training = ZeroTraining(rank, world_size, setting_of(*case[:3], other, **CASES[case][1])).load_open(source)
        folder = parent / "other" / f"{case[0]}"
        training.save(folder / other)
        training.run(training.done)
        training.engine.destroy()
        dist.barrier()
        again = open_checkpoint(folder / other / "step-000006")
        odd += [f"{case}: {key}" for key in unequal(source, again)]
    return odd


def unequal(a: Checkpoint, b: Checkpoint) -> list[str]:
    """Keys under which two checkpoints hold something else."""
    mine, theirs = a.tensors(), b.tensors()
    odd = sorted(mine.tensors.keys() ^ theirs.tensors.keys())
    for key in mine.tensors.keys() & theirs.tensors.keys():
        (numel, dtype), other = mine.tensors[key], theirs.tensors[key]
        same = (numel, dtype) == other and torch.equal(
            *(reader.read(key, 0, torch.empty(numel, dtype=dtype)) for reader in (mine, theirs))
        )
        odd += [] if same else [key]
    state, other_state = (c.state.model_dump(exclude={"deepspeed"}) for c in (a, b))
    return odd + [key for key in state if state[key] != other_state[key]]


def test_what_is_saved_in_the_other_format_is_the_same(exact):
    assert [told[changed_formats] for told in exact] == [[], []]


def foreign(rank: int, world_size: int, parent: Path) -> list[str]:
    """States and clocks of another run are refused, and nothing is changed."""
    source = open_checkpoint(parent / "2-fp32-interval-deepspeed/step-000006")
    training = ZeroTraining(rank, world_size, setting_of(2, "fp32", "interval", "dcp")).run(1)
    before, told = training.params(), []
    state = source.state.model_dump()
    later = {**state, "engine": {**state["engine"], "step": 9}}
    poorer = {**state, "units": {u: {n: {"step": s["step"]} for n, s in e.items()} for u, e in state["units"].items()}}
    for other in (later, poorer):
        checkpoint = Checkpoint(source.folder, source.manifest, State(**other))
        told.append(refused(lambda checkpoint=checkpoint: load(checkpoint, training.holdings)))
    after = training.params()
    training.engine.destroy()
    good = all(sentence.startswith("CheckpointError: ") for sentence in told) and "exp_avg" in told[1]
    return ([] if good else told) + [name for name in before if not torch.equal(before[name], after[name])]


def test_a_state_of_another_run_is_refused_and_nothing_changed(exact):
    assert [told[foreign] for told in exact] == [[], []]


def without_measurements(rank: int, world_size: int, parent: Path) -> list[str]:
    """The checks can fail: a training that lost what the probe has measured draws other layers."""
    setting = setting_of(1, "fp32", "interval", "dcp")
    source = open_checkpoint(parent / "1-fp32-interval-dcp/step-000001")
    with_, without = [], []
    for drawn, lost in ((with_, False), (without, True)):
        engine = source.state.engine
        measured = engine.measured.model_copy(update={"layers": []}) if lost else engine.measured
        state = source.state.model_copy(update={"engine": engine.model_copy(update={"measured": measured})})
        training = ZeroTraining(rank, world_size, setting)
        training.load_open(Checkpoint(source.folder, source.manifest, state)).run(12)
        drawn += training.active
        training.engine.destroy()
    return ["the same draws"] if with_ == without else []


def test_a_run_that_lost_its_measurements_draws_other_layers(exact):
    assert [told[without_measurements] for told in exact] == [[], []]


# On other ranks, at another stage, under another backend.


LEGS = {"zero2 on 4": (2, 4), "zero3 on 2": (9, 11), "fsdp2 on 2": (15, 17), "zero1 on 3": (19, 22)}
"""Legs of one training: where each is saved for the next, and where it ends."""
ALONE = {"zero3 on 4": 22, "zero3 on 3": 11, "fsdp2": 22}
"""Trainings that go on from `SAVED`, and where they end."""
SAVED, SAVED_AT = "2-fp32-interval-deepspeed/step-000006", 6
"""In DeepSpeed's format, of two ranks."""
OF_RANKS = {"@measured", "@rng"}


def zero_leg(rank: int, world_size: int, name: str, source: Path | None, folder: Path) -> dict[str, Any]:
    """One leg: from ``source`` on, saves for the next and goes on for a while."""
    backend, (save_at, steps) = name.split()[0], LEGS[name]
    training = ZeroTraining(rank, world_size, ZeroSetting(backend, GRASS))
    if source is not None:
        training.load(source)
    training.run(steps, [save_at], folder / name)
    return {"params": training.params(), "active": training.active}


def last(name: str) -> str:
    """The checkpoint that a leg leaves."""
    return f"{name}/step-{LEGS[name][0]:06d}"


def on_four_ranks(rank: int, world_size: int, parent: str) -> dict[str, Any]:
    gc.freeze()
    folder = Path(parent)
    told = {"zero2 on 4": zero_leg(rank, world_size, "zero2 on 4", None, folder)}
    training = ZeroTraining(rank, world_size, ZeroSetting("zero3", GRASS)).load(folder / SAVED)
    training.run(ALONE["zero3 on 4"])
    return told | {"zero3 on 4": {"params": training.params(), "active": training.active}}


def on_two_ranks(rank: int, world_size: int, parent: str) -> dict[str, Any]:
    gc.freeze()
    folder = Path(parent)
    told: dict[str, Any] = {"zero3 on 2": zero_leg(rank, world_size, "zero3 on 2", folder / last("zero2 on 4"), folder)}
    save_at, steps = LEGS["fsdp2 on 2"]
    source, out, setting = str(folder / last("zero3 on 2")), str(folder / "fsdp2 on 2"), Setting("fsdp2", GRASS)
    told["fsdp2 on 2"] = torch_leg(rank, world_size, setting, source, steps, save_at, out)
    told["fsdp2"] = torch_leg(rank, world_size, setting, str(folder / SAVED), ALONE["fsdp2"], 20, f"{parent}/fsdp2")
    told["bf16"] = moved_to_fsdp2(rank, world_size, folder)
    return told


def moved_to_fsdp2(rank: int, world_size: int, folder: Path) -> list[str]:
    """What an FSDP2 run with 16-bit weights holds otherwise than the ZeRO-2 run that it has loaded."""
    source = folder / "2-bf16-interval-dcp/step-000006"
    training = Training(rank, world_size, Setting("fsdp2", GRASS, torch.bfloat16)).load(source)
    training.save(folder / "bf16")
    training.run(training.done)
    return unequal(open_checkpoint(source), open_checkpoint(folder / "bf16/step-000006"))


def on_three_ranks(rank: int, world_size: int, parent: str) -> dict[str, Any]:
    """Three ranks divide few parameters evenly: partitions are padded."""
    gc.freeze()
    folder = Path(parent)
    told: dict[str, Any] = {"zero1 on 3": zero_leg(rank, world_size, "zero1 on 3", folder / last("fsdp2 on 2"), folder)}
    training = ZeroTraining(rank, world_size, ZeroSetting("zero3", GRASS, kind="deepspeed")).load(folder / SAVED)
    training.save(folder / "padded")
    training.run(ALONE["zero3 on 3"])
    told["zero3 on 3"] = {"params": training.params(), "active": training.active}
    told["padded"] = unequal(open_checkpoint(folder / SAVED), open_checkpoint(folder / "padded/step-000006"))
    return told


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


@pytest.mark.parametrize("name", [*LEGS, *ALONE])
def test_other_ranks_and_backends_continue_with_the_same_draws(legs, reference, name):
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


def test_one_process_continues_from_either_format(folder, converted, reference):
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
