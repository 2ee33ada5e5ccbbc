"""Token classification: a label for each word of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DataCollatorForTokenClassification

from grass_dist.errors import ConfigError, shorten
from grass_dist.finetune.answers import asked
from grass_dist.finetune.data.batches import Example
from grass_dist.finetune.data.config import list_of
from grass_dist.finetune.data.json_lines import Row
from grass_dist.finetune.tasks.base import Batch, Predictions, inputs_of
from grass_dist.finetune.tasks.labels import LabelTask, collated
from grass_dist.model.loss import IGNORED


class TokenClassification(LabelTask):
    """Cross entropy over the words, each by its first token; accuracy, and F1 over the labels but ``O``."""

    auto = "AutoModelForTokenClassification"
    part = "tags"

    def labels_of(self, row: Row) -> Sequence[str]:
        return [str(tag) for tag in list_of(self.data.tags or "", row, "tags")]

    def example(self, row: Row) -> Example:
        words = [str(word) for word in list_of(self.data.words or "", row, "words")]
        tags = self.labels_of(row)
        if len(words) != len(tags):
            problem = f"a row has {len(words)} words and {len(tags)} tags ({shorten(' '.join(words), 40)!r})"
            raise ConfigError("tags", self.data.tags, problem, "give each word a tag")
        ids, firsts = self._encode(words)
        labels = [IGNORED if word is None else self.id_of(tags[word]) for word in firsts]
        return {"input_ids": ids, "labels": labels}

    def collate(self, examples: Sequence[Example]) -> Batch:
        return collated(DataCollatorForTokenClassification(self.tokenizer, label_pad_token_id=IGNORED), examples)

    def predict(self, model: nn.Module, batch: Batch) -> Predictions:
        return Predictions(model(**inputs_of(batch)).logits.flatten(0, 1), batch["labels"].flatten())

    def ask(self, rows: Sequence[Row]) -> dict[str, Any] | None:
        if self.config.sample_prompt is not None:
            return {"prompt": self.config.sample_prompt, "expected": None}
        if not rows:
            return None
        words = [str(word) for word in list_of(self.data.words or "", rows[0], "words")]
        names = [self.names[self.id_of(tag)] for tag in self.labels_of(rows[0])]
        return {"prompt": " ".join(words), "expected": _tagged(words, names)}

    def answer(self, model: Any, prompt: str, device: torch.device | None = None) -> str:
        words = prompt.split()
        ids, firsts = self._encode(words)
        with asked(model, device) as own:
            best = model(input_ids=torch.tensor([ids], device=own)).logits[0].argmax(-1).tolist()
        found = {word: self.names[label] for word, label in zip(firsts, best, strict=True) if word is not None}
        return _tagged(words, [found.get(word, "?") for word in range(len(words))])

    def _encode(self, words: Sequence[str]) -> tuple[list[int], list[int | None]]:
        """Returns the ids, and for each the number of the word that it begins, or None."""
        try:
            found = self.tokenizer(
                list(words), is_split_into_words=True, truncation=True, max_length=self.data.max_length
            )
            places = found.word_ids()
        except (AssertionError, ValueError) as error:
            problem = f"its tokenizer does not take words ({shorten(' '.join(str(error).split()), 120)})"
            fix = "give it a fast tokenizer, with add_prefix_space where it says so"
            raise ConfigError("model.name", self.config.model.name, problem, fix) from error
        firsts = [word if word != before else None for before, word in zip([None, *places], places, strict=False)]
        return list(found["input_ids"]), firsts


def _tagged(words: Sequence[str], tags: Sequence[str]) -> str:
    return " ".join(f"{word}/{tag}" for word, tag in zip(words, tags, strict=True))
