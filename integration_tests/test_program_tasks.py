"""Each task in launch/finetune.py: the same trajectory, metrics and weights on any ranks, and after a resume."""

from __future__ import annotations

import json
import re
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from transformers import AutoProcessor

from integration_tests.support.program import AUTO, check_refused, events, run_all, run_program
from tests.task_models import model_for, rows_of, settings_of, write_rows

pytestmark = pytest.mark.timeout(400)

long = pytest.mark.long
LIMIT = 180
"""Seconds for a run."""
STEPS = {"sequence-classification": 25}
"""Of tasks that begin with a random head, which learns little in the 10 steps of the others."""
WAYS = ["ddp", "zero2", "zero3"]
ZERO = {"stage3_param_persistence_threshold": 0}


@pytest.fixture(scope="module")
def config_of(tmp_path_factory):
    """The YAML file of a run of a task; zero2.json and zero3.json lie beside it."""
    made: dict[str, Path] = {}

    def make(task: str) -> Path:
        if task not in made:
            folder = tmp_path_factory.mktemp(task)
            for stage in (2, 3):
                zero = {"stage": stage, **ZERO}
                (folder / f"zero{stage}.json").write_text(json.dumps({**AUTO, "zero_optimization": zero}))
            rows = write_rows(folder / "rows.jsonl", rows_of(task))
            made[task] = folder / "config.yaml"
            settings = settings_of(task.split()[0], model_for(task, folder / "model"), rows)
            settings["train"]["max_steps"] = STEPS.get(task, 10)
            if task == "image-text":  # then a rank may have a text without an image while the other one has an image
                settings["train"]["micro_batch_size"] = 1
            made[task].write_text(yaml.safe_dump(settings))
        return made[task]

    return make


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Those of the saved model, which any user can load with what belongs to it."""
    folder = run / "model"
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, found = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"], found
    assert (folder / "processor_config.json").exists() == hasattr(AutoProcessor.from_pretrained(folder), "tokenizer")
    return model.state_dict()


def check_same(run: Path, other: Path) -> None:
    """The same steps, evaluations with all metrics, answers and weights, up to the order of sums."""
    mine, theirs = events(run, "step"), events(other, "step")
    for name in ("active_layers", "phase", "tokens", "lr"):
        assert [s[name] for s in mine] == [s[name] for s in theirs], name
    assert [s["loss"] for s in mine] == pytest.approx([s["loss"] for s in theirs], abs=2e-5)
    for one, another in zip(events(run, "eval"), events(other, "eval"), strict=True):
        numbers = [{name: value for name, value in e.items() if name != "event"} for e in (one, another)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)
    answers = [[(a["when"], a["text"]) for a in events(folder, "answer")] for folder in (run, other)]
    assert [answer[0] for answer in answers[0]] == ["before", "after"] and answers[0] == answers[1]
    trained, reference = weights(run), weights(other)
    assert trained.keys() == reference.keys()
    # Adam divides by the gradient's own size, so an entry with hardly any (a key of T5) shows the order of the sums.
    assert max((trained[name] - reference[name]).abs().max().item() for name in reference) < 1e-4


@pytest.mark.parametrize(
    "task",
    [
        pytest.param("sequence-classification", marks=pytest.mark.integration),
        *(pytest.param(t, marks=long) for t in ("causal-lm", "masked-lm", "token-classification", "seq2seq-lm")),
        *(pytest.param(t, marks=long) for t in ("protein", "speech", "speech ctc", "image-text")),
    ],
)
def test_a_task_is_the_same_on_two_ranks(task, config_of):
    alone = run_all(config_of(task), 1, "name=alone", timeout=LIMIT)
    losses = [e["loss"] for e in events(alone, "eval")]
    assert losses[-1] < losses[0], losses
    check_same(run_all(config_of(task), 2, "name=fsdp2", "parallel=fsdp2", timeout=LIMIT), alone)
    assert (alone / "report.html").stat().st_size > 50_000


@long
@pytest.mark.parametrize(
    ("task", "way"),
    [
        *product(["sequence-classification", "masked-lm", "causal-lm", "seq2seq-lm", "image-text"], WAYS),
        *product(["speech", "speech ctc"], ["ddp", "zero2"]),
    ],
)
def test_a_task_is_the_same_in_every_way(task, way, config_of):
    config = config_of(task)
    alone = config.parent / "runs" / "alone"
    if not alone.exists():
        alone = run_all(config, 1, "name=alone", timeout=LIMIT)
    parallel = ["parallel=ddp"] if way == "ddp" else ["parallel=deepspeed", f"parallel.config={way}.json"]
    check_same(run_all(config, 2, f"name={way}", *parallel, timeout=LIMIT), alone)


@long
def test_masks_go_on_where_they_were(config_of):
    saves = ["parallel=fsdp2", "train.checkpoint.every=3", "train.checkpoint.keep=5"]
    whole = run_all(config_of("masked-lm"), 2, "name=whole", *saves, timeout=LIMIT)
    copy = whole.with_name("copy")
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "model")
    for later in ("step-000009", "step-000010"):
        shutil.rmtree(copy / "checkpoints" / later)
    ended = run_program([["--config", str(config_of("masked-lm")), "--resume", "auto", "name=copy", *saves]] * 2, LIMIT)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    losses = [{s["step"]: s["loss"] for s in events(folder, "step")} for folder in (copy, whole)]
    assert losses[0] == losses[1]
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(copy).items())
    refused = ["--resume", "auto", "name=copy", *saves, "data.mask_probability=0.3"]
    ended = run_program([["--config", str(config_of("masked-lm")), *refused]] * 2)
    check_refused(ended, r"data.mask_probability=0.3: the run that it goes on with has null")


@long
def test_a_file_that_breaks_while_it_trains_ends_all_ranks(config_of):
    config = config_of("image-text")
    rows = [json.loads(line) for line in (config.parent / "rows.jsonl").read_text().splitlines()]
    whole = (config.parent / "pictures" / "good.png").read_bytes()
    (config.parent / "cut.png").write_bytes(whole[:45])  # its header is good, and its size known by another image
    rows[7]["image"] = "cut.png"
    write_rows(config.parent / "cut.jsonl", rows)
    arguments = ["--config", str(config), "name=cut", "parallel=fsdp2", "data.eval_examples=2", "data.name=cut.jsonl"]
    ended = run_program([arguments] * 2, LIMIT, cwd=[str(config.parent)] * 2)
    assert [rank.code for rank in ended] == [1, 1]
    sentence = r"error: (?:rank \d: )?data.image='cut.png': \S*cut.png cannot be read \(.*; repair the file, or leave"
    told = [len(re.findall(sentence, rank.err)) for rank in ended]
    assert sorted(told) == [0, 1], [rank.err for rank in ended]


@pytest.mark.integration
def test_a_column_and_a_model_that_do_not_fit_are_refused(config_of):
    config = config_of("sequence-classification")
    for overrides, message in (
        (["data.label=sentiment"], r"data.name=.*no column 'sentiment'|data.label='sentiment': there is no column"),
        (["task=seq2seq-lm", "data.text=null", "data.label=null", "data.prompt=prompt", "data.completion=completion"],
         r"model.name=.*it is no model for this task; choose another one, or another task"),
    ):  # fmt: skip
        ended = run_program([["--config", str(config), "name=refused", "parallel=fsdp2", *overrides]] * 2)
        check_refused(ended, message)
    assert not re.search("refused", " ".join(path.name for path in (config.parent / "runs").glob("*")))
