"""`GrassReport`: the record of a Trainer's run is what the run did, and goes on or begins anew with it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
import yaml

import grass_dist
from grass_dist import GrassConfig, GrassReport, enable
from grass_dist.huggingface.logs import controller_of
from grass_dist.huggingface.report import reports_of
from grass_dist.report import RunRecord, build_report, load_run
from tests.trainers import llama, logged, rows, run_of, switched_off  # noqa: F401

pytestmark = pytest.mark.usefixtures("switched_off")

PROBE = 2
CONFIG = GrassConfig(active_layers=2, probe_steps=PROBE, sampling_interval=3, update_interval=3)


def reported(folder: Path, report=None, **more) -> transformers.Trainer:
    settings = {"max_steps": 6, "logging_steps": 1, "learning_rate": 1e-2, **more}
    return run_of(folder, callbacks=[report or GrassReport()], data=rows(24), **settings)


def trained(folder: Path, resume=None, **more) -> tuple[transformers.Trainer, RunRecord]:
    run = reported(folder, **more)
    run.train(resume_from_checkpoint=resume)
    return run, load_run(folder)


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_record_says_what_the_run_did(tmp_path):
    seen: list = []
    enable(CONFIG, observers=[seen.append])
    more = {"gradient_accumulation_steps": 2, "include_num_input_tokens_seen": "all", "warmup_steps": 2}
    more |= {"eval_strategy": "steps", "eval_steps": 3, "evaluated": rows()}
    run, record = trained(tmp_path, **more)
    assert [(s.step, s.phase) for s in record.steps] == [(i, "probe" if i <= PROBE else "train") for i in range(1, 9)]
    train = record.train_steps
    assert [s.loss for s in train] == logged(run, "loss") and [s.lr for s in train] == logged(run, "learning_rate")
    assert [s.grad_norm for s in train] == logged(run, "grad_norm")
    shown = [" ".join(map(str, s.active_layers)) for s in train]  # a log shows those of the step to come
    assert shown[1:] == logged(run, "grass/layers")[:-1]
    assert all(s.active_layers == (0, 1, 2, 3) and s.loss is None and s.lr == 0 for s in record.probe_steps)
    assert [s.tokens for s in train] == [2 * 2 * 6] * 6 and all(s.seconds > 0 for s in record.steps)
    assert train[-1].state_bytes + train[-1].host_state_bytes > 0
    assert [(e.step, e.importances) for e in record.refreshes] == [
        (e.step, e.importances) for e in seen if isinstance(e, grass_dist.Refreshed)
    ]
    drawn = [e for e in seen if isinstance(e, grass_dist.Sampled)]
    assert [(e.step, e.round, e.active_layers, e.probabilities, e.drawn_at) for e in record.samples] == [
        (e.step, e.round, e.active_layers, e.probabilities, e.drawn_at) for e in drawn
    ]
    assert len(drawn) == 3
    losses = [(row["step"] + PROBE, row["eval_loss"]) for row in run.state.log_history if "eval_loss" in row]
    assert [(e.step, e.loss) for e in record.evals] == losses and len(losses) == 2
    assert record.end and record.end.step == 8 and not record.notes


def test_run_json_and_config_say_what_trained(tmp_path):
    enable(CONFIG)
    run, record = trained(tmp_path, weight_decay=0.125)
    info, model = record.info, run.model
    assert (info.num_layers, info.layer_names[3]) == (4, "model.layers.3")
    assert info.params_total == model.num_parameters()
    assert info.layer_numel == (sum(p.numel() for p in model.model.layers[0].parameters()),) * 4
    assert info.params_always_active + sum(info.layer_numel) == info.params_total
    assert (info.backend, info.world_size, info.device, info.dtype) == ("single", 1, "cpu", "float32")
    assert info.train["max_steps"] == 8 and info.data == {"train_examples": 24}
    written = yaml.safe_load(record.config_text)
    assert GrassConfig(**written["grass"]) == CONFIG
    assert written["train"]["weight_decay"] == 0.125 and written["train"]["max_steps"] == 6


def test_losses_are_there_where_trainer_logs(tmp_path):
    enable(CONFIG)
    run, record = trained(tmp_path, logging_steps=5, max_steps=12)
    at = [row["step"] for row in run.state.log_history if "loss" in row]
    assert at == [1, 3, 5, 6, 9, 10, 12]  # the first and the switches too
    known = {s.step - PROBE: s.loss for s in record.steps if s.loss is not None}
    assert list(known) == at and list(known.values()) == logged(run, "loss")
    assert [s.lr for s in record.train_steps][::11] == pytest.approx([1e-2, 1e-2 / 12])
    page = build_report(tmp_path).read_text()
    assert (tmp_path / "plots" / "loss.png").exists() and "14" in page


def test_a_log_of_an_epoch_comes_after_an_evaluation(tmp_path):
    enable(CONFIG)
    more = {"logging_strategy": "epoch", "eval_strategy": "steps", "eval_steps": 3, "evaluated": rows()}
    run = reported(tmp_path, **more, max_steps=-1, num_train_epochs=1)
    run.train()
    assert logged(run, "loss")[-1] == load_run(tmp_path).steps[-1].loss and run.state.global_step == 12


def test_a_draw_before_the_loop_is_recorded(tmp_path):
    enable(GrassConfig(active_layers=2, sampler="uniform", sampling_interval=4))
    _, record = trained(tmp_path)
    assert [(e.step, e.round) for e in record.samples] == [(0, 0), (4, 1)]
    assert [s.active_layers for s in record.steps] == [record.samples[0].active_layers] * 4 + [
        record.samples[1].active_layers
    ] * 2
    assert record.samples[0].probabilities == (0.25,) * 4


def test_a_resumed_run_goes_on_with_its_record(tmp_path):
    enable(CONFIG)
    saving = {"save_strategy": "steps", "save_steps": 4}
    _, whole = trained(tmp_path, **saving)
    first = lines_of(tmp_path)
    _, record = trained(tmp_path, str(tmp_path / "checkpoint-4"), **saving)
    second = lines_of(tmp_path)
    kept = [line for line in first if line["step"] <= 4 + PROBE]
    assert second[: len(kept)] == kept  # to the byte: the rest is cut off
    assert [s.step for s in record.steps] == list(range(1, 9)) and len(second) == len(first)
    assert [s.loss for s in record.steps] == [s.loss for s in whole.steps]
    assert record.samples == whole.samples and record.refreshes == whole.refreshes
    longer = reported(tmp_path, max_steps=7)
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    ends = [line for line in lines_of(tmp_path) if line["event"] == "end"]
    assert [line["step"] for line in ends] == [9]


def test_a_run_from_another_folder_begins_a_record(tmp_path):
    enable(CONFIG)
    trained(tmp_path / "a", save_strategy="steps", save_steps=4)
    trained(tmp_path / "b")
    _, record = trained(tmp_path / "b", str(tmp_path / "a" / "checkpoint-4"))
    assert [s.step for s in record.steps] == [7, 8]
    grass = record.samples[0], record.refreshes[0]
    assert [e.step for e in grass] == [6, 6] and not any(math.isnan(x or 0) for x in grass[1].importances)
    assert record.samples[0].active_layers == record.steps[0].active_layers


def test_a_second_train_begins_the_record_anew(tmp_path):
    enable(CONFIG)
    run, first = trained(tmp_path)
    run.train()
    record = load_run(tmp_path)
    assert [s.phase for s in record.steps] == ["train"] * 6  # the probe is done
    assert [s.step for s in record.steps] == [3, 4, 5, 6, 7, 8] and record.end
    assert [e.step for e in record.samples] == [2, 5, 8] and {e.drawn_at for e in record.samples[1:]} == {3, 6}
    trained(tmp_path)
    again = load_run(tmp_path)
    assert [s.loss for s in again.steps] == [s.loss for s in first.steps]


def test_frozen_layers_keep_their_numbers_in_the_record(tmp_path):
    enable(CONFIG)
    model = llama()
    model.model.layers[1].requires_grad_(False)
    run = run_of(tmp_path, model, callbacks=[GrassReport()], data=rows(24), max_steps=6)
    run.train()
    record = load_run(tmp_path)
    assert record.info.num_layers == 4 and record.info.frozen_layers == (1,)
    assert record.probe_steps[0].active_layers == (0, 2, 3) and record.times_trained()[1] == 0
    event = record.refreshes[0]
    assert event.importances[1] is None and event.probabilities[1] == 0 and None not in event.importances[2:]
    assert {x for e in record.samples for x in e.active_layers} <= {0, 2, 3}


# --- what is in the way


def test_the_layers_of_both_stacks_are_in_the_record(tmp_path):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 3}
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)
    )
    enable(GrassConfig(active_layers=1, probe_steps=0, sampling_interval=1))
    run_of(tmp_path, model, callbacks=[GrassReport()], max_steps=4).train()
    names = load_run(tmp_path).info.layer_names
    assert names == tuple(f"{s}.block.{i}" for s, n in (("encoder", 2), ("decoder", 3)) for i in range(n))


@pytest.mark.parametrize("file", ["run.json", "metrics.jsonl"])
def test_the_record_of_another_program_is_left_alone(file, tmp_path, caplog):
    enable(CONFIG)
    (tmp_path / file).write_text('{"name": "finetuned"}\n')
    run = reported(tmp_path)
    run.train()
    assert run.state.global_step == 6 and (tmp_path / file).read_text() == '{"name": "finetuned"}\n'
    assert {path.name for path in tmp_path.iterdir()} == {file}
    told = [message for message in caplog.messages if "GrassReport" in message]
    assert told == [
        f"GrassReport in {tmp_path}: its {file} is of another program; choose another output_dir, or remove it; the "
        "run goes on, and is not recorded."
    ]


def test_a_config_of_the_user_is_left_alone(tmp_path):
    enable(CONFIG)
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    _, record = trained(tmp_path)
    assert record.config_text == "mine: 1\n" and len(record.steps) == 8


FULL = """
import resource, sys
from tests.trainers import run_of, rows
import grass_dist

