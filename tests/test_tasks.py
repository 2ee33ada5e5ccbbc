"""Each task in one process: how a row becomes features, what is lost, and which metric is counted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from grass_dist.errors import ConfigError
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.data.loading import Stream
from grass_dist.finetune.setup import load_model, load_tokenizer
from grass_dist.finetune.tasks.base import Predictions
from grass_dist.finetune.tasks.choose import TASKS, task_of
from tests.task_models import WORDS, begun, bert, model_for, rows_of, said, settings_of, write_rows

CPU = torch.device("cpu")


def run_of(task: str, folder: Path, rows: list[dict[str, Any]] | None = None, **data: Any) -> RunConfig:
    file = write_rows(folder / "rows.jsonl", rows or rows_of(task))
    return RunConfig(**settings_of(task, model_for(task, folder / "model"), file, **data))


@pytest.mark.parametrize("name", TASKS)
def test_a_task_learns_and_tells_its_metrics(name, tmp_path):
    config = run_of(name, tmp_path)
    task, data = begun(config)
    model = load_model(config, CPU, task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    held_out = task.collate([task.vary(example, 0, i) for i, example in enumerate(data.held_out)])

    def measured() -> tuple[float, dict[str, float]]:
        with torch.no_grad():
            loss, counts = task.measure(model.eval(), held_out)
        mean = loss.item() / task.targets(held_out).item()
        return mean, task.metrics(mean, counts)

    before, metrics = measured()
    for step in range(1, 31):
        model.train()
        batch = task.collate([task.vary(data.train[(8 * step + i) % len(data.train)], step, i) for i in range(8)])
        (task.loss(model, batch) / task.targets(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    after, better = measured()
    assert after < 0.8 * before, (before, after)
    expected = {"accuracy", "f1"} if "classification" in name else {"perplexity", "accuracy"}
    expected |= {"wer"} if name == "speech" else set()
    assert set(better) == (expected - {"accuracy"} if name == "causal-lm" else expected)
    if "perplexity" in better:
        assert better["perplexity"] == pytest.approx(math.exp(after))
    if "accuracy" in better:
        assert better["accuracy"] > metrics["accuracy"]
    question = task.ask(data.held_out_rows)
    assert question is not None and task.answer(model, question["prompt"], CPU)
    assert task.shown(data.first)["learnt"] > 0


def test_the_loss_of_rows_is_that_of_transformers(tmp_path):
    """Where transformers has a mean over the same targets."""
    for name in ("sequence-classification", "token-classification", "masked-lm", "seq2seq-lm"):
        (folder := tmp_path / name).mkdir()
        config = run_of(name, folder)
        task, data = begun(config)
        model: Any = load_model(config, CPU, task).eval()
        batch = task.collate([task.vary(data.train[i], 1, i) for i in range(5)])
        mean = task.loss(model, batch) / task.targets(batch)
        assert mean.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5), name


def test_labels_of_rows_are_numbered_and_padded(tmp_path):
    task, data = begun(run_of("sequence-classification", tmp_path))
    assert task.names == ["no", "yes"]  # type: ignore[attr-defined]
    batch = task.collate([data.train[0], data.train[1]])
    assert batch["labels"].shape == (2,) and batch["input_ids"].shape == batch["attention_mask"].shape
    tokens, tagged = begun(run_of("token-classification", tmp_path))
    assert tokens.names == ["LOC", "O", "PER"]  # type: ignore[attr-defined]
    example = tagged.train[0]
    assert example["labels"][0] == example["labels"][-1] == -100  # [CLS] and [SEP]
    assert [x for x in example["labels"] if x != -100][:3] == [2, 1, 0]
    longest = max(range(len(tagged.train)), key=lambda i: len(tagged.train[i]["labels"]))
    shortest = min(range(len(tagged.train)), key=lambda i: len(tagged.train[i]["labels"]))
    batch = tokens.collate([tagged.train[longest], tagged.train[shortest]])
    assert batch["labels"][1, len(tagged.train[shortest]["labels"]) :].eq(-100).all()


def test_metrics_by_hand(tmp_path):
    task, _ = begun(run_of("token-classification", tmp_path))  # LOC, O, PER
    truth = torch.tensor([0, 0, 1, 2, 2, -100, 1])
    guess = torch.tensor([0, 1, 1, 2, 0, 2, 2])
    counts = task.counts(Predictions(nn.functional.one_hot(guess, 3).float(), truth))
    assert counts == [1, 1, 1, 2, 2, 2, 2, 2, 2]
    found = task.metrics(0.0, counts)
    assert found["accuracy"] == pytest.approx(3 / 6)
    assert found["f1"] == pytest.approx((2 / 4 + 2 / 4) / 2)  # of LOC and PER; O does not count
    rows, _ = begun(run_of("sequence-classification", tmp_path))
    counts = rows.counts(Predictions(torch.tensor([[1.0, 0], [1, 0], [0, 1]]), torch.tensor([0, 1, 1])))
    assert rows.metrics(0.0, counts) == pytest.approx({"accuracy": 2 / 3, "f1": (2 / 3 + 2 / 3) / 2})


def test_masks_follow_seed_step_and_place(tmp_path):
    text = " ".join(WORDS[i % 15] for i in range(28))
    config = run_of("masked-lm", tmp_path, [{"text": text}] * 12, mask_probability=0.3)
    task, data = begun(config)
    again, _ = begun(config)
    other, _ = begun(config.model_copy(update={"train": config.train.model_copy(update={"seed": 7})}))
    example = data.train[0]
    drawn = task.vary(example, 3, 5)
    torch.rand(7)  # the global generator has no part in it
    assert drawn == task.vary(example, 3, 5) == again.vary(example, 3, 5)
    variants = [task.vary(example, 4, 5), task.vary(example, 3, 6), other.vary(example, 3, 5)]
    assert all(each != drawn for each in variants)
    for step in range(40):
        one = task.vary(example, step, 0)
        for given, hidden, label in zip(example["input_ids"], one["input_ids"], one["labels"], strict=True):
            assert label in (-100, given) and (label != -100 or hidden == given)
        assert one["labels"][0] == one["labels"][-1] == -100
    share = sum(x != -100 for step in range(200) for x in task.vary(example, step, 0)["labels"]) / (200 * 28)
    assert 0.27 < share < 0.33


def test_a_stream_of_labels_needs_their_names(tmp_path):
    config = run_of("sequence-classification", tmp_path, streaming=True, eval_examples=2)
    assert said(config).startswith("labels=None: the labels of a stream are not known before it is read; name them")
    named = config.model_copy(update={"data": config.data.model_copy(update={"labels": ["no", "yes"]})})
    _, data = begun(named)
    assert isinstance(data.train, Stream) and data.first["labels"] in ([0], [1])


def test_proteins_are_read_from_fasta(tmp_path):
    (tmp_path / "p.fasta").write_text(">sp|P1|ONE first of all\nMKTAY\nIAKQR*\n>two\nmkvla g\n\n>three\nLLLL\n")
    config = run_of("protein", tmp_path)
    data = config.data.model_copy(update={"name": str(tmp_path / "p.fasta"), "eval_examples": 1})
    task, found = begun(config.model_copy(update={"data": data}))
    texts = ["".join(task.tokenizer.convert_ids_to_tokens(e["input_ids"][1:-1])) for e in found.train]
    texts += ["".join(task.tokenizer.convert_ids_to_tokens(e["input_ids"][1:-1])) for e in found.held_out]
    assert sorted(texts) == ["LLLL", "MKTAYIAKQR", "MKVLAG"]
    (tmp_path / "p.fasta").write_text(">one\nMKT\n>none\n>two\nMKT\n")
    bad = config.model_copy(update={"data": data.model_copy(update={"eval_examples": 0})})
    assert "record 2 of p.fasta has no sequence ('none')" in said(bad)
    words = run_of("protein", tmp_path, [{"sequence": "1234 5678"}] * 10)
    assert "its tokenizer does not know most letters of '12345678'" in said(words)


@pytest.mark.parametrize(
    ("task", "data", "message"),
    [
        ("masked-lm", {"text": None, "prompt": "prompt", "completion": "completion"},
         r"^data.completion='completion': task=masked-lm does not learn it; set data.text instead\."),
        ("sequence-classification", {"label": None}, r"^data.text='text': task=.* does not learn it; set data.label"),
        ("masked-lm", {"packing": True}, r"^data.packing=True: task=masked-lm has one example a row"),
        ("seq2seq-lm", {"mask_probability": 0.2}, r"^data.mask_probability=0.2: task=seq2seq-lm hides no tokens"),
        ("causal-lm", {"text": "text"}, r"^data.messages='messages': excludes text; keep one of them"),
        ("causal-lm", {"chat_template": False}, r"^data.chat_template=False: messages are written by the chat"),
        ("causal-lm", {"messages": None, "label": "label"}, r"^data.label='label': needs text; set text"),
        ("token-classification", {"tags": None}, r"^data.tags=None: words needs it"),
        ("masked-lm", {"labels": ["a", "b"]}, r"^data.labels=\['a', 'b'\]: there is no column of labels"),
        ("sequence-classification", {"labels": ["a"]}, r"^data.labels=\['a'\]: it must be two or more different"),
    ],
)  # fmt: skip
def test_columns_that_do_not_fit_a_task(task, data, message, tmp_path):
    settings = settings_of(task, tmp_path, tmp_path / "rows.jsonl", **data)
    settings["data"] = {key: value for key, value in settings["data"].items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        RunConfig(**settings)


def test_data_that_do_not_fit_are_refused(tmp_path):
    rows = rows_of("token-classification")
    missing = run_of("sequence-classification", tmp_path, label="sentiment")
    assert "label='sentiment': there is no column 'sentiment'" in said(missing)
    assert "line 1 of rows.jsonl does not fill tags (column 'text' holds text that is no JSON)" in said(
        run_of("token-classification", tmp_path, tags="text")
    )
    uneven = [{**row, "tags": row["tags"][:-1]} if i == 9 else row for i, row in enumerate(rows)]
    assert "a row has 3 words and 2 tags" in said(run_of("token-classification", tmp_path, uneven))
    one = run_of("sequence-classification", tmp_path, [{"text": "good", "label": "yes"}] * 12)
    assert "all rows have the label 'yes': there is nothing to tell apart" in said(one)
    other = run_of("sequence-classification", tmp_path, labels=["yes", "maybe"])
    assert "a row has the label 'no', and the labels are yes, maybe" in said(other)
    causal = run_of("causal-lm", tmp_path)
    model = causal.model_copy(update={"task": "masked-lm", "data": causal.data.model_copy(update={"messages": None})})
    tokenizer = load_tokenizer(causal.model)
    tokenizer.mask_token = None
    with pytest.raises(ConfigError, match="its tokenizer has no mask token, which task=masked-lm needs"):
        task_of(model, tokenizer)


def test_a_head_of_another_size_is_refused_or_new(tmp_path, caplog):
    config = run_of("sequence-classification", tmp_path)
    bert(tmp_path / "model", "AutoModelForSequenceClassification", num_labels=5)
    task, _ = begun(config)
    with pytest.raises(ConfigError, match=r"its classifier\.\w+ is of another size than the data need; name"):
        load_model(config, CPU, task)
    allowed = config.model_copy(update={"model": config.model.model_copy(update={"allow_missing_weights": True})})
    model: Any = load_model(allowed, CPU, task)
    assert model.classifier.out_features == 2 and model.config.id2label == {0: "no", 1: "yes"}
    known = {"id2label": {0: "yes", 1: "other", 2: "no"}, "label2id": {"yes": 0, "other": 1, "no": 2}}
    bert(tmp_path / "model", "AutoModelForSequenceClassification", **known)
    task, _ = begun(config)
    assert task.names == ["yes", "other", "no"]  # type: ignore[attr-defined]  # the model's own order
    assert load_model(config, CPU, task).classifier.out_features == 3  # type: ignore[union-attr]


def test_models_of_another_kind_are_refused(tmp_path):
    config = run_of("masked-lm", tmp_path)
    text = config.model_copy(update={"task": "causal-lm"})
    with pytest.raises(ConfigError, match="it is an encoder, in which each token sees the next one.*set task to"):
        load_model(text, CPU, task_of(text, load_tokenizer(text.model)))
    pairs = run_of("causal-lm", tmp_path).model_copy(update={"task": "seq2seq-lm"})
    with pytest.raises(ConfigError, match="it is no model for this task; choose another one, or another task"):
        load_model(pairs, CPU, task_of(pairs, load_tokenizer(pairs.model)))


def test_a_new_head_is_told_and_a_lacking_body_refused(tmp_path, caplog):
    config = run_of("token-classification", tmp_path)
    task, _ = begun(config)
    load_model(config, CPU, task)
    assert "classifier.bias, classifier.weight is new on" in caplog.text
    bert(tmp_path / "model")
    lacking = run_of("masked-lm", tmp_path)
    bert(tmp_path / "model")  # a bare encoder: its head for words is a weight that is missing
    task, _ = begun(lacking)
    with pytest.raises(ConfigError, match="its files lack cls.predictions"):
        load_model(lacking, CPU, task)
