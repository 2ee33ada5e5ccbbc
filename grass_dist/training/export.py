"""The trained model as an ordinary Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from grass_dist.training.world import World


def save_pretrained(model: nn.Module, tokenizer: Any, folder: Path, world: World) -> None:
    """Gathers the weights of all ranks and writes them with config and tokenizer. Called on every rank.

    Over the wire: one all-gather of each parameter; the main rank's host memory holds the whole model meanwhile.
    """
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not world.is_main:
        return
    inner: Any = model.module if isinstance(model, DistributedDataParallel) else model
    inner.config.use_cache = True
    inner.save_pretrained(folder, state_dict=whole)
    inner.config.use_cache = False
    tokenizer.save_pretrained(folder)
