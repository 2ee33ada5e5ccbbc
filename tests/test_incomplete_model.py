"""A model whose files lack a weight is refused by the weight's name, and does not train random numbers unasked."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from grass_dist.errors import ConfigError
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.setup import load_model

NORM, DOWN = "model.layers.1.input_layernorm.weight", "model.layers.2.mlp.down_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def folder_without(folder: Path, *names: str, tied: bool = False) -> RunConfig:
    """A run of a small model, in whose files there are all weights but ``names``."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=tied, **sizes, **heads)).save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file({name: each for name, each in weights.items() if name not in names}, file, metadata={"format": "pt"})
    return RunConfig.model_validate(
        {
            "model": {"name": str(folder), "dtype": "float32"},
            "data": {"name": "x.jsonl", "prompt": "q", "completion": "a"},
            "train": {"max_steps": 4},
            "grass": {"active_layers": 1, "probe_steps": 1},
        }
    )


def load(config: RunConfig) -> Any:
    return load_model(config, torch.device("cpu"))


def test_a_missing_weight_is_named(tmp_path):
    with pytest.raises(ConfigError) as error:
        load(folder_without(tmp_path, NORM))
    assert str(error.value).endswith(
        f": its files lack {NORM}, which would begin at random; complete the model's files, or set "
        "model.allow_missing_weights=true to train it so."
    )
    assert error.value.field == "model.name"


def test_some_of_many_missing_weights_are_named(tmp_path):
    norms = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(4)]
    with pytest.raises(ConfigError, match=f"its files lack {HEAD}, {norms[0]}, {norms[1]} and 3 more, which"):
        load(folder_without(tmp_path, HEAD, DOWN, *norms))


def test_a_missing_weight_is_allowed_if_asked_for(tmp_path, caplog):
    config = folder_without(tmp_path, DOWN)
    config = config.model_copy(update={"model": config.model.model_copy(update={"allow_missing_weights": True})})
    with caplog.at_level(logging.WARNING, "grass_dist"):
        assert load(config).get_parameter(DOWN).isfinite().all()
    assert f"lack {DOWN}: these weights begin at random" in caplog.text


def test_a_tied_head_is_not_missing(tmp_path):
    assert HEAD not in load_file(folder_without(tmp_path, tied=True).model.name + "/model.safetensors")
    model = load(folder_without(tmp_path, tied=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(ConfigError, match=f"its files lack {HEAD}, {EMBEDDING}, which"):
        load(folder_without(tmp_path, EMBEDDING, tied=True))


UNDER_ZERO3 = """
import sys
import torch.distributed as dist
from transformers.integrations import HfDeepSpeedConfig
import deepspeed
from grass_dist.backends.zero.jit import spare_the_compiler
from tests.test_incomplete_model import *

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
spare_the_compiler({})
deepspeed.init_distributed(dist_backend="gloo")
known = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_batch_size": 1})
folder = Path(sys.argv[1])
for names, tied in [((), False), ((), True), ((DOWN,), False), ((EMBEDDING,), True)]:
    del known
    config = folder_without(folder, *names, tied=tied)
    known = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_batch_size": 1})
    try:
        print("loaded", hasattr(load(config).get_parameter(DOWN), "ds_shape"))
    except ConfigError as error:
        print("refused", error.problem)
"""


def test_under_zero3_too(tmp_path):
    pytest.importorskip("deepspeed")
    environ = {**os.environ, "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    command = [sys.executable, "-c", UNDER_ZERO3, str(tmp_path)]
    done = subprocess.run(
        command, env=environ, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120
    )
    said = [line for line in done.stdout.splitlines() if line.startswith(("loaded", "refused"))]
    assert said == [
        "loaded True",
        "loaded True",
        f"refused its files lack {DOWN}, which would begin at random",
        f"refused its files lack {HEAD}, {EMBEDDING}, which would begin at random",
    ], done.stderr[-2000:]
