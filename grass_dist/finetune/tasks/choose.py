"""Makes the task that a configuration names."""

from __future__ import annotations

from typing import Any

from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.tasks.base import Task
from grass_dist.finetune.tasks.causal_lm import CausalLm

_TASKS: dict[str, type[Task]] = {"causal-lm": CausalLm}


def class_of(config: RunConfig) -> type[Task]:
    """Returns the class of the task."""
    return _TASKS["causal-lm"]


def task_of(config: RunConfig, tokenizer: Any) -> Task:
    """Returns the task of a run.

    Raises:
        ConfigError: the tokenizer does not fit it.
    """
    return class_of(config)(config, tokenizer)
