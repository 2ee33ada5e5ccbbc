"""The probe of a Trainer's run takes place before its loop, which sees nothing of it."""

from __future__ import annotations

import pytest
import torch
import transformers

from grass_dist import GrassError, GrassOptimizer, disable, enable
from grass_dist.huggingface.logs import controller_of
from grass_dist.huggingface.probe import _is_counter
from tests.trainers import CONFIG, SEEN, Seeing, llama, logged, rows, run_of, switched_off  # noqa: F401

pytestmark = pytest.mark.usefixtures("switched_off")

PROBING = CONFIG.model_copy(update={"probe_steps": 3})
STEPS = {"max_steps": 4, "logging_steps": 1, "warmup_steps": 2, "learning_rate": 1e-2}


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def seen_by(run):
    """The micro-batches of a run, those of the probe first."""
    SEEN.clear()
    run.train()
    return [batch.tolist() for batch, _ in SEEN]


@pytest.mark.parametrize("seedable", [True, False], ids=["seedable sampler", "sampler with a generator"])
def test_training_has_batches_rates_and_draws_of_stock(tmp_path, seedable):
    settings = {**STEPS, "gradient_accumulation_steps": 2, "accelerator_config": {"use_seedable_sampler": seedable}}
    disable()
    stock = run_of(tmp_path, llama(attention_dropout=0.5), Seeing, rows(24), **settings)
    theirs = seen_by(stock)
    enable(PROBING)
    run = run_of(tmp_path, llama(attention_dropout=0.5), Seeing, rows(24), **settings)
    ours = seen_by(run)
    assert ours == theirs[:6] + theirs and len(theirs) == 8
    assert run.state.global_step == 4 and controller_of(run).step == 7
    assert logged(run, "learning_rate") == logged(stock, "learning_rate") == [0, 5e-3, 1e-2, 5e-3]
    assert logged(run, "loss")[:2] == logged(stock, "loss")[:2]  # the first update has a learning rate of 0
    assert logged(run, "loss")[2] != logged(stock, "loss")[2]


def test_a_run_is_the_loop_over_grass_optimizer_to_the_bit(tmp_path):
    enable(PROBING)
    run = run_of(tmp_path, kind=Seeing, data=rows(24), gradient_accumulation_steps=2, weight_decay=0, **STEPS)
    seen_by(run)
    model = llama()
    loop = GrassOptimizer(
        model,
        torch.optim.AdamW,
        {"lr": 1e-2, "weight_decay": 0, "fused": True},
        config=PROBING,
        gradient_accumulation_steps=2,
    )
    schedule = transformers.get_scheduler("linear", loop, 2, 4)
    for step in range(7):
        for batch, items in SEEN[2 * step : 2 * step + 2]:
            model(input_ids=batch, labels=batch, num_items_in_batch=items).loss.backward()
        if step >= 3:
            loop.clip_grad_norm_(1.0)
        loop.step()
        loop.zero_grad()
        if step >= 3:
            schedule.step()
    assert same(run.model, model) and not same(model, llama())
    grass = controller_of(run)
    assert (grass.importances, grass.active_layers) == (loop.grass.importances, loop.grass.active_layers)


def test_evaluations_and_patience_count_updates(tmp_path):
    enable(CONFIG.model_copy(update={"probe_steps": 8}))
    patience = transformers.EarlyStoppingCallback(1)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 1}
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    run = run_of(tmp_path, evaluated=rows(4), callbacks=[patience], max_steps=5, learning_rate=1e-3, **often, **best)
    before = run.evaluate()["eval_loss"]
    run.train()
    losses = [row["eval_loss"] for row in run.state.log_history if "eval_loss" in row]
    assert run.state.global_step == 5 and len(losses) == 5
    assert losses[0] < before and losses == sorted(losses, reverse=True)


def test_one_update_is_enough(tmp_path):
    enable(CONFIG.model_copy(update={"probe_steps": 8}))
    run = run_of(tmp_path, max_steps=1)
    assert run.train().global_step == 1 and not same(run.model, llama())


def test_a_probe_may_be_longer_than_an_epoch(tmp_path):
    enable(CONFIG.model_copy(update={"probe_steps": 5}))
    run = run_of(tmp_path, kind=Seeing, max_steps=4, gradient_accumulation_steps=3)
    seen = seen_by(run)  # four micro-batches an epoch: steps of three and of one
    assert len(seen) == 11 + 8 and controller_of(run).step == 9
    epochs = [seen[at : at + 4] for at in (0, 4, 11, 15)]
    whole = sorted(row["input_ids"].tolist() for row in rows())
    assert [sorted(row for batch in epoch for row in batch) for epoch in epochs] == [whole] * 4


def test_an_interrupted_run_begins_again(tmp_path):
    class Interrupted(transformers.Trainer):
        left = 0

        def training_step(self, *args, **kwargs):
            Interrupted.left -= 1
            if Interrupted.left == 0:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    enable(PROBING)
    runs = []
    for stop in (None, 2, 5, 9):  # not at all; within the first step of the probe, and another one; within training
        Interrupted.left = stop or 0
        run = run_of(tmp_path, kind=Interrupted, gradient_accumulation_steps=2, data=rows(24), **STEPS)
        if stop:
            with pytest.raises(KeyboardInterrupt):
                run.train()
        assert run.train().global_step == 4
        runs.append(run)
    assert [controller_of(run).step for run in runs] == [7, 7, 7, 8]
    assert same(runs[0].model, runs[1].model)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, items):
        self._items = items

    def __iter__(self):
        return iter(self._items)


class Once(Stream):
    def __init__(self, items):
        self._items = iter(items)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._items)


def test_streams(tmp_path, caplog):
    enable(PROBING)
    seen = seen_by(run_of(tmp_path, kind=Seeing, data=Stream(rows(24)), max_steps=4))
    assert seen[:3] == seen[3:6] and len(seen) == 7 and "only once" not in caplog.text
    seen = seen_by(run_of(tmp_path, kind=Seeing, data=Once(rows(24)), max_steps=4))
    # A loader of Accelerate reads one batch ahead.
    assert [batch[0] for batch in seen] == [rows(24)[at]["input_ids"].tolist() for at in (0, 2, 4, 8, 10, 12, 14)]
    assert "Once can be read only once: the probe takes its first batches, which do not train." in caplog.messages
    with pytest.raises(GrassError, match="no batch for the probe, so nothing would be trained"):
        run_of(tmp_path, data=Stream([]), max_steps=4, accelerator_config={"dispatch_batches": False}).train()


def test_what_a_trainer_counts_is_put_back(tmp_path):
    class Counting(transformers.Trainer):
        def compute_loss(self, *args, **kwargs):
            self.calls += 1
            self.losses["train"].append(self.calls)
            self.state.num_input_tokens_seen += 1
            return super().compute_loss(*args, **kwargs)

    enable(PROBING)
    run = run_of(tmp_path, kind=Counting, max_steps=4)
    run.calls, run.losses = 0, (losses := {"train": []})
    run.train()
    assert run.calls == run.state.num_input_tokens_seen == 4
    assert run.losses is losses and losses == {"train": [1, 2, 3, 4]}


def test_counters_are_told_from_data():
    assert all(map(_is_counter, (None, 3, "text", [], {"a": [1.0, (2, None)]}, [0] * 999)))
    assert not any(map(_is_counter, ([0] * 1001, [[0] * 600] * 2, [torch.zeros(1)], {"a": object()}, rows)))
