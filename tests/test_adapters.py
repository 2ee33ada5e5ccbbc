"""Adapters as a role, in one process: beside the layers that are drawn, against a run that is written out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from integration_tests.support.model import small_llama
from integration_tests.support.parity import check_parity
from integration_tests.support.reference import run_reference
from integration_tests.support.training import train_grass

peft = pytest.importorskip("peft")

RANK = {"rank": 4, "alpha": 8, "learning_rate": 2e-3}
SETTINGS = {
    "active_layers": 2,
    "probe_steps": 3,
    "sampling_interval": 4,
    "update_interval": 3,
    "ema_alpha": 0.3,
    "temperature": 0.5,
    "seed": 15,
    "adapters": RANK,
}
STEPS = 20
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_lora(dtype: torch.dtype = torch.float32, frozen: Sequence[int] = (), **more: object) -> torch.nn.Module:
    """`small_llama` with LoRA by peft alone, as the reference trains it."""
    model = small_llama(dtype, frozen)
    torch.manual_seed(SETTINGS["seed"])
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, **more)
    peft.inject_adapter_in_model(lora, model, adapter_name="grass")
    for param in model.parameters():
        param.data = param.data.to(dtype)
    return model.requires_grad_(True)


@pytest.fixture(scope="module")
def reference():
    return run_reference(SETTINGS, STEPS, make=with_lora)


def test_one_process_is_an_adamw_a_layer_and_one_of_adapters(reference):
    assert len(set(reference["active"][3:])) >= 3
    check_parity([train_grass(0, 1, "single", SETTINGS, STEPS)], reference)
    start = dict(with_lora().named_parameters())
    moved = [n for n, p in reference["params"].items() if "lora_" in n and not torch.equal(p, start[n])]
    assert len(moved) == 2 * 7 * 8  # both factors of each of the matrices
