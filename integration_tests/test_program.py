"""launch/finetune.py as a user starts it: that it trains the same on any ranks, and how it refuses bad input."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from integration_tests.support.program import (
    ROOT,
    check_refused,
    events,
    make_model,
    run_all,
    run_program,
)

pytestmark = pytest.mark.timeout(300)

LAYER_STATE = 8 * 10304 // 2
"""Bytes of a layer's two moments in fp32, on one of two ranks: 4 × 32² + 3 × 32 × 64 + 2 × 32 parameters."""


@pytest.fixture(scope="module")
def two_ranks(config):
    return run_all(config, 2, "name=two")


def test_a_run_leaves_a_record_a_report_and_a_model(two_ranks, config):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    steps = events(two_ranks, "step")
    assert [s["step"] for s in steps] == list(range(1, 11))
    assert [s["phase"] for s in steps] == ["probe"] * 2 + ["train"] * 8
    assert [s["lr"] > 0 for s in steps] == [False] * 2 + [True] * 8
    evals = events(two_ranks, "eval")
    assert [e["step"] for e in evals] == [0, 5, 10] and evals[-1]["loss"] < 0.8 * evals[0]["loss"]
    assert [e["step"] for e in events(two_ranks, "sample")] == [2, 4, 6, 8, 10]
    assert [e["drawn_at"] for e in events(two_ranks, "sample")] == [2, 3, 5, 7, 9]  # T_s = 2 leaves one step for it
    assert [e["step"] for e in events(two_ranks, "refresh")] == [2, 5, 9]
    assert [a["when"] for a in events(two_ranks, "answer")] == ["before", "after"]
    # Two slots and the one that new layers come into; then the roles' states too.
    assert steps[0]["state_bytes"] == 3 * LAYER_STATE < steps[2]["state_bytes"]
    for step in steps:
        assert len(step["active_layers"]) == (6 if step["phase"] == "probe" else 2)
    assert (two_ranks / "report.html").stat().st_size > 50_000
    assert {p.stem for p in (two_ranks / "plots").glob("*.png")} >= {
        "loss",
        "importance",
        "probability",
        "counts",
        "cost",
        "moves",
    }
    model = AutoModelForCausalLM.from_pretrained(two_ranks / "model")
    assert model.config.architectures == ["LlamaForCausalLM"] and model.dtype == torch.float32
    start = AutoModelForCausalLM.from_pretrained(config.parent / "model").state_dict()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    trained = {i for s in steps[2:] for i in s["active_layers"]}
    assert {int(n.split(".layers.")[1].split(".")[0]) for n in moved if ".layers." in n} == trained
    assert AutoTokenizer.from_pretrained(two_ranks / "model")("ann has one")["input_ids"]
    assert list((two_ranks / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, ["parallel=single", "name=single"]),
        pytest.param(1, ["name=fsdp-alone", "train.micro_batch_size=4"], marks=pytest.mark.integration),
        (2, ["parallel=ddp", "name=ddp", "train.micro_batch_size=1"]),
        pytest.param(4, ["name=hsdp", "parallel.mesh.replicate=2"], marks=pytest.mark.integration),
    ],
    ids=lambda v: str(v),
)
def test_the_trajectory_does_not_depend_on_the_ranks(two_ranks, config, world_size, overrides):
    other = run_all(config, world_size, *overrides, "save_model=false")
    mine, theirs = events(two_ranks, "step"), events(other, "step")
    assert [s["active_layers"] for s in mine] == [s["active_layers"] for s in theirs]
    assert [s["tokens"] for s in mine] == [s["tokens"] for s in theirs]
    assert [s["loss"] for s in mine] == pytest.approx([s["loss"] for s in theirs], abs=2e-4)
    assert events(two_ranks, "eval")[-1]["loss"] == pytest.approx(events(other, "eval")[-1]["loss"], abs=2e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["name=packed", "data.packing=true"], marks=pytest.mark.integration),
        ["name=stream", "data.streaming=true", "data.eval_examples=4"],
        ["name=bf16", "model.dtype=bfloat16", "model.activation_checkpointing=true", "train.schedule=linear"],
        pytest.param(
            ["name=lisa", "grass.sampler=uniform", "grass.probe_steps=0", "grass.always_active=[]"],
            marks=pytest.mark.integration,
        ),
    ],
    ids=lambda v: v[0],
)
def test_options_train(config, overrides):
    run = run_all(config, 2, *overrides, "save_model=false")
    losses = [e["loss"] for e in events(run, "eval")]
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0]


