"""A fine-tune that moves between DeepSpeed ZeRO and the other backends, by --resume and by grass-dist convert."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from grass_dist.checkpoint.files import read_manifest
from grass_dist.checkpoint.loading import open_checkpoint
from grass_dist.cli import app
from integration_tests.support.program import check_refused, events, run_all, run_program
from tests.hostile import reseal

pytestmark = pytest.mark.timeout(300)

SETTINGS = ["train.eps=1e-6", "train.checkpoint.every=3", "train.checkpoint.keep=5"]
ZERO2 = ["parallel=deepspeed", "parallel.config=zero2.json", *SETTINGS]
ZERO3 = ["parallel=deepspeed", "parallel.config=zero3.json", *SETTINGS]


@pytest.fixture(scope="module")
def zero2(config):
    return run_all(config, 2, "name=zero2", *ZERO2)


@pytest.fixture(scope="module")
def fsdp2(config):
    return run_all(config, 2, "name=fsdp2", *SETTINGS)


def weights_of(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def check_same_run(run: Path, whole: Path) -> None:
    """``run`` is the tail of ``whole`` after step 3, up to rounding."""
    mine, theirs = events(run, "step"), events(whole, "step")[3:]
    assert [s["step"] for s in mine] == list(range(4, 11))
    assert [s["active_layers"] for s in mine] == [s["active_layers"] for s in theirs]
    assert [s["loss"] for s in mine] == pytest.approx([s["loss"] for s in theirs], abs=1e-5)


def test_zero_saves_deepspeeds_format_and_continues_to_the_bit(config, zero2):
    source = zero2 / "checkpoints" / "step-000003"
    manifest = read_manifest(source)
    assert manifest.kind == "deepspeed" and any(name.endswith("_optim_states.pt") for name in manifest.files)
    run = run_all(config, 2, "name=zero2-again", *ZERO2, "--resume", str(source))
    check_same_run(run, zero2)
    assert weights_of(run) == weights_of(zero2)


@pytest.mark.integration
def test_zero_saves_in_the_background_in_the_other_format(config):
    whole = run_all(config, 2, "name=zero3", *ZERO3, "train.checkpoint.format=dcp")
    assert read_manifest(whole / "checkpoints" / "step-000003").kind == "dcp"
    source = str(whole / "checkpoints" / "step-000003")
    run = run_all(config, 2, "name=zero3-again", *ZERO3, "--resume", source)
    assert weights_of(run) == weights_of(whole)


@pytest.mark.integration
def test_it_goes_on_under_another_backend(config, zero2, fsdp2):
    from_zero, from_fsdp2 = (str(run / "checkpoints" / "step-000003") for run in (zero2, fsdp2))
    micro = "train.micro_batch_size=1"
    check_same_run(run_all(config, 4, "name=z-f", micro, "train.eps=1e-6", "--resume", from_zero), zero2)
    check_same_run(run_all(config, 2, "name=f-z", *ZERO3, "--resume", from_fsdp2), fsdp2)


def test_a_checkpoint_is_converted_to_the_other_format_and_back(config, zero2, tmp_path):
    source = zero2 / "checkpoints" / "step-000003"
    done = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "dcp")])
    assert done.exit_code == 0, done.output
    made = tmp_path / "dcp" / "checkpoints" / "step-000003"
    assert read_manifest(made).kind == "dcp" and f"--resume {tmp_path / 'dcp'}" in done.output.replace("\n", "")
    check_same_run(run_all(config, 2, "name=converted", *SETTINGS, "--resume", str(tmp_path / "dcp")), zero2)
    name_what_must_not_be_loaded(made)
    ds_config = ["--ranks", "2", "--ds-config", str(config.parent / "zero2.json")]
    done = CliRunner().invoke(app, ["convert", str(made), str(tmp_path / "back"), *ds_config])
    assert done.exit_code == 0, done.output
    assert read_manifest(tmp_path / "back" / "checkpoints" / "step-000003").kind == "deepspeed"
    run = run_all(config, 2, "name=back", *ZERO2, "--resume", str(tmp_path / "back"))
    assert weights_of(run) == weights_of(zero2)  # there and back changes no bit
    again = CliRunner().invoke(app, ["convert", str(made), str(tmp_path / "back"), *ds_config])
    assert again.exit_code == 1 and "exists already" in again.output


@pytest.mark.integration
def test_a_conversion_to_the_files_of_zero3_changes_no_bit(config, fsdp2, tmp_path):
    source = Path(shutil.copytree(fsdp2 / "checkpoints" / "step-000003", tmp_path / "step-000003"))
    name_what_must_not_be_loaded(source)
    options = ["--ranks", "2", "--ds-config", str(config.parent / "zero3.json")]
    done = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "out"), *options])
    assert done.exit_code == 0, done.output
    made = open_checkpoint(tmp_path / "out" / "checkpoints" / "step-000003")
    assert made.manifest.kind == "deepspeed" and made.manifest.backend == "zero3"
    theirs, mine = open_checkpoint(source).tensors(), made.tensors()
    assert theirs.tensors.keys() <= mine.tensors.keys()
    for key, (numel, dtype) in theirs.tensors.items():
        assert mine.read(key, 0, torch.empty(numel, dtype=dtype)).equal(
            theirs.read(key, 0, torch.empty(numel, dtype=dtype))
        ), key


def name_what_must_not_be_loaded(made: Path) -> None:
    """As a checkpoint of somebody else's could: no name in it is asked for when its model is made."""
    state, config = json.loads((made / "state.json").read_text()), json.loads((made / "model/config.json").read_text())
    state["run"]["config"]["model"] |= {"name": "nobody/nothing", "trust_remote_code": True}
    config |= {"auto_map": {"AutoModelForCausalLM": "nobody/nothing--code.Model"}, "_name_or_path": "nobody/nothing"}
    (made / "state.json").write_text(json.dumps(state))
    (made / "model/config.json").write_text(json.dumps(config))
    reseal(made)


def test_a_format_that_the_backend_does_not_write_is_refused(config):
    ended = run_program([["--config", str(config), "name=refused", "train.checkpoint.format=deepspeed"]] * 2)
    check_refused(ended, r"train.checkpoint.format='deepspeed': parallel.backend=fsdp2 does not write")
