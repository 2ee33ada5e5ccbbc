"""launch/finetune.py that is stopped and goes on: by itself, on other ranks, after damage; and what it refuses."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess

import pytest

from grass_dist.checkpoint.loading import newest_good
from integration_tests.support.program import (
    check_refused,
    events,
    make_data,
    make_model,
    run_all,
    run_program,
    tree_of,
)

pytestmark = pytest.mark.timeout(300)

SAVE = ["train.checkpoint.every=3", "train.checkpoint.keep=5"]


@pytest.fixture(scope="module")
def whole(config):
    """A run that was saved after 3, 6, 9 and all 10 of its steps."""
    return run_all(config, 2, "name=whole", *SAVE)


def copy_of(run, name: str):
    """A copy of a run's folder under another name, as it was just after step 6."""
    copy = run.with_name(name)
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "model")
    for later in ("step-000009", "step-000010"):
        shutil.rmtree(copy / "checkpoints" / later)
    return copy


def to_scratch(run) -> None:
    """Moves the run and its checkpoints to another disk, and leaves links."""
    scratch = run.parents[1] / "scratch"
    scratch.mkdir()
    for part in (run / "checkpoints", run):
        part.rename(scratch / part.name)
        part.symlink_to(scratch / part.name)


def steps_of(run) -> list[tuple]:
    return [(s["step"], s["loss"], s["lr"], s["active_layers"]) for s in events(run, "step")]


def weights_of(run) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def test_a_record_that_was_cut_off_continues_at_the_checkpoint(config, whole):
    run = copy_of(whole, "auto")
    with (run / "metrics.jsonl").open("a") as record:
        record.write('{"event": "step", "st')  # as a kill in the midst of a line leaves it
    (run / "checkpoints" / ".step-000009.writing").mkdir()
    to_scratch(run)
    ended = run_program([["--config", str(config), "name=auto", "--resume", "auto", *SAVE]] * 2)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    assert "step 6: goes on from" in ended[0].out and "before: " in ended[0].out
    assert steps_of(run) == steps_of(whole) and weights_of(run) == weights_of(whole)
    for kind in ("sample", "refresh", "eval", "answer"):
        assert [e["step"] for e in events(run, kind)] == [e["step"] for e in events(whole, kind)], kind
    assert [e["step"] for e in events(run, "checkpoint")] == [3, 9, 10]  # it is told of the second after that was made
    saved = ["step-000003", "step-000006", "step-000009", "step-000010"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == saved
    assert run.is_symlink() and (run / "checkpoints").is_symlink()
    assert (run / "report.html").exists()


def test_auto_goes_back_to_the_newest_good_one_and_says_so(config, whole):
    run = copy_of(whole, "damaged")
    [file, *_] = sorted((run / "checkpoints" / "step-000006" / "tensors").iterdir())
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    named = run_program([["--config", str(config), "name=new", "--resume", str(file.parents[1])]] * 2)
    check_refused(named, f"{file.name} is damaged: its SHA-256")
    ended = run_program([["--config", str(config), "name=damaged", "--resume", "auto", *SAVE]] * 2)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    assert f"{file} is damaged" in ended[0].out and "step 3: goes on from" in ended[0].out
    assert weights_of(run) == weights_of(whole)


def test_a_run_from_an_older_checkpoint_puts_newer_ones_aside(config, whole):
    run = copy_of(whole, "older")
    older = str(run / "checkpoints" / "step-000003")
    few = ["name=older", "train.checkpoint.every=4", "train.checkpoint.keep=1"]
    ended = run_program([["--config", str(config), "--resume", older, *few]] * 2)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["left-at-3.step-000006", "step-000010"]
    assert weights_of(run) == weights_of(whole)


def test_auto_does_not_discard_checkpoints_if_none_is_good(config, whole):
    run = copy_of(whole, "none-good")
    for path in (run / "checkpoints").iterdir():
        (path / "state.json").write_text("{}")
    ended = run_program([["--config", str(config), "name=none-good", "--resume", "auto"]] * 2)
    assert [rank.code for rank in ended] == [1, 1]
    assert "error: None of the checkpoints in" in ended[0].err and len(list((run / "checkpoints").iterdir())) == 2
    assert len(events(run, "step")) == 10


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        pytest.param(4, ["parallel.mesh.replicate=2"], marks=pytest.mark.long),
        (1, ["parallel=single"]),
        (2, ["parallel=ddp", "grass.offload.mode=stream"]),
    ],
    ids=["hsdp on 4", "one process", "ddp"],
)
def test_it_goes_on_on_other_ranks(config, whole, ranks, overrides):
    name = f"name={'-'.join(overrides[0].split('='))}"
    source = ["--resume", str(whole / "checkpoints" / "step-000003"), "train.micro_batch_size=1"]
    run = run_all(config, ranks, name, *overrides, *source)
    mine, theirs = events(run, "step"), events(whole, "step")[3:]
    assert [s["active_layers"] for s in mine] == [s["active_layers"] for s in theirs]
    assert [s["tokens"] for s in mine] == [s["tokens"] for s in theirs]
    assert [s["loss"] for s in mine] == pytest.approx([s["loss"] for s in theirs], abs=1e-5)
    assert events(run, "step")[0]["step"] == 4 and (run / "report.html").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_to_one_rank_saves_and_ends_all(config, whole, number):
    name = f"name={number.name}"

    def watch(rank, line, pids):
        if line.startswith("step 5/10"):
            os.kill(pids[1], number)

    ended = run_program([["--config", str(config), name]] * 2, watch=watch)
    assert [rank.code for rank in ended] == [128 + number] * 2, ended[0].err
    assert f"leaving because of {number.name}" in ended[0].out
    run = whole.with_name(number.name)
    assert 5 <= (saved := newest_good(run / "checkpoints").step) <= 7 and not (run / "model").exists()
    again = run_program([["--config", str(config), name, "--resume", "auto"]] * 2)
    assert [rank.code for rank in again] == [0, 0], again[0].err
    assert f"step {saved}: goes on from" in again[0].out
    assert steps_of(run) == steps_of(whole) and weights_of(run) == weights_of(whole)