def trained_before(rounds, number):
    """Layers that have a state when round ``number`` begins."""
    return {layer for layers in rounds[:number] for layer in layers}


def test_states_move_at_the_switches_and_the_metrics_count_them(two_ranks):
    rounds = [set(e["active_layers"]) for e in events(two_ranks, "sample")]  # the last one is drawn and does not train
    steps = events(two_ranks, "step")
    leaving = [len(old - new) for old, new in itertools.pairwise(rounds)]
    returning = [len((new - rounds[i]) & trained_before(rounds, i + 1)) for i, new in enumerate(rounds[1:])]
    assert sum(returning) > 0, "no layer comes back, so nothing is checked"
    assert sum(s["bytes_to_device"] for s in steps) == LAYER_STATE * sum(returning)
    # The way out begins in the last step before a switch, which is every second one.
    assert [s["bytes_to_host"] for s in steps] == [0, 0, *(n * LAYER_STATE for out in leaving for n in (0, out))]
    assert all(s["bytes_to_device"] == s["bytes_to_host"] == s["transfer_seconds"] == 0 for s in steps[:3])
    assert sum(s["transfer_seconds"] for s in steps) > 0 and all(s["wait_seconds"] >= 0 for s in steps)
    # All that have trained are on the device or in host memory, and those of the next layers are on the device.
    at_rest = trained_before(rounds, len(rounds) - 1) - rounds[-1]
    assert steps[-1]["host_state_bytes"] == LAYER_STATE * len(at_rest)
    assert "of the copying time ran beside the compute" in (two_ranks / "report.html").read_text()


def test_streamed_states_move_at_every_step(config):
    streamed = ["grass.offload.mode=stream", "grass.offload.slots=2", "grass.active_layers=3", "save_model=false"]
    run = run_all(config, 2, "name=streamed", *streamed)
    rounds = [e["active_layers"] for e in events(run, "sample")]
    steps = events(run, "step")
    assert [s["bytes_to_host"] for s in steps] == [0] * 2 + [3 * LAYER_STATE] * 8
    came = sum(layer in trained_before(rounds, i) for i, layers in enumerate(rounds[:-1]) for layer in layers)
    came += sum(len(layers) for layers in rounds[:-1])  # the second step of each round: all three
    early = sorted(rounds[-1], reverse=True)[:2]  # those that a further step would update first
    came += sum(layer in trained_before(rounds, len(rounds) - 1) for layer in early)
    assert sum(s["bytes_to_device"] for s in steps) == LAYER_STATE * came
    assert max(s["state_bytes"] for s in steps) < 3 * LAYER_STATE  # two slots and the roles
    assert [s["active_layers"] for s in steps[2::2]] == rounds[:-1]


def test_states_that_stay_do_not_move(config):
    run = run_all(config, 2, "name=resident", "grass.offload.mode=none", "save_model=false")
    steps = events(run, "step")
    for name in ("bytes_to_device", "bytes_to_host", "transfer_seconds", "wait_seconds", "host_state_bytes"):
        assert {s[name] for s in steps} == {0}, name
    assert steps[1]["state_bytes"] == 0 < steps[2]["state_bytes"] < steps[-1]["state_bytes"]
    assert "No optimizer state moved" in (run / "report.html").read_text()


