"""The names of labels: where they come from, which number each has, and how predictions of them are judged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import datasets
import torch
from torch import nn

from grass_dist.errors import ConfigError, shorten
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.data.json_lines import Row
from grass_dist.finetune.data.rows import Rows, RowSource
from grass_dist.finetune.hub import loading_options
from grass_dist.finetune.tasks.base import Batch, Predictions, Task, accuracy
from grass_dist.model.packaged import resolve_model

OUTSIDE = "O"
"""Label of a word that is part of nothing; F1 leaves it out in token-classification."""


class LabelTask(Task):
    """A task whose targets are labels out of a list of names."""

    part = "label"
    """Part of the data that holds them."""

    def __init__(self, config: RunConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self.names: list[str] = list(config.data.labels or ())
        self._ids: dict[str, int] = {}

    def labels_of(self, row: Row) -> Sequence[str]:
        """Returns the labels in a row, as text."""
        raise NotImplementedError

    def begin(self, source: RowSource, rows: Rows, held_out: Sequence[Row]) -> None:
        declared = _declared(rows, getattr(self.data, self.part))
        if not self.names:
            self.names = declared or self._occurring(source, rows, held_out)
        numbers = {str(number): number for number in range(len(self.names))}
        self._ids = {**numbers, **{name: number for number, name in enumerate(self.names)}}

    def id_of(self, label: str) -> int:
        """Returns the number of a label.

        Raises:
            ConfigError: there is no such label.
        """
        if label not in self._ids:
            problem = f"a row has the label {shorten(label, 40)!r}, and the labels are {_listed(self.names)}"
            raise ConfigError("labels", self.data.labels, problem, "add it to labels, or leave the row out")
        return self._ids[label]

    def model_options(self) -> dict[str, Any]:
        numbered = dict(enumerate(self.names))
        # A head of another size is told by `setup.load_model`, which says what to do about it.
        return {
            "num_labels": len(self.names),
            "id2label": numbered,
            "label2id": {name: number for number, name in numbered.items()},
            "ignore_mismatched_sizes": True,
        }

    def is_new(self, model: nn.Module, name: str) -> bool:
        return not name.startswith(f"{getattr(model, 'base_model_prefix', '')}.")

    def check_model(self, model: Any) -> None:
        settings = model.config.get_text_config()
        if getattr(settings, "pad_token_id", None) is None:
            settings.pad_token_id = self.tokenizer.pad_token_id  # by which a decoder finds the end of a text
            model.config.pad_token_id = self.tokenizer.pad_token_id

    def told(self) -> list[str]:
        return [f"{len(self.names)} labels: {_listed(self.names)}"]

    def counts(self, found: Predictions) -> list[float]:
        """Returns for each label how often it was found where it is, was found, and is."""
        guess, truth = found.learnt()
        size = len(self.names)
        parts = [truth[guess == truth], guess, truth]
        return torch.cat([torch.bincount(part, minlength=size).double() for part in parts]).tolist()

    def metrics(self, loss: float, counts: Sequence[float]) -> dict[str, float]:
        size = len(self.names)
        right, guessed, true = (counts[at : at + size] for at in range(0, 3 * size, size))
        left_out = self.names.index(OUTSIDE) if self.part == "tags" and OUTSIDE in self.names else None
        scores = [
            2 * right[k] / (guessed[k] + true[k]) for k in range(size) if k != left_out and guessed[k] + true[k] > 0
        ]
        f1 = sum(scores) / len(scores) if scores else 0.0
        return {"accuracy": accuracy(sum(right), sum(true)), "f1": f1}

    def _occurring(self, source: RowSource, rows: Rows, held_out: Sequence[Row]) -> list[str]:
        """Returns the labels that occur: in the order of the model, if it has all of them, or else sorted."""
        if isinstance(rows, datasets.IterableDataset):
            problem = "the labels of a stream are not known before it is read"
            raise ConfigError("labels", None, problem, "name them, or set streaming to false")
        every: list[Any] = [*source.watch(rows), *held_out]
        found = {label for row in every for label in self.labels_of(row) if label.strip()}
        if len(found) < 2:
            problem = f"all rows have the label {next(iter(found), None)!r}: there is nothing to tell apart"
            raise ConfigError(self.part, getattr(self.data, self.part), problem, "name the column of the labels")
        known = _labels_of_model(self.config)
        return known if found <= set(known) else _sorted(found)


def collated(collator: Callable[[list[dict[str, Any]]], Any], features: Iterable[dict[str, Any]]) -> Batch:
    """Returns the batch of a collator of transformers as a dict."""
    return dict(collator(list(features)))


def _declared(rows: Rows, column: str) -> list[str]:
    """Returns the names of the labels that a dataset declares for a column, if it does."""
    feature = (rows.features or {}).get(column)
    feature = getattr(feature, "feature", feature)  # of a list
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else []


def _labels_of_model(config: RunConfig) -> list[str]:
    from transformers import AutoConfig

    source, trust = resolve_model(config.model.name), config.model.trust_remote_code
    try:
        options = loading_options(config.model.name)
        settings: Any = AutoConfig.from_pretrained(source, trust_remote_code=trust, **options)
        return [str(settings.id2label[number]) for number in range(len(settings.id2label))]
    except Exception:  # whoever loads the model says why
        return []


def _sorted(labels: set[str]) -> list[str]:
    """Sorts labels, numbers by their value."""
    if all(label.lstrip("-").isdecimal() for label in labels):
        return sorted(labels, key=int)
    return sorted(labels)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return shorten(", ".join(names[:10]), 200) + more
