"""The interface of a task, from a row of the data to a loss, a metric and an answer.

`Task` itself learns text: what it does not override is the same for all tasks of text. A task keeps what it has learnt
of the data (the names of its labels) and its tokenizer; the model is passed to it, bare or in any wrapper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from grass_dist.errors import ConfigError
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.data.batches import Example, collate
from grass_dist.finetune.data.json_lines import Row
from grass_dist.finetune.data.loading import TOO_LONG, Data
from grass_dist.finetune.data.rows import Rows, RowSource
from grass_dist.finetune.data.shown import shown
from grass_dist.finetune.fit import Padding, check_fit
from grass_dist.model.loss import IGNORED

Batch = dict[str, torch.Tensor]
"""A micro-batch; ``labels`` are `IGNORED` where nothing is learnt."""


class Predictions(NamedTuple):
    """What the model says of each target, and the targets."""

    logits: torch.Tensor
    """Shape (targets, classes)."""
    labels: torch.Tensor
    """Shape (targets,), torch.long; `IGNORED` where nothing is learnt."""

    def summed_loss(self) -> torch.Tensor:
        """Returns the cross entropy, summed over the targets that are learnt, in fp32."""
        return F.cross_entropy(self.logits.float(), self.labels, ignore_index=IGNORED, reduction="sum")

    def learnt(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the likeliest class and the label of each target that is learnt; shape (targets,)."""
        kept = self.labels != IGNORED
        return self.logits[kept].argmax(-1), self.labels[kept]


class Task:
    """One kind of training.

    Args:
        config: of the run.
        tokenizer: the model's.
    """

    auto: ClassVar[str]
    """Class of transformers that loads the model."""
    length: ClassVar[str] = "max_length"
    """Field of ``data`` that bounds the tokens of an example."""
    left_out: str = TOO_LONG
    """What is said of examples that have nothing to learn."""
    reads_files: ClassVar[bool] = False
    """Whether `collate` reads files, which may fail on one rank alone."""

    def __init__(self, config: RunConfig, tokenizer: Any) -> None:
        self.config, self.data, self.tokenizer = config, config.data, tokenizer
        self.processor: Any = tokenizer
        """What is saved with the model: the tokenizer, or the processor that has it."""
        self.pad_token_id: int = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        """Token that fills up short examples; `grass_dist.finetune.fit.check_fit` may choose another one."""

    # ------------------------------------------------------------------------------------------- the model

    def load(self, source: str, **how: Any) -> Any:
        """Loads the model with `from_pretrained` of the class of transformers."""
        import transformers

        return getattr(transformers, self.auto).from_pretrained(source, **how, **self.model_options())

    def model_options(self) -> dict[str, Any]:
        """Returns what the model is told of the data, e.g. the names of the labels."""
        return {}

    def set_padding(self, token: int, told: str | None) -> None:
        """Takes the token that fills up short examples.

        Args:
            told: why it is another one than the tokenizer's pad token; None if it is that.

        Raises:
            ConfigError: the tokenizer itself pads here, and the model has no weights for its pad token.
        """
        self.pad_token_id = token
        if told is not None and type(self).collate is not Task.collate:
            problem = "the model has no weights for its tokenizer's pad token"
            raise ConfigError("model.name", self.config.model.name, problem, "resize its embeddings")

    def is_new(self, model: nn.Module, name: str) -> bool:
        """Says whether a weight that the model's files lack is one that the task brings along: it begins at random."""
        return False

    def check_model(self, model: nn.Module) -> None:
        """Checks whether the model is one for this task.

        Raises:
            ConfigError: it is not.
        """

    def fit(self, model: nn.Module, data: Data) -> Padding:
        """Checks that the model can train on the examples: see `grass_dist.finetune.fit.check_fit`."""
        return check_fit(self.config, model, self.tokenizer, data)

    # ------------------------------------------------------------------------------------------- the examples

    def begin(self, source: RowSource, rows: Rows, held_out: Sequence[Row]) -> None:
        """Looks at the rows before the first example is made; see `grass_dist.finetune.data.loading.Recipe`."""

    def example(self, row: Row) -> Example:
        """Makes the example of a row.

        Raises:
            ConfigError: the row cannot be used.
        """
        raise NotImplementedError

    def stored(self, example: Example, number: int) -> Example:
        """Returns what is kept in memory of an example; see `grass_dist.finetune.data.loading.Recipe`."""
        return example

    def vary(self, example: Example, step: int, place: int) -> Example:
        """Returns the example as the model sees it this time.

        Args:
            step: number of the step; 0 in evaluations.
            place: place in the global batch, or among the held-out examples. What is random depends on the seed, the
                step and the place alone, so it is the same on any number of ranks and after a resume.
        """
        return example

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Makes the tensors of a micro-batch, padded to its longest example."""
        return collate(examples, self.pad_token_id)

    # ------------------------------------------------------------------------------------------- loss and metric

    def predict(self, model: nn.Module, batch: Batch) -> Predictions:
        """Runs the forward."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Returns the loss of a micro-batch, summed over its targets, in fp32."""
        return self.predict(model, batch).summed_loss()

    def targets(self, batch: Batch) -> torch.Tensor:
        """Counts the targets of a micro-batch: what the loss of a step is the mean over. A tensor without dimension."""
        return (batch["labels"] != IGNORED).sum()

    def measure(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, list[float]]:
        """Returns the summed loss of a held-out micro-batch, and what its metrics are made of (see `counts`)."""
        found = self.predict(model, batch)
        return found.summed_loss(), self.counts(found)

    def counts(self, found: Predictions) -> list[float]:
        """Returns numbers that are added up over all held-out examples and ranks; always as many."""
        return []

    def metrics(self, loss: float, counts: Sequence[float]) -> dict[str, float]:
        """Makes the metrics of an evaluation of the mean loss and the added counts."""
        return {}

    # ------------------------------------------------------------------------------------------- for the reader

    def told(self) -> list[str]:
        """Returns sentences about what was found, for the start of the run."""
        return []

    def shown(self, example: Example) -> dict[str, Any]:
        """Returns the example as JSON for the report: see `grass_dist.finetune.data.shown.shown`."""
        return shown(example, self.tokenizer)

    def ask(self, rows: Sequence[Row]) -> dict[str, Any] | None:
        """Chooses what the model is asked before and after the training.

        Returns:
            ``prompt``, a text, and ``expected``, the answer of the data or None; None where nothing is asked.
        """
        return None

    def answer(self, model: Any, prompt: str, device: torch.device | None = None) -> str:
        """Returns what the model says to a prompt of `ask`. The model is on ``device`` meanwhile; None leaves it."""
        raise NotImplementedError


def accuracy(right: float, all: float) -> float:
    """Returns a share; 0 of nothing."""
    return right / all if all else 0.0


def bare(model: Any) -> Any:
    """Returns the model in a wrapper of DDP or DeepSpeed."""
    return getattr(model, "module", model)


def inputs_of(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the arguments of the forward."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}
