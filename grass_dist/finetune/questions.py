"""Asks a model before and after the training, so that a person sees what it did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from grass_dist.finetune.data.json_lines import Row
from grass_dist.finetune.hub import loading_options
from grass_dist.finetune.parallel import Parallelism
from grass_dist.finetune.tasks.base import Task

NO_ROOM = "(the whole model does not fit on one device)"
"""The answer where there is none for want of memory."""


def answer_before(task: Task, rows: Sequence[Row], parallel: Parallelism, model: nn.Module) -> dict[str, Any] | None:
    """Returns the first held-out question and the answer of the model as it was loaded; None where nothing is asked.

    It is called on one rank, and the model is on that rank's device for as long as it takes.
    """
    question = task.ask(rows) if task.config.answer_tokens else None
    if question is None:
        return None
    try:
        return {**question, "text": parallel.answer(task, model, question["prompt"])}
    except torch.cuda.OutOfMemoryError:
        return {**question, "text": NO_ROOM}


def answer_after(task: Task, rows: Sequence[Row], folder: str, prompt: str, device: torch.device) -> str:
    """Returns what the saved model says to the same question."""
    task.ask(rows)
    try:
        return answer_from_folder(task, folder, prompt, device)
    except torch.cuda.OutOfMemoryError:
        return NO_ROOM


def answer_from_folder(
    task: Task, folder: str, prompt: str, device: torch.device, *, dtype: torch.dtype | None = None
) -> str:
    """Loads a Hugging Face folder or name as any user does, in its own dtype or another, and asks it."""
    trust = task.config.model.trust_remote_code
    model = task.load(folder, dtype=dtype or "auto", trust_remote_code=trust, **loading_options(folder))
    return task.answer(model.to(device), prompt)
