"""The recipes of docs/huggingface.md for LLaMA-Factory, ms-swift and axolotl.

Each needs versions of transformers and TRL of its own, so each is installed in an environment of its own, and its tests
are skipped elsewhere: PYTHON -m pytest integration_tests/test_run_recipes.py, with the Python of that environment.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from integration_tests.support.launched import BIN
from integration_tests.support.program import make_data, make_model
from integration_tests.support.ranks import free_port
from integration_tests.test_run import GRASS, ZERO, check_trained, run

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

LAYERS = 4
RUN = [sys.executable, "-m", "grass_dist.run"]


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


@pytest.fixture
def made(tmp_path) -> Path:
    """A folder with a model, the settings, and data for each kind of training."""
    config = AutoConfig.from_pretrained(make_model(tmp_path / "model", layers=LAYERS))
    config.tie_word_embeddings = False  # LLaMA-Factory cannot save a reward model with tied ones
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    rows = [json.loads(line) for line in make_data(tmp_path / "rows.jsonl").read_text().splitlines()]
    asked = [{"instruction": row["question"], "input": "", "output": row["answer"]} for row in rows]
    pairs = [{**row, "chosen": row["output"], "rejected": "one two"} for row in asked]
    for name, data in (("grass.yaml", GRASS), ("zero2.json", ZERO), ("asked.json", asked), ("pairs.json", pairs)):
        (tmp_path / name).write_text(json.dumps(data))
    return tmp_path


def in_words(settings: dict) -> str:
    return "\n".join(f"{name}: {json.dumps(value)}" for name, value in settings.items())


@needs("llamafactory")
@pytest.mark.parametrize("stage", ["sft", "dpo", "rm"])
@pytest.mark.parametrize("zero", [False, True], ids=["torchrun", "zero2"])
def test_llamafactory(stage, zero, made):
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    known = {
        "asked": {"file_name": "asked.json"},
        "pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns},
    }
    (made / "dataset_info.json").write_text(json.dumps(known))
    settings = {
        "model_name_or_path": str(made / "model"),
        "stage": stage,
        "do_train": True,
        "finetuning_type": "full",
        "dataset": "asked" if stage == "sft" else "pairs",
        "dataset_dir": str(made),
        "template": "default",
        "cutoff_len": 48,
        "output_dir": str(made / "out"),
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_gradient_checkpointing": True,
        "flash_attn": "disabled",
        **({"deepspeed": str(made / "zero2.json")} if zero else {}),
    }
    (made / "train.yaml").write_text(in_words(settings))
    command = [*RUN, "--config", str(made / "grass.yaml"), "llamafactory-cli", "train", str(made / "train.yaml")]
    two = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "MASTER_PORT": str(free_port())}
    check_trained(run(command, made, **two), LAYERS)


@needs("swift")
@pytest.mark.parametrize("plugin", [True, False], ids=["external_plugins", "run"])
def test_ms_swift(plugin, made):
    from grass_dist import plugins

    turns = ("instruction", "user"), ("output", "assistant")
    rows = [
        {"messages": [{"role": role, "content": row[name]} for name, role in turns]}
        for row in json.loads((made / "asked.json").read_text())
    ]
    (made / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model": str(made / "model"),
        "model_type": "llama",
        "template": "dummy",
        "dataset": str(made / "rows.jsonl"),
        "tuner_type": "full",
        "torch_dtype": "float32",
        "output_dir": str(made / "out"),
        "max_steps": "5",
        "per_device_train_batch_size": "2",
        "gradient_accumulation_steps": "1",
        "learning_rate": "1e-2",
        "logging_steps": "1",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": "true",
        "gradient_checkpointing": "false",
        "max_length": "48",
    }
    given = [part for name, value in settings.items() for part in (f"--{name}", value)]
    two = {"NPROC_PER_NODE": "2", "MASTER_PORT": str(free_port())}
    if plugin:
        command = [str(BIN / "swift"), "sft", *given, "--external_plugins", plugins.FOR_SWIFT]
        said = run(command, made, GRASS_CONFIG=str(made / "grass.yaml"), **two)
    else:
        said = run([*RUN, "--config", str(made / "grass.yaml"), "swift", "sft", *given], made, **two)
    check_trained(said, LAYERS)


@needs("axolotl")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="axolotl 0.19 loads no model without a GPU")
def test_axolotl(made):
    settings = {
        "base_model": str(made / "model"),
        "plugins": ["grass_dist.plugins.for_axolotl.GrassPlugin"],
        "grass": GRASS,
        "datasets": [{"path": str(made / "asked.json"), "ds_type": "json", "type": "alpaca"}],
        "dataset_prepared_path": str(made / "prepared"),
        "output_dir": str(made / "out"),
        "sequence_len": 64,
        "max_steps": 5,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "optimizer": "adamw_torch",
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "tf32": False,
    }
    (made / "train.yaml").write_text(in_words(settings))
    launcher = ["--launcher", "torchrun", "--", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command = [str(BIN / "axolotl"), "train", str(made / "train.yaml"), *launcher]
    check_trained(run(command, made, AXOLOTL_DO_NOT_TRACK="1"), LAYERS)