BAD = {
    "a wrong key": (["train.learning_rte=1"], r"train.learning_rte=1: there is no such setting; .*'learning_rate'"),
    "a wrong type": (["train.max_steps=ten"], r"train.max_steps='ten': this value cannot be used"),
    "a wrong mode": (["grass.offload.mode=steam"], r"grass.offload.mode='steam': .* it should be 'interval', 'stream'"),
    "too many layers": (["grass.active_layers=7"], r"grass.active_layers=7: the model has 6 layers; use 1 to 6"),
    "an unknown sampler": (["grass.sampler=gras"], r"grass.sampler='gras': there is no such sampler; use one of"),
    "a missing column": (["data.prompt=questoin"], r"data.prompt='questoin': there is no column .*question, answer"),
    "a missing dataset": (["data.name=nothing.jsonl"], r"data.name='nothing.jsonl'"),
    "a missing model": (["model.name=/nowhere/at/all"], r"model.name='/nowhere/at/all': it cannot be loaded"),
    "a batch that does not divide": (["train.global_batch_size=6"], r"train.global_batch_size=6: .*; use 4 or 8"),
    "one process for two ranks": (["parallel=single"], r"parallel.backend='single': 2 ranks were started"),
    "a probe without training": (["grass.probe_steps=10"], r"train.max_steps=10: the probe takes 10 steps"),
    "a probe without training by default": (
        ["train.max_steps=8", "grass.probe_steps=null"],
        r"train.max_steps=8: the probe takes 8 steps and nothing would be trained",
    ),
    "a layer stack that is not there": (["grass.layers=model.blocks"], r"grass.layers='model.blocks': "),
    "an override without a value": (["train.max_steps"], r"override='train.max_steps': it is not of the form"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_every_rank_with_one_sentence(config, case):
    overrides, message = BAD[case]
    check_refused(run_program([["--config", str(config), "name=bad", *overrides]] * 2), message)


def test_an_empty_dataset(config, folder):
    (folder / "empty.jsonl").write_text("")
    argv = ["--config", str(config), "name=bad", f"data.name={folder / 'empty.jsonl'}"]
    check_refused(run_program([argv] * 2), r"data.name=")


def test_a_model_without_layers(config, folder):
    make_model(folder / "one_layer", layers=1)
    argv = ["--config", str(config), "name=bad", f"model.name={folder / 'one_layer'}", "grass.active_layers=1"]
    check_refused(run_program([argv] * 2), r"layers=")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("grass.seed=1", r"grass.seed is 1 on rank 1 and 0 on rank 0"),
        ("train.learning_rate=0.1", r"train.learning_rate is 0.1 on rank 1 and 0.005 on rank 0"),
    ],
)
def test_ranks_started_with_different_settings(config, setting, message):
    common = ["--config", str(config), "name=bad"]
    check_refused(run_program([common, [*common, setting]]), message)


def test_a_setting_that_is_bad_on_one_rank_only_ends_all(config):
    common = ["--config", str(config), "name=bad"]
    check_refused(run_program([common, [*common, "grass.gamma=3"]]), r"rank 1: grass.gamma=3: there is no such setting")


def test_an_earlier_run_is_not_written_over(config, two_ranks):
    before = (two_ranks / "metrics.jsonl").read_bytes()
    check_refused(run_program([["--config", str(config), "name=two"]] * 2), r"name='two': .*holds an earlier run")
    assert (two_ranks / "metrics.jsonl").read_bytes() == before


def test_torchrun_starts_it(config):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = ["name=torchrun", "train.max_steps=4"]
    command = [*torchrun, str(ROOT / "launch" / "finetune.py"), "--config", str(config), *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "report: " in done.stdout and "step 4/4" in done.stdout
    tool = str(Path(sys.executable).parent / "grass-dist")
    failed = subprocess.run(
        [*torchrun, "--no-python", tool, "train", str(config), *settings, "overwrite=true", "grass.active_layers=99"],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
    )
    assert failed.returncode != 0 and failed.stderr.count("error: grass.active_layers=99") == 1
    assert len(events(config.parent / "runs" / "torchrun", "step")) == 4  # the earlier run is still there
