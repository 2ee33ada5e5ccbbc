"""The comparison: LISA is what is published, rates are searched as stated, and the page says what the results say."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import throughput
from benchmarks.document import page, tables
from benchmarks.engines import METHODS
from benchmarks.peers import __main__ as peers
from benchmarks.peers.methods import METHODS as LEARNERS
from benchmarks.peers.methods import TRIED
from benchmarks.peers.one import own_part
from benchmarks.peers.task import is_right
from grass_dist import GrassConfig, GrassOptimizer
from grass_dist.method.samplers import draw_layers, make_sampler
from tests.tiny import loss_of, tiny

ADAMW = {"lr": 1e-2, "weight_decay": 0.1}


def test_uniform_trains_as_lisa_is_published():
    # Algorithm 1 of arXiv 2403.17919: every K steps all layers but a few are frozen, embeddings and head never are; one
    # AdamW has all weights, and what is frozen has no gradient, so that its states stay as they are.
    ours, theirs = tiny(), tiny()
    config = GrassConfig(active_layers=2, sampler="uniform", sampling_interval=3, seed=4)
    optimizer = GrassOptimizer(ours, torch.optim.AdamW, ADAMW, config=config)
    adamw = torch.optim.AdamW(theirs.parameters(), **ADAMW)
    trained = set()
    for step in range(20):
        trained |= set(optimizer.grass.active_layers)
        for number, layer in enumerate(theirs.layers):
            layer.requires_grad_(number in optimizer.grass.active_layers)
        for model, steps in ((ours, optimizer), (theirs, adamw)):
            loss_of(model, step).backward()
            steps.step()
            steps.zero_grad()
    assert len(trained) > 4  # several came back, with the states that they had
    for (name, own), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(own, other), name


def test_uniform_draws_every_set_of_layers_equally_often():
    config = GrassConfig(active_layers=2, sampler="uniform", seed=1)
    sampler = make_sampler(config, 5)
    counts = Counter(tuple(sorted(draw_layers(sampler, np.ones(5), config, number))) for number in range(5000))
    pairs = list(itertools.combinations(range(5), 2))
    assert set(counts) == set(pairs) and stats.chisquare([counts[pair] for pair in pairs]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("losses", "tried", "best"),
    [
        ({"middle": 2, "high": 1, "low": 0}, ["middle", "high"], "high"),
        ({"middle": 1, "high": 2, "low": 3}, ["middle", "high", "low"], "middle"),
        ({"middle": 2, "high": 3, "low": 1}, ["middle", "high", "low"], "low"),
        ({"middle": 2, "high": float("nan"), "low": 3}, ["middle", "high", "low"], "middle"),
    ],
    ids=["high", "middle", "low", "high diverges"],
)
def test_a_rate_takes_two_or_three_trainings_then_two_seeds(tmp_path, losses, tried, best):
    rates = dict(zip(("low", "middle", "high"), LEARNERS["grass"][1], strict=True))

    def train(lr: float, seed: int) -> None:
        loss = next(losses[name] for name, known in rates.items() if known == lr)
        told = {"method": "grass", "lr": lr, "seed": seed, "held_out_loss": loss}
        peers.file_of(tmp_path, "grass", lr, seed).write_text(json.dumps(told))

    order = []
    while not (todo := peers.missing(tmp_path, ["grass"]))[0][3]:
        order.append(todo[0][1:3])
        train(*order[-1])
    assert order == [*((rates[name], 0) for name in tried), (rates[best], 1), (rates[best], 2)]
    assert todo == [("grass", rates[best], seed, True) for seed in (0, 1, 2)]


def test_ranks_that_divide_a_batch_have_its_loss_in_their_mean():
    labels = torch.tensor([[1, 2, 3, -100], [-100, 1, -100, -100], [0, 1, 2, 3], [9, -100, 2, -100]])
    batch = {"labels": labels, "losses": torch.rand(4, 4)}

    def loss(some: dict[str, torch.Tensor]) -> torch.Tensor:
        return some["losses"][:, 1:][some["labels"][:, 1:] != -100].mean()

    parts = [own_part(batch, rank, 2) for rank in (0, 1)]
    torch.testing.assert_close(sum(loss(own) * share for own, share in parts) / 2, loss(batch))
    assert own_part(batch, 0, 1)[1] == 1.0


def test_an_answer_is_right_by_its_number():
    assert is_right("A: 13 + 17 = 30. The answer is 15.\nThen 3 more", "15.0")
    assert is_right("The answer is $1,500.", "1500") and is_right("so 3 and then 4", "4")
    assert not is_right("The answer is 16, not 15", "15.0") and not is_right("none", "1") and not is_right("1.2.3", "1")


def test_what_was_tried_is_what_the_names_say(tmp_path):
    own = {"method": "grass", "lr": 3e-4, "held_out_loss": 0.5, "settings": {"temperature": 1.0, "seed": 1}}
    runs = [own | {"seed": seed, "settings": own["settings"] | {"seed": seed}} for seed in (0, 1)]
    runs += [own | {"seed": 0, "lr": lr, "held_out_loss": 0.9} for lr in (1e-3, 1e-4)]
    others = [
        {"method": "grass-sharp", "seed": s, "held_out_loss": 0.4 + s / 10, "settings": {"temperature": 0.3, "seed": s}}
        for s in (0, 1)
    ]
    assert (
        list(tables.tried(others, runs))[-1]
        == "| temperature = 0.3 | 0.4500 | -0.0500 ± 0.6353 (2 seeds; within chance) |"
    )
    assert set(TRIED).isdisjoint(LEARNERS)


def test_a_table_of_step_times_has_medians_of_ratios_in_a_round():
    told = {
        "seconds": {"full": [2.0, 4.0, 8.0], "grass": [1.0, 2.4, 2.0]},
        "full": {"full": [2.0, 4.0, 8.0], "grass": [2.0, 4.0, 8.0]},
        "draws": {"grass": [False, True, False]},
        "limits": {"grass": [0.75, 0.7]},
        "refused": {"badam": "AssertionError: no"},
    }
    record = {"wrappers": {"zero2": told}}
    found = list(throughput.table(record))
    assert f"| {METHODS['grass']} | 0.500 (0.250–0.600) | 0.700 | 0.750 |" in found
    assert f"| {METHODS['badam']} | refused |  |  |" in found
    assert found[-1].endswith("| 1.600 |  |  |")
    assert list(throughput.refusals(record)) == ["BAdam under zero2: AssertionError: no"]


def test_the_page_is_made_of_the_results(tmp_path: Path):
    page.write_page(tmp_path)
    assert (tmp_path / "benchmarks.md").read_text() == (page.DOCS / "benchmarks.md").read_text(), (
        "results or template have changed: python -m benchmarks.document"
    )
    for image in ("bench_throughput.svg", "bench_peers.svg"):
        assert (page.DOCS / "images" / image).exists() and (tmp_path / "images" / image).stat().st_size > 1000


def test_the_tests_that_the_page_on_alternatives_names_are_there():
    root = page.DOCS.parent
    text = (page.DOCS / "alternatives.md").read_text()
    named = re.findall(r"\[`([\w.]+)(?:::(\w+))?`\]\(\.\./(\w+/[\w.]+)\)", text)
    assert len(named) > 20
    for shown, test, file in named:
        assert Path(file).name == shown and f"def {test}" in (root / file).read_text(), (shown, test)
    assert all("](../" in line for line in text.splitlines() if line.startswith("| ") and "| test |" not in line)


def test_a_run_adds_to_a_result_of_the_same_arguments_alone():
    record = {"arguments": {"batch": 1, "backends": ["ddp"], "json": "b"}, "ranks": 2, "device": "CPU", "torch": "2"}
    known = {**record, "arguments": {"batch": 1, "backends": ["fsdp2"], "json": None}, "wrappers": {"fsdp2": 1}}
    assert throughput.wrappers_of(known, record) == {"fsdp2": 1}
    for other in ({"arguments": {"batch": 2}}, {"ranks": 1}, {"torch": "3"}):
        assert throughput.wrappers_of(known | other, record) == {}


def test_a_run_of_some_methods_replaces_those_alone():
    known = {"seconds": {"full": [1], "lora": [2], "lisa": [3]}, "refused": {"badam": "no"}}
    told = {"seconds": {"full": [4], "badam": [5]}, "refused": {"lora": "never"}}
    found = throughput.with_methods(known, told)
    assert found == {"seconds": {"lisa": [3], "full": [4], "badam": [5]}, "refused": {"lora": "never"}}
    assert throughput.with_methods({}, told) == told
