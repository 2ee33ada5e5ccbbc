"""Causal language models: the loss is that of the next token, its metric the perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from grass_dist.errors import ConfigError
from grass_dist.finetune.answers import greedy_answer
from grass_dist.finetune.data.batches import Example
from grass_dist.finetune.data.config import fill_template
from grass_dist.finetune.data.conversations import Message, conversation_of, dialogues_of, is_learnt, tools_of
from grass_dist.finetune.data.first_ids import LONG
from grass_dist.finetune.data.json_lines import Row
from grass_dist.finetune.data.loading import render_prompt, tokenise
from grass_dist.finetune.fit import vocabulary_of
from grass_dist.finetune.tasks.base import Batch, Predictions, Task, inputs_of
from grass_dist.model.loss import IGNORED


class CausalLm(Task):
    """Next-token prediction over prompt and completion, plain text, or conversations."""

    auto = "AutoModelForCausalLM"
    _given: tuple[list[Message], list[Any] | None] | None = None
    """The messages, and the tools, that the question stands for."""

    def check_model(self, model: Any) -> None:
        from transformers import MODEL_FOR_MASKED_LM_MAPPING

        # Such a class has a head for the next token too, for which the model must be a decoder.
        if getattr(model.config, "is_decoder", True) is False and type(model.config) in MODEL_FOR_MASKED_LM_MAPPING:
            problem = "it is an encoder, in which each token sees the next one that it has to tell"
            raise ConfigError(
                "model.name", self.config.model.name, problem, "set task to masked-lm, or choose a decoder"
            )

    def example(self, row: Row) -> Example:
        return tokenise(row, self.tokenizer, self.data)

    def predict(self, model: nn.Module, batch: Batch) -> Predictions:
        logits = model(**inputs_of(batch), use_cache=False).logits[:, :-1]
        return Predictions(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        if self.config.model.logits == "whole":
            return super().loss(model, batch)
        return model(**inputs_of(batch), labels=batch["labels"], num_items_in_batch=1, use_cache=False).loss

    def measure(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, list[float]]:
        return self.loss(model, batch), []

    def targets(self, batch: Batch) -> torch.Tensor:
        return (batch["labels"][:, 1:] != IGNORED).sum()

    def metrics(self, loss: float, counts: Sequence[float]) -> dict[str, float]:
        return {"perplexity": perplexity(loss)}

    def ask(self, rows: Sequence[Row]) -> dict[str, Any] | None:
        prompt, data = self.config.sample_prompt, self.data
        if prompt is not None:
            return {"prompt": prompt, "expected": None}
        if data.messages is not None:
            return self._first_turn(rows)
        return None if data.prompt is None else first_pair(rows, data.prompt, data.completion, data.max_length)

    def answer(self, model: Any, prompt: str, device: torch.device | None = None) -> str:
        if self._given is not None:
            ids = dialogues_of(self.tokenizer).given_ids(*self._given)
        else:
            ids = render_prompt(self.tokenizer, prompt, self.data.chat_template)
        vocabulary_of(self.config.model.name, model, self.tokenizer).check_ids(ids)
        return greedy_answer(model, self.tokenizer, ids, self.config.answer_tokens, device)

    def _first_turn(self, rows: Sequence[Row]) -> dict[str, Any] | None:
        """Asks for the last turn of the assistant in the first conversation that is not far too long."""
        for row in rows:
            messages = conversation_of(row, self.data)
            last = max(number for number, message in enumerate(messages) if is_learnt(message))
            given, expected = messages[:last], messages[last].get("content")
            if given and sum(len(str(message)) for message in given) <= LONG * self.data.max_length:
                self._given = given, tools_of(row, self.data)
                said = str(given[-1].get("content", ""))
                return {"prompt": said, "expected": expected if isinstance(expected, str) else None}
        return None


def first_pair(rows: Sequence[Row], prompt: str, completion: str | None, max_length: int) -> dict[str, Any] | None:
    """Returns the prompt, and the completion, of the first row whose prompt is not far too long."""
    for row in rows:
        if len(text := fill_template(prompt, row, "prompt")) <= LONG * max_length:
            expected = None if completion is None else fill_template(completion, row, "completion")
            return {"prompt": text, "expected": expected}
    return None


def perplexity(loss: float) -> float:
    """Returns the exponential of a mean loss in nats; infinity where that is no float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
