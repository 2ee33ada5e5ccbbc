"""Masked language models: the loss is on the tokens that are hidden from the model, of text or of proteins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DataCollatorForLanguageModeling

from grass_dist.errors import ConfigError, shorten
from grass_dist.finetune.answers import asked
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.data.batches import Example
from grass_dist.finetune.data.config import fill_template
from grass_dist.finetune.data.json_lines import Row
from grass_dist.finetune.tasks.base import Batch, Predictions, inputs_of
from grass_dist.finetune.tasks.causal_lm import first_pair
from grass_dist.finetune.tasks.tokens import TokenTask
from grass_dist.model.loss import IGNORED

PROBABILITY = 0.15
"""Share of the tokens that are hidden, where the configuration says nothing (Devlin et al., 2019)."""


class MaskedLm(TokenTask):
    """Cross entropy over the hidden tokens; accuracy and perplexity of them.

    Which tokens are hidden depends on the seed, the step and the place in the global batch. In evaluations it is the
    same each time.
    """

    auto = "AutoModelForMaskedLM"

    def __init__(self, config: RunConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        if tokenizer.mask_token_id is None:
            problem = f"its tokenizer has no mask token, which task={config.task} needs"
            raise ConfigError("model.name", config.model.name, problem, "choose a masked language model")
        probability = config.data.mask_probability or PROBABILITY
        self._masks = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=probability)

    def check_model(self, model: Any) -> None:
        weight = model.get_input_embeddings().weight
        if (rows := getattr(weight, "ds_shape", weight.shape)[0]) < len(self.tokenizer):
            problem = f"its tokenizer has {len(self.tokenizer)} tokens, and the model weights for {rows}"
            raise ConfigError("model.name", self.config.model.name, problem, "resize its embeddings")

    def text_of(self, row: Row) -> str:
        """Returns the text of a row."""
        return fill_template(self.data.text or "", row, "text")

    def example(self, row: Row) -> Example:
        """Makes the ids; the labels are those that may be hidden, `IGNORED` on special tokens."""
        return self._encode(self.text_of(row))

    def vary(self, example: Example, step: int, place: int) -> Example:
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
        seeds = np.random.SeedSequence([self.config.train.seed, step, place])
        self._masks.generator = torch.Generator().manual_seed(int(seeds.generate_state(1, np.uint64)[0]) >> 1)
        hidden, wanted = self._masks.torch_mask_tokens(ids, special_tokens_mask=labels == IGNORED)
        return {"input_ids": hidden[0].tolist(), "labels": wanted[0].tolist()}

    def predict(self, model: nn.Module, batch: Batch) -> Predictions:
        return Predictions(model(**inputs_of(batch)).logits.flatten(0, 1), batch["labels"].flatten())

    def ask(self, rows: Sequence[Row]) -> dict[str, Any] | None:
        prompt = self.config.sample_prompt
        if prompt is None:
            found = first_pair(rows, self.data.text or "", None, self.data.max_length)
            prompt = found and found["prompt"]
        return None if prompt is None else {"prompt": prompt, "expected": None}

    def answer(self, model: Any, prompt: str, device: torch.device | None = None) -> str:
        """Returns the text with the model's guesses, in brackets, of the tokens that were hidden."""
        hidden = self.vary(self._encode(prompt), 0, 0)
        with asked(model, device) as own:
            best = model(input_ids=torch.tensor([hidden["input_ids"]], device=own)).logits[0].argmax(-1).tolist()
        found = [(guess, label) for guess, label in zip(best, hidden["labels"], strict=True) if label != IGNORED]
        pairs = ", ".join(f"{self._token(label)}→{self._token(guess)}" for guess, label in found[:20])
        right = sum(guess == label for guess, label in found)
        return f"{right} of {len(found)} hidden tokens found: {pairs}"

    def _token(self, number: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(number))

    def _encode(self, text: str) -> Example:
        ids = list(self.tokenizer(text, truncation=True, max_length=self.data.max_length)["input_ids"])
        special = self.tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
        return {
            "input_ids": ids,
            "labels": [IGNORED if is_ else token for token, is_ in zip(ids, special, strict=True)],
        }


class Protein(MaskedLm):
    """A `MaskedLm` over sequences of amino acids, in one-letter code; white space in them does not count."""

    def _encode(self, text: str) -> Example:
        sequence = "".join(text.split()).upper().rstrip("*")  # a stop codon is written as *
        found = super()._encode(sequence)
        unknown = found["input_ids"].count(self.tokenizer.unk_token_id)
        if unknown > sum(label != IGNORED for label in found["labels"]):
            problem = f"its tokenizer does not know most letters of {shorten(sequence, 40)!r}"
            fix = "choose a model of proteins, such as facebook/esm2_t12_35M_UR50D, and a column of sequences"
            raise ConfigError("model.name", self.config.model.name, problem, fix)
        return found
