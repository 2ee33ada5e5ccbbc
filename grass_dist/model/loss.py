"""The training loss: next-token cross entropy."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

IGNORED = -100
"""Label of a token without loss."""


def summed_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy of the next token, summed over the target tokens of a micro-batch, fp32.

    Args:
        batch: ``labels`` and the arguments of the model's forward, each (sequences, tokens).
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
