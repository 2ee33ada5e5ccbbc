"""TRL's online trainer begins, after the probe, as it begins without GRASS: with the same completions and rewards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import grass_dist
from grass_dist.huggingface.logs import controller_of

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

STEPS, PROBE, WORDS = 4, 2, 100
trl = pytest.importorskip("trl")
SIZES = {"vocab_size": WORDS + 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
GRASS = grass_dist.GrassConfig(active_layers=2, probe_steps=PROBE, sampling_interval=2, update_interval=2)


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<end>": WORDS} | {str(n): n for n in range(WORDS)}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")


def even_words(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(int(word) % 2 == 0 for word in text.split() if word.isdigit())) for text in completions]


def trained(folder, accumulation: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_hidden_layers=4, eos_token_id=WORDS, pad_token_id=WORDS)
    # Each batch of completions is used for several steps, by counters that the probe moves too.
    reuse = {"num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": accumulation}
    args = trl.GRPOConfig(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=8, num_generations=4, use_cpu=True,
        max_completion_length=6, learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, bf16=False, **reuse,
    )  # fmt: skip
    prompts = Dataset.from_dict({"prompt": [" ".join(str((n + i) % WORDS) for i in range(4)) for n in range(WORDS)]})
    model = LlamaForCausalLM(config)
    run = trl.GRPOTrainer(model, even_words, args=args, train_dataset=prompts, processing_class=tokenizer())
    run.train()
    return run


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.long), 2])
def test_grpo_begins_after_the_probe_as_without_it(accumulation, tmp_path):
    stock = trained(tmp_path / "stock", accumulation)
    grass_dist.enable(GRASS)
    try:
        run = trained(tmp_path / "grass", accumulation)
        grass = controller_of(run)
    finally:
        grass_dist.disable()
    assert grass is not None and (grass.step, run.state.global_step) == (STEPS + PROBE, STEPS)
    rows, expected = ([row for row in trainer.state.log_history if "loss" in row] for trainer in (run, stock))
    seen = ("loss", "reward", "num_tokens", "learning_rate", "completions/mean_length")
    assert {key: rows[0].get(key) for key in seen} == {key: expected[0].get(key) for key in seen}
    assert [row["learning_rate"] for row in rows] == [row["learning_rate"] for row in expected]
    assert [row.get("num_tokens") for row in rows] == [row.get("num_tokens") for row in expected]
    assert len({row["grass/layers"] for row in rows}) > 1
