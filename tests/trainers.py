"""Small Trainers for tests of `enable`, and a fixture that undoes it."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import transformers
from accelerate.state import AcceleratorState, GradientState

from grass_dist import GrassConfig, disable

CONFIG = GrassConfig(active_layers=2, probe_steps=1, sampling_interval=2, update_interval=2)


@pytest.fixture
def switched_off():
    """All is undone after a test."""
    yield
    disable()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def llama(**more):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=4, **more))


def rows(count=8):
    return [{"input_ids": row, "labels": row} for row in torch.arange(count * 6).view(count, 6) % 32]


class Seeing(transformers.Trainer):
    """Keeps the micro-batches that it is given; not in an attribute of its own, since a probe puts those back."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        SEEN.append((inputs["input_ids"].clone(), num_items_in_batch))
        return super().training_step(model, inputs, num_items_in_batch)


SEEN: list = []


def run_of(folder, model=None, kind=transformers.Trainer, data=None, callbacks=(), evaluated=None, **more):
    """A Trainer of 8 rows, 2 a step."""
    settings = {"per_device_train_batch_size": 2, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    args = transformers.TrainingArguments(str(folder), use_cpu=True, **{**settings, **more})
    given = {"train_dataset": data or rows(), "eval_dataset": evaluated, "callbacks": list(callbacks)}
    return kind(model or llama(), args, **given)


def logged(run, key):
    """Values of ``key`` in the rows of the training log."""
    return [row.get(key) for row in run.state.log_history if "loss" in row]
