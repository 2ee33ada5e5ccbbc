"""Loads the processor of a model: its tokenizer together with what makes numbers of audio or images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from grass_dist.errors import ConfigError, shorten
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.hub import loading_options
from grass_dist.finetune.tasks.base import Batch, bare
from grass_dist.model.packaged import resolve_model


def load_processor(config: RunConfig, part: str) -> Any:
    """Loads the processor of a model; its tokenizer pads with its eos token where it names no pad token.

    Args:
        part: what it must have beside a tokenizer, "feature_extractor" or "image_processor".

    Raises:
        ConfigError: the model has none, or it cannot be loaded.
    """
    from transformers import AutoProcessor

    name, trust = config.model.name, config.model.trust_remote_code
    try:
        processor: Any = AutoProcessor.from_pretrained(
            resolve_model(name), trust_remote_code=trust, **loading_options(name)
        )
    except Exception as error:  # whatever transformers makes of a folder that nobody has checked
        reason = shorten(" ".join(str(error).split()) or type(error).__name__, 200).rstrip(".")
        fix = "complete the model's folder, or choose a model for the task"
        if isinstance(error, ImportError):
            fix = "install the package that it names, or choose a model whose processor needs numpy and Pillow alone"
        raise ConfigError("model.name", name, f"its processor cannot be loaded ({reason})", fix) from error
    tokenizer = getattr(processor, "tokenizer", None)
    if getattr(processor, part, None) is None or tokenizer is None:
        problem = f"it has no {part} and tokenizer, which task={config.task} needs"
        raise ConfigError("model.name", name, problem, "choose a model for the task")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def arguments_of(processor: str, found: Mapping[str, Any]) -> Batch:
    """Returns what a processor gives as a batch of tensors.

    Args:
        processor: name of the model, for an error.

    Raises:
        ConfigError: a value is no tensor, which ranks cannot move to a device.
    """
    odd = next((name for name, value in found.items() if not isinstance(value, torch.Tensor)), None)
    if odd is not None:
        problem = f"its processor gives {odd} as a {type(found[odd]).__name__}, not as a tensor"
        raise ConfigError("model.name", processor, problem, "choose another model")
    return dict(found)


def in_dtype(model: Any, batch: Mapping[str, torch.Tensor]) -> Batch:
    """Returns a batch whose numbers of floating point have the dtype of the model's weights."""
    dtype = bare(model).dtype
    return {name: each.to(dtype) if each.is_floating_point() else each for name, each in batch.items()}
