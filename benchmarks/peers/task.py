"""The task: arithmetic word problems with worked answers, the kind that the paper trains on; and how it is judged."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from grass_dist.finetune.data.batches import collate
from grass_dist.finetune.data.config import DataConfig
from grass_dist.finetune.data.loading import Data, load_data, render_prompt
from grass_dist.model.packaged import resolve_model

MAX_LENGTH, HELD_OUT = 96, 64
ANSWER_TOKENS, AT_ONCE = 52, 50
TESTS = ("multiarith_test.json", "addsub_test.json")


def load_tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(model))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_model(model: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(resolve_model(model), dtype=torch.float32).train()


def training_data(file: Path, tokenizer: Any) -> Data:
    """Problems as plain text, a loss on the worked answer alone; the held-out ones are the same for all seeds.

    Longer problems than ``MAX_LENGTH`` tokens are left out, so that no answer is cut off.
    """
    config = DataConfig(
        name=str(file),
        prompt="{instruction}",
        completion="output",
        chat_template=False,
        max_length=MAX_LENGTH + 1,
        eval_examples=8 * HELD_OUT,
    )
    data = load_data(config, tokenizer, 0)
    train, held_out = ([e for e in some if len(e["input_ids"]) <= MAX_LENGTH] for some in (data.train, data.held_out))
    assert len(held_out) >= HELD_OUT, f"{file}: only {len(held_out)} held-out problems have up to {MAX_LENGTH} tokens"
    return replace(data, train=train, held_out=held_out[:HELD_OUT])


def batches(data: Data, tokenizer: Any, seed: int, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Global batches without end, in an order that depends on ``seed`` alone: all methods of a seed train on the same.

    Args:
        size: problems in a batch.
    """
    for epoch in itertools.count(1):
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(data.train))
        for first in range(0, len(order) - size + 1, size):
            yield collate([data.train[int(i)] for i in order[first : first + size]], tokenizer.pad_token_id)


def on_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


@torch.no_grad()
def held_out_loss(model: nn.Module, data: Data, tokenizer: Any, device: torch.device) -> float:
    """Mean over the labelled tokens."""
    total, count = 0.0, 0
    for first in range(0, len(data.held_out), 8):
        batch = collate(
            [data.held_out[i] for i in range(first, min(first + 8, len(data.held_out)))], tokenizer.pad_token_id
        )
        labels = int((batch["labels"][:, 1:] != -100).sum())
        with torch.autocast(device.type, torch.bfloat16):
            total += model(**on_device(batch, device), use_cache=False).loss.item() * labels
        count += labels
    return total / count


@torch.no_grad()
def accuracy(model: nn.Module, tokenizer: Any, file: Path, questions: int) -> float:
    """Share of the first ``questions`` problems of a test set whose greedy answer gives the right number."""
    rows = json.loads(file.read_text())[:questions]
    right = 0
    for first in range(0, len(rows), AT_ONCE):
        some = rows[first : first + AT_ONCE]
        prompts = [render_prompt(tokenizer, row["instruction"], False) for row in some]
        width = max(map(len, prompts))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
        right += sum(is_right(text, row["answer"]) for text, row in zip(texts, some, strict=True))
    return right / len(rows)


def is_right(text: str, answer: str) -> bool:
    """By the number after the first "answer is", else by the last number."""
    said = re.search(r"answer is\s*\$?\s*(-?[\d,]*\.?\d+)", text)
    numbers = [said[1]] if said else re.findall(r"-?\d[\d,]*\.?\d*", text)
    try:
        return bool(numbers) and abs(float(numbers[-1].replace(",", "").rstrip(".")) - float(answer)) < 1e-3
    except ValueError:
        return False
