"""The small Llama with LoRA by peft alone, as the reference of adapters trains it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from integration_tests.support.model import DRAWS, small_llama

SETTINGS = {
    **DRAWS,
    "adapters": {"rank": 4, "alpha": 8, "learning_rate": 2e-3},
}
STEPS = 20
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_lora(dtype: torch.dtype = torch.float32, frozen: Sequence[int] = (), name: str = "grass") -> nn.Module:
    """`small_llama` with LoRA on all linear weights of its layers; everything trains."""
    import peft

    model = small_llama(dtype, frozen)
    torch.manual_seed(SETTINGS["seed"])
    peft.inject_adapter_in_model(lora(), model, adapter_name=name)
    for param in model.parameters():
        param.data = param.data.to(dtype)
    return model.requires_grad_(True)


def lora(**more: Any) -> Any:
    """The `LoraConfig` of it."""
    import peft

    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **more})
