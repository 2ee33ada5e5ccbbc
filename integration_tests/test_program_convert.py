"""A fine-tune that moves between DeepSpeed ZeRO and the other backends, by --resume and by grass-dist convert."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from grass_dist.checkpoint.files import read_manifest
from grass_dist.cli import app
from integration_tests.support.program import check_refused, events, run_all, run_program

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


def test_a_checkpoint_is_converted_to_the_other_format(config, zero2, tmp_path):
    source = zero2 / "checkpoints" / "step-000003"
    done = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "dcp")])
    assert done.exit_code == 0, done.output
    made = tmp_path / "dcp" / "checkpoints" / "step-000003"
    assert read_manifest(made).kind == "dcp" and f"--resume {tmp_path / 'dcp'}" in done.output.replace("\n", "")
    check_same_run(run_all(config, 2, "name=converted", *SETTINGS, "--resume", str(tmp_path / "dcp")), zero2)


def test_a_format_that_the_backend_does_not_write_is_refused(config):
    ended = run_program([["--config", str(config), "name=refused", "train.checkpoint.format=deepspeed"]] * 2)
    check_refused(ended, r"train.checkpoint.format='deepspeed': parallel.backend=fsdp2 does not write")
