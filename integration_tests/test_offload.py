"""States that come and go: the same run to the bit on every backend, and no more memory than is said.

The bytes that move are counted exactly by the soak (`soak_trainings.Account`), which test_soak.py runs in short.
"""

from __future__ import annotations

from itertools import pairwise

import pytest

from integration_tests.offload import BASE, CASES, every_mode
from integration_tests.support.ranks import run_ranks

pytestmark = pytest.mark.timeout(400)
QUICK = [(2, "fsdp2"), (2, "zero2")]
MORE = [(2, "ddp"), (2, "zero1"), (2, "zero3"), (4, "ddp"), (4, "zero2")]
LONG = [(4, "hsdp"), (4, "zero3")]
BACKENDS = [
    *QUICK,
    *(pytest.param(p, marks=pytest.mark.integration) for p in MORE),
    *(pytest.param(p, marks=pytest.mark.long) for p in LONG),
]


def named(backend: tuple[int, str]) -> str:
    return f"{backend[1]} on {backend[0]}"


FEWER = ["three layers", "layers of unequal sizes"]


@pytest.fixture(scope="module", params=BACKENDS, ids=named)
def told(request):
    world_size, backend = request.param
    cases = (
        ["three layers"]
        if world_size == 4
        else list(CASES)
        if backend == "fsdp2"
        else [*FEWER, *(["bf16"] if backend == "zero2" else [])]
    )
    return backend, run_ranks(world_size, every_mode, backend, cases, timeout=380)


def runs_of(told):
    _, ranks = told
    for rank in ranks:
        for case, modes in rank.items():
            for mode, run in modes.items():
                yield f"{case}, {mode}", case, mode, run


def test_the_same_to_the_bit(told):
    for name, _, _, run in runs_of(told):
        assert run["differing weights"] == [] and run["differing states"] == [], name


def test_the_runs_test_something(told):
    _, ranks = told
    for case, modes in ranks[0].items():
        active = [layers for layers in modes["none"]["active"] if layers]
        assert all(run["active"] == modes["none"]["active"] for run in modes.values())
        switches = sum(a != b for a, b in pairwise(active))
        if case != "all layers":
            assert switches >= (8 if case == "three layers" else 4), case
            gone, back = set(), set()
            for before, layers in pairwise(active):
                back |= gone & set(layers)
                gone |= set(before) - set(layers)
            assert back, case
            assert any(set(a) & set(b) and a != b for a, b in pairwise(active)) or case == "one layer"


def test_no_more_memory_than_is_said(told):
    for name, case, mode, run in runs_of(told):
        if mode == "none":
            continue
        longest, roles = longest_slot(run), run["roles"]
        gamma = CASES.get(case, {}).get("active_layers", BASE["active_layers"])
        slots = min(2, gamma) if mode == "stream" else gamma
        for step, (device, host) in enumerate(run["bytes"]):
            landing = mode == "interval" and slots < 8
            assert device <= (slots + landing) * longest + roles, (name, step)
            assert host <= sum(run["layers"]) * 1.1, (name, step)
        assert run["bytes"][-1][0] >= slots * min(run["layers"])


def longest_slot(run) -> float:
    """A slot: the longest state, and what ZeRO's padding may take."""
    return max(run["layers"]) * 1.15


def test_each_rank_keeps_its_part(told):
    backend, ranks = told
    shards = {"hsdp": 2}.get(backend, len(ranks))
    totals = [sum(rank["three layers"]["stream"]["layers"]) for rank in ranks]
    one = 8 * 8 * 36_992  # bytes of exp_avg and exp_avg_sq of eight layers in fp32
    whole = one * (1.5 if backend in ("zero1", "zero2") else 1)
    born = sum(n > 0 for n in ranks[0]["three layers"]["stream"]["layers"]) / 8
    for total in totals:
        assert total == pytest.approx(whole * born / shards, rel=0.1)


def test_slots_are_made_once(told):
    for name, case, mode, run in runs_of(told):
        if mode == "none":
            continue
        gamma = CASES.get(case, {}).get("active_layers", BASE["active_layers"])
        slots = min(2, gamma) if mode == "stream" else min(gamma + 1, 8)
        assert 0 < len(run["slots"]) <= slots, name
