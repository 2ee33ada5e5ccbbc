"""Checks whether a tokenizer, its special tokens and the length of the examples fit the model that is trained.

Where they do not, a lookup in an embedding fails in the middle of the run; on a GPU it is an assertion of the device.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from grass_dist.errors import ConfigError
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.data.batches import Example, Examples
from grass_dist.finetune.data.loading import Data, Stream


class Padding(NamedTuple):
    """The token that fills up short examples of a batch; it has no loss, and no example attends to it."""

    id: int
    told: str | None = None
    """Sentence for the user if it is not the tokenizer's own pad token."""


class Vocabulary(NamedTuple):
    """The ids that a model has weights for."""

    model: str
    """Name of the model, as ``model.name`` gives it."""

    tokenizer: Any

    inputs: int
    """Number of rows of the input embeddings."""

    labels: int
    """Number of rows of the head."""

    def check(self, example: Example) -> None:
        """Checks one example.

        Raises:
            ConfigError: a token has no weights; the error names it.
        """
        self.check_ids(example["input_ids"], self.inputs)
        self.check_ids(example["labels"], self.labels)

    def check_ids(self, ids: Sequence[int], rows: int | None = None) -> None:
        """Checks ids alone, against ``rows`` rows of a table; None takes those of the input embeddings."""
        rows = self.inputs if rows is None else rows
        if (largest := max(ids, default=0)) >= rows:
            raise self._outside(largest, rows)

    def check_all(self, examples: Examples) -> None:
        """Checks all examples in memory."""
        for key, rows in (("input_ids", self.inputs), ("labels", self.labels)):
            if (largest := examples.largest(key)) >= rows:
                raise self._outside(largest, rows)

    def _outside(self, token: int, rows: int) -> ConfigError:
        text = self.tokenizer.convert_ids_to_tokens(token)
        problem = f"its tokenizer writes {text!r} as id {token}, and the model has weights for the ids below {rows}"
        fix = "give it the tokenizer that it was trained with, or resize its embeddings and save it with them"
        return ConfigError("model.name", self.model, problem, fix)


def check_fit(config: RunConfig, model: nn.Module, tokenizer: Any, data: Data) -> Padding:
    """Checks that the model can train on the examples: those in memory now, those of a stream as they are made.

    Returns:
        The token to pad batches with: the tokenizer's pad token, or another one if the model has no weights for it.

    Raises:
        ConfigError: ``data.max_length`` is beyond the positions that the model has learnt, the tokenizer names neither
            a pad nor an eos token, or a token of the examples has no weights.
    """
    positions = learnt_positions(model)
    if positions is not None and config.data.max_length > positions:
        problem = f"{config.model.name} has learnt {positions} positions, and no example can be longer"
        raise ConfigError("data.max_length", config.data.max_length, problem, f"use {positions} or less")
    vocabulary = vocabulary_of(config.model.name, model, tokenizer)
    padding = padding_of(vocabulary)
    if isinstance(data.train, Stream):
        data.train.check = vocabulary.check
        vocabulary.check(data.first)
    else:
        vocabulary.check_all(data.train)
    vocabulary.check_all(data.held_out)
    return padding


def vocabulary_of(name: str, model: nn.Module, tokenizer: Any) -> Vocabulary:
    """Returns the `Vocabulary` of a transformers model, whole or in the shards of ZeRO-3."""
    inputs = _rows(model.get_input_embeddings())  # type: ignore[operator]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return Vocabulary(name, tokenizer, inputs, inputs if head is None else _rows(head))


def padding_of(vocabulary: Vocabulary) -> Padding:
    """Chooses the token to pad with.

    Raises:
        ConfigError: the tokenizer names neither a pad nor an eos token.
    """
    tokenizer, rows = vocabulary.tokenizer, vocabulary.inputs
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None and eos is None:
        problem = "its tokenizer names neither an eos token nor a pad token: no example would have an end"
        raise ConfigError("model.name", vocabulary.model, problem, "set eos_token in its tokenizer_config.json")
    if pad is None:
        pad = eos
    if pad < rows:
        return Padding(pad)
    other = eos if eos is not None and eos < rows else 0
    return Padding(
        other,
        f"the model has no weights for the tokenizer's pad token {tokenizer.convert_ids_to_tokens(pad)!r} (id {pad}, "
        f"{rows} embeddings): batches are padded with {tokenizer.convert_ids_to_tokens(other)!r} (id {other}), which "
        "changes nothing in what is learnt",
    )


_TABLE = re.compile(
    r"(?:^|\.)(?:wpe\.weight|(?:embed_positions|positions?_embed(?:dings?)?)(?:\.weight)?|pos_encoding)$"
)
"""The names of tables with one row for each position, in the decoders of transformers 5.24."""


def learnt_positions(model: nn.Module) -> int | None:
    """Returns how many tokens an input can have; None, no limit, where positions are computed (rotary ones, ALiBi).

    A table of positions is known by its name and by the number of its rows, which is that of the configuration or
    slightly more.
    """
    settings: Any = getattr(model, "config", None)
    configured = getattr(settings.get_text_config() if settings else None, "max_position_embeddings", None)
    if not isinstance(configured, int):
        return None
    limits = [configured]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        shape = getattr(tensor, "ds_shape", tensor.shape)
        if _TABLE.search(name) is None or len(shape) != 2 or not configured <= shape[0] <= configured + 8:
            continue
        unused = getattr(model.get_submodule(name.rpartition(".")[0]), "padding_idx", None)
        # Where the table has a row for padding, as RoBERTa's has, the positions are counted from the next one.
        limits.append(shape[0] if unused is None else shape[0] - unused - 1)
    return min(limits) if len(limits) > 1 else None


def _rows(module: nn.Module) -> int:
    weight: Any = module.weight
    return getattr(weight, "ds_shape", weight.shape)[0]
