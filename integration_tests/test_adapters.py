"""Adapters beside drawn layers on every backend: the same weights as one process that is written out by hand."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import grass_dist
from integration_tests.support.lora import SETTINGS, STEPS, with_lora
from integration_tests.support.model import ADAMW, small_llama, wrapped
from integration_tests.support.parity import check_parity
from integration_tests.support.program import events, run_all, run_program
from integration_tests.support.ranks import refused
from integration_tests.support.reference import run_reference
from integration_tests.support.scenarios import FOUR, TWO, Spawn, scenarios
from integration_tests.support.training import train_grass

pytest.importorskip("peft")
pytestmark = [pytest.mark.timeout(420), pytest.mark.long]

ZERO = Spawn(2, before=gc.freeze, timeout=400)


@pytest.fixture(scope="module")
def reference():
    return run_reference(SETTINGS, STEPS, make=with_lora)


def trained(rank: int, world_size: int, backend: str, offload: dict | None = None, **how: Any) -> dict[str, Any]:
    settings = SETTINGS if offload is None else {**SETTINGS, "offload": offload}
    return train_grass(rank, world_size, backend, settings, STEPS, **how)


def with_zero(rank: int, world_size: int, stage: int, **how: Any) -> dict[str, Any]:
    from integration_tests.support.zero import train_zero

    return train_zero(rank, world_size, stage, SETTINGS, STEPS, **how)


@scenarios(
    TWO(trained, "fsdp2"),
    TWO(trained, "fsdp2", {"mode": "stream"}, sync_every_micro_batch=False),
    TWO(trained, "ddp"),
    TWO(trained, "ddp", {"mode": "none"}, accumulation=1, sync_every_micro_batch=False),
    TWO(trained, "ddp", {"weights": "host"}),
    FOUR(trained, "hsdp"),
    *(ZERO(with_zero, stage) for stage in (1, 2, 3)),
)
def test_ranks_are_one_process(runs, reference):
    check_parity(runs, reference)


def wrapped_without(rank: int, world_size: int, backend: str) -> str:
    model = wrapped(small_llama(), backend, world_size)
    return refused(lambda: grass_dist.GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=dict(SETTINGS)))


@scenarios(TWO(wrapped_without, "fsdp2"), TWO(wrapped_without, "ddp"))
def test_a_wrapped_model_has_its_adapters_by_then(runs):
    for sentence in runs:
        assert sentence.startswith("ConfigError: grass.adapters=") and "has no adapters, which come before" in sentence
        assert sentence.endswith("call grass_dist.add_adapters(model, config) before you wrap it.")


# The program: it saves, goes on with other ranks, and writes an ordinary folder.

LORA = [f"grass.adapters.{name}={value}" for name, value in SETTINGS["adapters"].items()]
SAVE = ["train.eps=1e-6", "train.checkpoint.every=6", "train.checkpoint.keep=5"]


@pytest.fixture(scope="module")
def whole(config) -> Path:
    """A run of two ranks under FSDP2, saved after 6 and all 10 steps."""
    return run_all(config, 2, "name=whole", *LORA, *SAVE)


def check_same(run: Path, whole: Path) -> None:
    from safetensors.torch import load_file

    mine, theirs = events(run, "step"), events(whole, "step")[-len(events(run, "step")) :]
    assert [s["active_layers"] for s in mine] == [s["active_layers"] for s in theirs]
    assert [s["loss"] for s in mine] == pytest.approx([s["loss"] for s in theirs], abs=2e-4)
    ours, wanted = (load_file(r / "model" / "model.safetensors") for r in (run, whole))
    assert ours.keys() == wanted.keys() and not any("lora" in name or "base_layer" in name for name in ours)
    assert max((ours[n] - p).abs().max().item() for n, p in wanted.items()) < 1e-4


def test_the_program_writes_a_merged_model_and_a_record(whole, tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(whole / "model")
    facts = json.loads((whole / "run.json").read_text())
    adapters = sum(4 * sum(m.weight.shape) for n, m in model.named_modules() if n.endswith("proj"))
    assert facts["layer_numel"] == [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    assert facts["params_total"] == sum(p.numel() for p in model.parameters()) + adapters
    assert "adapters" in facts["trains"]["told"] and len(facts["trains"]["roles"]["adapters"]) == 2 * 7 * 6
    code = "from grass_dist.cli import app; app()"
    command = [sys.executable, "-c", code, "export", str(whole), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "out", whole / "model"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (1, ["parallel=single"]),
        (2, ["parallel=ddp"]),
        (2, ["parallel=deepspeed", "parallel.config=zero3.json"]),
    ],
    ids=lambda v: str(v),
)
def test_a_run_goes_on_with_other_ranks_and_backends(config, whole, ranks, parallel):
    saved = whole / "checkpoints" / "step-000006"
    name = f"then-{ranks}-{parallel[0].partition('=')[2]}"
    given = ["--config", str(config), f"name={name}", "--resume", str(saved), *LORA, *SAVE, *parallel]
    ended = run_program([given] * ranks, timeout=200)
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
    check_same(whole.with_name(name), whole)


@pytest.mark.parametrize("stage", [2, 3])
def test_under_zero_the_program_trains_saves_and_goes_on(config, whole, stage):
    parallel = ["parallel=deepspeed", f"parallel.config=zero{stage}.json"]
    name = f"zero{stage}"
    run = run_all(config, 2, f"name={name}", *parallel, *LORA, *SAVE, timeout=200)
    check_same(run, whole)
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step-000010")
    given = ["--config", str(config), f"name={name}", "--resume", "auto", *parallel, *LORA, *SAVE]
    ended = run_program([given] * 2, timeout=200)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    check_same(run, whole)
