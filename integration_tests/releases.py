"""What of the ZeRO tests passes on the DeepSpeed that is installed, also on one that is refused at start-up.

    python -m integration_tests.releases [STAGE ...]

To ask another release, put it in front: pip install --no-deps --target DIR deepspeed==VERSION, then PYTHONPATH=DIR:.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable

import torch

from grass_dist.backends.zero import private
from integration_tests import test_zero
from integration_tests.support.parity import check_parity
from integration_tests.support.ranks import run_ranks
from integration_tests.support.reference import run_reference
from integration_tests.support.zero import train_zero
from integration_tests.support.zero_chain import grass_and_chain

SETTINGS, STEPS = test_zero.SETTINGS, test_zero.STEPS


def parity(rank: int, world_size: int, stage: int, folder: str) -> dict:
    return train_zero(rank, world_size, stage, SETTINGS, STEPS)


def chain(rank: int, world_size: int, stage: int, folder: str) -> None:
    assert not any(grass_and_chain(rank, world_size, stage, torch.bfloat16)["differences"])


def overflow(rank: int, world_size: int, stage: int, folder: str) -> None:
    test_zero.overflow(rank, world_size, stage)


def checkpoint(rank: int, world_size: int, stage: int, folder: str) -> None:
    test_zero.checkpoint(rank, world_size, stage, folder, torch.bfloat16)


def ask(rank: int, world_size: int, check: Callable, stage: int, folder: str) -> dict | None:
    private.SUPPORTED, private.ONLY_STAGE_3, private.DROPS_ON_CPU = "", "<0", "<0"
    return check(rank, world_size, stage, folder)


def main() -> None:
    reference = run_reference(SETTINGS, STEPS)
    for stage in [int(argument) for argument in sys.argv[1:]] or [1, 2, 3]:
        for check in (parity, chain, overflow, checkpoint):
            try:
                with tempfile.TemporaryDirectory() as folder:
                    told = run_ranks(2, ask, check, stage, folder, timeout=200)
                if check is parity:
                    check_parity(told, reference)
                problem = "passed"
            except AssertionError as error:
                problem = "FAILED: " + (str(error).strip() or repr(error)).splitlines()[-1][:120]
            print(f"DeepSpeed {private.deepspeed_version()} ZeRO-{stage} {check.__name__} {problem}", flush=True)


if __name__ == "__main__":
    main()
