"""Sequence classification: one label for a text, or for a pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DataCollatorWithPadding

from grass_dist.finetune.answers import asked
from grass_dist.finetune.data.batches import Example
from grass_dist.finetune.data.config import fill_template
from grass_dist.finetune.data.json_lines import Row
from grass_dist.finetune.tasks.base import Batch, Predictions, inputs_of
from grass_dist.finetune.tasks.causal_lm import first_pair
from grass_dist.finetune.tasks.labels import LabelTask, collated


class SequenceClassification(LabelTask):
    """Cross entropy over the rows; accuracy, and F1 as the mean over the labels."""

    auto = "AutoModelForSequenceClassification"

    def labels_of(self, row: Row) -> Sequence[str]:
        return [fill_template(self.data.label or "", row, "label")]

    def example(self, row: Row) -> Example:
        text = fill_template(self.data.text or "", row, "text")
        pair = None if self.data.pair is None else fill_template(self.data.pair, row, "pair")
        return {**self._encode(text, pair), "labels": [self.id_of(self.labels_of(row)[0])]}

    def collate(self, examples: Sequence[Example]) -> Batch:
        features = ({**example, "labels": example["labels"][0]} for example in examples)
        return collated(DataCollatorWithPadding(self.tokenizer), features)

    def predict(self, model: nn.Module, batch: Batch) -> Predictions:
        return Predictions(model(**inputs_of(batch)).logits, batch["labels"])

    def shown(self, example: Example) -> dict[str, Any]:
        ids = example["input_ids"]
        label = f" → {self.names[example['labels'][0]]}"
        text = super().shown({"input_ids": ids, "labels": [-100] * len(ids)})
        return {**text, "learnt": 1, "pieces": [*text["pieces"], {"text": label, "learnt": True, "special": False}]}

    def ask(self, rows: Sequence[Row]) -> dict[str, Any] | None:
        if self.config.sample_prompt is not None:
            return {"prompt": self.config.sample_prompt, "expected": None}
        if self.data.pair is not None or self.data.text is None:
            return None
        found = first_pair(rows, self.data.text, self.data.label, self.data.max_length)
        return found and {**found, "expected": self.names[self.id_of(found["expected"])]}

    def answer(self, model: Any, prompt: str, device: torch.device | None = None) -> str:
        with asked(model, device) as own:
            batch = {name: torch.tensor([ids], device=own) for name, ids in self._encode(prompt, None).items()}
            shares = model(**batch).logits[0].float().softmax(-1)
        best = int(shares.argmax())
        return f"{self.names[best]} ({float(shares[best]):.0%})"

    def _encode(self, text: str, pair: str | None) -> Example:
        found = self.tokenizer(text, pair, truncation=True, max_length=self.data.max_length)
        return {name: list(found[name]) for name in ("input_ids", "token_type_ids") if name in found}