def test_a_second_signal_ends_a_rank_that_waits_at_once(config):
    stopped = []

    def watch(rank, line, pids):
        if line.startswith("step 5/10") and not stopped:
            os.kill(pids[1], signal.SIGSTOP)
            ask = f"while kill -TERM {pids[0]}; do sleep 0.2; done; kill -KILL {pids[1]}"
            stopped.append(subprocess.Popen(["sh", "-c", ask], stderr=subprocess.DEVNULL))

    ended = run_program([["--config", str(config), "name=twice", "train.timeout_seconds=60"]] * 2, watch=watch)
    stopped[0].wait(10)
    assert [rank.code for rank in ended] == [128 + signal.SIGTERM, -signal.SIGKILL]


REFUSED = {
    "another method": (["grass.active_layers=3"], r"grass.active_layers=3: the run that it goes on with has 2; set it"),
    "other batches": (["train.global_batch_size=4"], r"train.global_batch_size=4: .* has 8"),
    "another form of temperature": (
        ["grass.temperature.effective_layers=2"],
        r"grass.temperature=\{'effective_layers': 2.0\}: the run that it goes on with has 1.0; set it to 1.0",
    ),
    "another dtype": (["model.dtype=bfloat16"], r"in float32, and this run trains it in bfloat16: set model.dtype"),
    "no checkpoint": (["--resume", "/nowhere"], r"/nowhere is not a folder"),
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: c.replace(" ", "-"))
def test_another_run_is_refused(config, whole, case):
    overrides, message = REFUSED[case]
    source = [] if "--resume" in overrides else ["--resume", "auto", *SAVE]
    before = tree_of(whole)
    check_refused(run_program([["--config", str(config), "name=whole", *source, *overrides]] * 2), message)
    assert tree_of(whole) == before


def test_other_examples_are_refused_and_another_rate_is_said(config, whole, folder):
    other = make_data(folder / "other.jsonl", 30)
    source = ["--config", str(config), "name=refused", "--resume", str(whole / "checkpoints" / "step-000009")]
    check_refused(
        run_program([[*source, f"data.name={other}"]] * 2), r"was trained on other examples than .*other.jsonl"
    )
    [ended, _] = run_program([[*source, "train.learning_rate=1e-3", "overwrite=true"]] * 2)
    assert ended.code == 0, ended.err
    assert "train.learning_rate is 0.001, and was 0.005 when the run was saved" in ended.out


def test_ranks_with_other_models_or_versions_are_found_early(config, folder):
    import yaml

    for place, layers in (("here", 6), ("there", 6)):
        (folder / place).mkdir()
        make_model(folder / place / "model", layers)
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(folder / "there" / "model")
    other.model.layers[3].mlp.up_proj.weight.data.mul_(1.01)
    other.save_pretrained(folder / "there" / "model")
    settings = yaml.safe_load(config.read_text())
    settings["model"]["name"] = "model"
    (folder / "relative.yaml").write_text(yaml.safe_dump(settings))
    argv = [["--config", str(folder / "relative.yaml"), "name=apart"]] * 2
    check_refused(run_program(argv, cwd=[folder / "here", folder / "there"]), r"weights of the model .* on rank 1 and")
    assert not (folder / "runs" / "apart").exists()


@pytest.fixture
def small_disk(folder):
    """Mounts a file system of one megabyte at a run's checkpoints."""
    mounted = []

    def mount(name: str):
        place = folder / "runs" / name / "checkpoints"
        place.mkdir(parents=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "none", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip("a file system can only be mounted by root")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=False)


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(config, whole, small_disk):
    place = small_disk("full")
    often = ["train.checkpoint.every=2", "train.checkpoint.keep=9", "name=full"]
    ended = run_program([["--config", str(config), *often]] * 2)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    assert "The checkpoint of step" in ended[0].out and "No space left on device" in ended[0].out
    assert weights_of(place.parent) == weights_of(whole)
    saves = events(place.parent, "checkpoint")
    good = [e["step"] for e in saves if not e["error"]]
    assert good == [2, 4][: len(good)] and len(good) < len(saves)
    assert not list(place.glob(".*")) and newest_good(place).step == good[-1]  # what there was before stays


def test_a_full_disk_ends_the_run_if_it_is_told_so(config, small_disk):
    place = small_disk("stops")
    often = ["train.checkpoint.every=2", "train.checkpoint.keep=9", "train.checkpoint.on_save_error=stop", "name=stops"]
    ended = run_program([["--config", str(config), *often]] * 2)
    check_refused(ended, r"checkpoint of step [46] was not written: rank \d: No space left on device")
    assert newest_good(place).step in (2, 4)


def test_a_folder_that_cannot_be_written_is_one_sentence(config, folder):
    (folder / "runs" / "blocked").mkdir(parents=True)
    (folder / "runs" / "blocked" / "checkpoints").write_text("a file")
    ended = run_program([["--config", str(config), *SAVE, "name=blocked"]] * 2)
    assert [rank.code for rank in ended] == [0, 0]
    assert ended[0].out.count("checkpoint of step 3 was not written: ") == 1
