"""Encoder-decoders: the encoder reads the prompt, the decoder learns the completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DataCollatorForSeq2Seq

from grass_dist.finetune.answers import asked
from grass_dist.finetune.data.batches import Example
from grass_dist.finetune.data.config import fill_template
from grass_dist.finetune.data.json_lines import Row
from grass_dist.finetune.tasks.base import Batch, Predictions, bare, inputs_of
from grass_dist.finetune.tasks.causal_lm import first_pair
from grass_dist.finetune.tasks.labels import collated
from grass_dist.finetune.tasks.tokens import TokenTask
from grass_dist.model.loss import IGNORED


class Seq2SeqLm(TokenTask):
    """Cross entropy over the tokens of the completion; perplexity, and accuracy of the next token."""

    auto = "AutoModelForSeq2SeqLM"

    def example(self, row: Row) -> Example:
        prompt = fill_template(self.data.prompt or "", row, "prompt")
        completion = fill_template(self.data.completion or "", row, "completion")
        how = {"truncation": True, "max_length": self.data.max_length}
        given, wanted = self.tokenizer(prompt, **how), self.tokenizer(text_target=completion, **how)
        return {"input_ids": list(given["input_ids"]), "labels": list(wanted["input_ids"])}

    def collate(self, examples: Sequence[Example]) -> Batch:
        return collated(DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=IGNORED), examples)

    def predict(self, model: nn.Module, batch: Batch) -> Predictions:
        labels = batch["labels"]
        given = bare(model).prepare_decoder_input_ids_from_labels(labels=labels)
        logits = model(**inputs_of(batch), decoder_input_ids=given, use_cache=False).logits
        return Predictions(logits.flatten(0, 1), labels.flatten())

    def shown(self, example: Example) -> dict[str, Any]:
        ids, labels = example["input_ids"], example["labels"]
        return super().shown({"input_ids": [*ids, *labels], "labels": [*([IGNORED] * len(ids)), *labels]})

    def ask(self, rows: Sequence[Row]) -> dict[str, Any] | None:
        if self.config.sample_prompt is not None:
            return {"prompt": self.config.sample_prompt, "expected": None}
        return first_pair(rows, self.data.prompt or "", self.data.completion, self.data.max_length)

    def answer(self, model: Any, prompt: str, device: torch.device | None = None) -> str:
        given = self.tokenizer(prompt, truncation=True, max_length=self.data.max_length)["input_ids"]
        with asked(model, device) as own:
            ids = torch.tensor([given], device=own)
            said = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.config.answer_tokens,
                do_sample=False,
                num_beams=1,
            )
        return self.tokenizer.decode(said[0], skip_special_tokens=True).strip()
