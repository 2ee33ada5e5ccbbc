"""Makes the task that a configuration names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grass_dist.finetune.config import RunConfig, TaskName
from grass_dist.finetune.tasks.base import Task
from grass_dist.finetune.tasks.causal_lm import CausalLm
from grass_dist.finetune.tasks.classification import SequenceClassification
from grass_dist.finetune.tasks.image_text import ImageText
from grass_dist.finetune.tasks.masked_lm import MaskedLm, Protein
from grass_dist.finetune.tasks.seq2seq_lm import Seq2SeqLm
from grass_dist.finetune.tasks.speech_models import speech_task
from grass_dist.finetune.tasks.tagging import TokenClassification

TASKS: dict[TaskName, Callable[[RunConfig, Any], Task]] = {
    "causal-lm": CausalLm,
    "seq2seq-lm": Seq2SeqLm,
    "masked-lm": MaskedLm,
    "sequence-classification": SequenceClassification,
    "token-classification": TokenClassification,
    "protein": Protein,
    "speech": speech_task,
    "image-text": ImageText,
}


def task_of(config: RunConfig, tokenizer: Any) -> Task:
    """Returns the task of a run.

    Raises:
        ConfigError: the tokenizer, or the processor of the model, does not fit it.
        GrassError: a library that reads the data is not installed.
    """
    return TASKS[config.task](config, tokenizer)
