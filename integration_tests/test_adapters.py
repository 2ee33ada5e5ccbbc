"""Adapters beside drawn layers on every backend: the same weights as one process that is written out by hand."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from integration_tests.support.lora import SETTINGS, STEPS, with_lora
from integration_tests.support.parity import check_parity
from integration_tests.support.reference import run_reference
from integration_tests.support.scenarios import FOUR, TWO, Spawn, scenarios
from integration_tests.support.training import train_grass

pytest.importorskip("peft")
pytestmark = [pytest.mark.timeout(420), pytest.mark.long]

ZERO = Spawn(2, before=gc.freeze, timeout=400)


@pytest.fixture(scope="module")
def reference():
    return run_reference(SETTINGS, STEPS, make=with_lora)


def trained(rank: int, world_size: int, backend: str, offload: dict | None = None, **how: Any) -> dict[str, Any]:
    settings = SETTINGS if offload is None else {**SETTINGS, "offload": offload}
    return train_grass(rank, world_size, backend, settings, STEPS, **how)


def with_zero(rank: int, world_size: int, stage: int, **how: Any) -> dict[str, Any]:
    from integration_tests.support.zero import train_zero

    return train_zero(rank, world_size, stage, SETTINGS, STEPS, **how)


@scenarios(
    TWO(trained, "fsdp2"),
    TWO(trained, "fsdp2", {"mode": "stream"}, sync_every_micro_batch=False),
    TWO(trained, "ddp"),
    TWO(trained, "ddp", {"mode": "none"}, accumulation=1, sync_every_micro_batch=False),
    TWO(trained, "ddp", {"weights": "host"}),
    FOUR(trained, "hsdp"),
    *(ZERO(with_zero, stage) for stage in (1, 2, 3)),
)
def test_ranks_are_one_process(runs, reference):
    check_parity(runs, reference)
