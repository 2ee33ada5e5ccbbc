"""Writes the trained model as an ordinary Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from grass_dist.checkpoint import disk
from grass_dist.errors import GrassError
from grass_dist.job.world import World
from grass_dist.model.adapters import merged_weights
from grass_dist.ranks import describe_error
from grass_dist.regular_files import give_usual_modes


def gather_torch(model: nn.Module) -> dict[str, Any]:
    """Gathers the weights into the main rank's host memory; other ranks get nothing. Called on every rank.

    Over the wire: one all-gather of each parameter.
    """
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    # FSDP2 gathers a tied weight once for each of its names, and two copies would be written.
    first: dict[int, str] = {}
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name and known in whole and name in whole:
            whole[name] = whole[known]
    return whole


def gather_zero(module: nn.Module, world: World) -> dict[str, torch.Tensor]:
    """Does what `gather_torch` does, for the module in a DeepSpeed engine. ZeRO-3 gathers one parameter at a time."""
    import deepspeed

    whole: dict[str, torch.Tensor] = {}
    seen: dict[int, torch.Tensor | None] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:  # tied weights have two names
            partitioned = hasattr(tensor, "ds_id")
            with deepspeed.zero.GatheredParameters([tensor], enabled=partitioned):
                seen[id(tensor)] = tensor.detach().to("cpu", copy=partitioned) if world.is_main else None
        if (here := seen[id(tensor)]) is not None:
            whole[name] = here
    return whole


def save_pretrained(model: Any, whole: dict[str, Any], tokenizer: Any, folder: Path, world: World) -> None:
    """Writes ``whole``, the gathered weights, with config and tokenizer, on the main rank. Adapters are merged.

    ``folder`` appears when all of it is on the disk, and replaces an earlier one.

    Raises:
        GrassError: it cannot be written. Nothing of it is left, and an earlier one stays.
    """
    if not world.is_main:
        return
    cached = hasattr(model.config, "use_cache")
    if cached:
        model.config.use_cache = True
    try:
        with disk.written_beside(folder) as writing:
            model.save_pretrained(writing, state_dict=merged_weights(model, whole))
            tokenizer.save_pretrained(writing)
            give_usual_modes(writing)
    except Exception as error:  # a full disk comes as an error of whichever library writes
        raise GrassError(
            f"{folder} was not written ({describe_error(error).rstrip('.')}), and nothing of it is left: mend that, "
            "and go on from the last checkpoint, if there is one, by --resume auto."
        ) from error
    finally:
        if cached:
            model.config.use_cache = False


def write_model_files(config: Any, tokenizer: Any, adapter: Any, folder: Path) -> None:
    """Writes the files of a Hugging Face folder besides the weights.

    Args:
        adapter: the `LoraConfig` of the adapters, if the model has some.
    """
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if adapter is not None:
        adapter.save_pretrained(folder)