grass_dist.enable(grass_dist.GrassConfig(active_layers=2, probe_steps=1))
run = run_of(sys.argv[1], callbacks=[grass_dist.GrassReport()], data=rows(24), max_steps=6)
def fill(event):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, -1))  # as a disk that is full after the probe
grass_dist.huggingface.switch.Switch.observers = [fill]
run.train()
print("trained", run.state.global_step)
"""


def test_a_full_disk_is_told_once_and_costs_nothing(tmp_path):
    argv = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[1])
    assert done.stdout.splitlines()[-1] == "trained 6", done.stderr[-2000:]
    told = [line for line in done.stderr.splitlines() if "metrics.jsonl" in line]
    assert len(told) == 1 and "the run goes on, and not all of it is recorded there from step" in told[0], done.stderr


def test_a_folder_that_cannot_be_made_is_told(tmp_path, caplog):
    enable(CONFIG)
    run = reported(tmp_path / "run")
    (tmp_path / "run").rmdir() if (tmp_path / "run").is_dir() else None
    (tmp_path / "run").write_text("a file")
    run.train()
    assert run.state.global_step == 6
    assert [m for m in caplog.messages if m.startswith(f"GrassReport in {tmp_path / 'run'}: ")] != []


def test_without_grass_one_sentence_says_so(tmp_path, caplog):
    run = reported(tmp_path)
    run.train()
    assert (
        caplog.messages.count(
            "nothing trains by GRASS here, so GrassReport records nothing; call grass_dist.enable first."
        )
        == 1
    )
    assert not (tmp_path / "run.json").exists()


# --- one without a line in the script


def test_enable_gives_each_trainer_one_report(tmp_path):
    enable(CONFIG, report=True)
    run = run_of(tmp_path / "a", data=rows(24), max_steps=2)
    run.train()
    run.train()
    assert len(reports_of(run)) == 1 and len(load_run(tmp_path / "a").steps) == 2
    own = reported(tmp_path / "b", max_steps=2)
    own.train()
    assert len(reports_of(own)) == 1
    enable(CONFIG)
    plain = run_of(tmp_path / "c", data=rows(24), max_steps=2)
    plain.train()
    assert not reports_of(plain)


def test_the_class_is_a_callback_and_may_be_derived_from(tmp_path):
    class Mine(GrassReport):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            self.last = state.global_step

    report = Mine()
    assert isinstance(report, transformers.TrainerCallback) and isinstance(report, GrassReport)
    enable(CONFIG)
    run = run_of(tmp_path, callbacks=[report, transformers.PrinterCallback], data=rows(24), max_steps=2)
    run.train()
    assert report.last == 2 and len(load_run(tmp_path).steps) == controller_of(run).step == PROBE + 2
    assert report._run and report._run._trains is None  # which another train may replace
    run.evaluate(rows())
    assert load_run(tmp_path).evals[0].step == PROBE + 2  # after the training, too


SCRIPT = """
import sys
import grass_dist
if "own" in sys.argv:
    grass_dist.enable(grass_dist.GrassConfig(active_layers=3))
from tests.trainers import run_of, rows
run = run_of(sys.argv[1], data=rows(24), max_steps=3)
run.train()
"""


@pytest.mark.parametrize("own", [[], ["own"]], ids=["by the command", "by the script too"])
def test_the_command_records_a_script_unchanged(own, tmp_path):
    (script := tmp_path / "script.py").write_text(SCRIPT)
    run = ["-m", "grass_dist.run", "--active-layers", "2", "--report", str(script), str(tmp_path / "o"), *own]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, *run], capture_output=True, text=True, timeout=200, env=environ)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"GRASS: grass-dist report {tmp_path / 'o'} makes the report of this run." in done.stderr
    record = load_run(tmp_path / "o")
    assert len(record.train_steps) == 3 and record.info.grass["active_layers"] == 2 + len(own)
