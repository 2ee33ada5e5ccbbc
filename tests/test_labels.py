"""What an example teaches: the answer and the end of the turn, whatever the chat template looks like."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import grass_dist.cli
from grass_dist.errors import ConfigError, shorten
from grass_dist.finetune.data.config import DataConfig
from grass_dist.finetune.data.loading import Stream, load_data, render_prompt, tokenise
from grass_dist.finetune.data.shown import LONGEST, shown
from grass_dist.finetune.identity import data_identity

QA: dict[str, Any] = {"name": "x.jsonl", "prompt": "q", "completion": "a"}
MERGES = ["\n\n", "ee", "en", "end", "<b", "the", "as", "Yes", " x"] * 50
"""Texts whose characters become one token, across the border of prompt and answer too."""

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
OPENS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def each(turn: str) -> str:
    return "{% for m in messages %}" + turn + "{% endfor %}"


def assistant(turn: str, block: str) -> str:
    """A template whose assistant's turns are a block of their own."""
    return each("{% if m.role == 'assistant' %}" + block + "{% else %}" + turn + "{% endif %}")


TEMPLATES = {
    "chatml": each(TURN) + OPENS,
    "opens think": each(TURN) + OPENS.replace("assistant\n", "assistant\n<think>\n"),
    "no generation prompt": each(TURN),
    "list of parts": each(TURN.replace("{{ m.content }}", "{% for c in m.content %}{{ c.text }}{% endfor %}")) + OPENS,
    "first of the parts": each(TURN.replace("m.content", "m.content[0]['text']")) + OPENS,
    "strips": each(TURN.replace("m.content", "m.content | trim")) + OPENS,
    "block with the end": assistant(
        TURN, "<|im_start|>assistant\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    )
    + OPENS,
    "block without the end": assistant(
        TURN, "<|im_start|>assistant\n{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n"
    )
    + OPENS,
    "block after an opening": assistant(
        TURN, "<|im_start|>assistant\n<think>\n{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n"
    )
    + OPENS.replace("assistant\n", "assistant\n<think>"),
    "block, opens think": assistant(
        TURN, "<|im_start|>assistant\n{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n"
    )
    + OPENS.replace("assistant\n", "assistant\n<think>\n"),
    "closes think": assistant(TURN, "<|im_start|>assistant\n<think>\n\n</think>\n\n{{ m.content }}<|im_end|>\n")
    + OPENS.replace("assistant\n", "assistant\n<think>\n"),
    "an empty think": assistant(TURN, "<|im_start|>assistant\n<think></think>{{ m.content }}<|im_end|>\n")
    + OPENS.replace("assistant\n", "assistant\n<think>\n"),
    "reasons": assistant(
        TURN,
        "{% if '</think>' in m.content %}<|im_start|>assistant\n{{ m.content }}<|im_end|>\n"
        "{% else %}<|im_start|>assistant\n<think>\n\n</think>\n\n{{ m.content }}<|im_end|>\n{% endif %}",
    )
    + OPENS.replace("assistant\n", "assistant\n<think>\n"),
    "llama 3": "<s>"
    + each("<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>")
    + OPENS.replace("assistant\n", "assistant{{ '\n\n' }}"),
    "no end": "<s>" + each("{{ m.role }}: {{ m.content }}\n") + "{% if add_generation_prompt %}assistant: {% endif %}",
    "changes the prompt": each("{% if m.role == 'user' and loop.last %}[last]{% endif %}" + TURN) + OPENS,
}
CLOSES = "\n</think>\n\n"
BEFORE = {
    "closes think": CLOSES,
    "an empty think": "</think>",
    "reasons": CLOSES,
    "no generation prompt": "<|im_start|>assistant\n",
}
"""What the model learns to write before its answer."""


def make_tokenizer(template: str | None = None, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level, so that it loses nothing, with some merges; ``bos``: it puts <s> before a text, as Llama's does."""
    special = ["<|im_start|>", "<|im_end|>", "<s>"]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(MERGES, trainer)
    inner.add_special_tokens([AddedToken(token, special=True) for token in special])
    if bos:
        inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", bos_token="<s>")
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {name: make_tokenizer(template) for name, template in TEMPLATES.items()}


def learns(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], **changes: Any) -> str:
    labels = tokenise(row, tokenizer, DataConfig(**{**QA, **changes}))["labels"]
    return str(tokenizer.decode([label for label in labels if label != -100]))


def expected(name: str, answer: str) -> list[str]:
    """What may be learnt: one text or, where a token crosses the beginning of a block, two."""
    stripped = answer.strip() if name in ("strips", "llama 3") else answer
    text = BEFORE.get(name, "") + stripped + ("\n" if name == "no end" else "") + "<|im_end|>"
    return [text, "\n" + text] if name == "block after an opening" and answer.startswith("\n") else [text]


ANSWERS = ["b", "d", "e", "end", "yes", "\n\nYes", "<b>x</b>", "<", "assistant", " a  b ", "é你"]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "answer", ["b", "d", "e", "end", "yes", "\n\nYes", "<b>x</b>", "<", "assistant", " a  b ", "é你"]
)
def test_the_answer_and_the_end_are_learnt(name, answer):
    tokenizer = TOKENIZERS[name]
    assert learns(tokenizer, {"q": "Which end?", "a": answer}) in expected(name, answer)
    example = tokenise({"q": "Which end?", "a": answer}, tokenizer, DataConfig(**QA))
    prompt = render_prompt(tokenizer, "Which end?")
    assert example["input_ids"][: len(prompt)] == prompt, "the model is given what it is given when it answers"
    assert "Which end?" in str(tokenizer.decode(prompt)) and set(example["labels"][: len(prompt)]) == {-100}


# A text with a special token in it, or with the opening itself, is another matter.
TEXT = st.text(st.sampled_from("abdenYsx <>|/\n\t.é你"), max_size=12)


@given(TEXT, TEXT.filter(str.strip))
@settings(max_examples=60, deadline=None)
def test_any_answer_is_learnt_whole(prompt, answer):
    for name, tokenizer in TOKENIZERS.items():
        assert learns(tokenizer, {"q": prompt, "a": answer}) in expected(name, answer), name


@pytest.mark.parametrize("answer", ["<think>\nso</think>e", "<think>so</think>e"])
def test_an_answer_with_its_own_opening_does_not_get_it_twice(answer):
    tokenizer = TOKENIZERS["opens think"]
    example = tokenise({"q": "?", "a": answer}, tokenizer, DataConfig(**QA))
    text = str(tokenizer.decode(example["input_ids"]))
    assert text.endswith("assistant\n<think>\nso</think>e<|im_end|>") and text.count("<think>") == 1


def test_an_answer_with_reasoning_is_learnt_without_a_given_tag():
    answer = "<think>\nI add.\n</think>\n\nIt is 4."
    assert learns(TOKENIZERS["reasons"], {"q": "2+2?", "a": answer}) == answer.removeprefix("<think>\n") + "<|im_end|>"


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_no_space_precedes_an_answer_that_continues_an_opening(scheme):
    """Tokenizers of the sentencepiece kind put a space before a text of its own."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    spaces = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    inner.decoder = spaces
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "</s>"], show_progress=False)
    inner.train_from_iterator(["▁user: what assistant: <think> yes\n</think>"] * 9, trainer)
    inner.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        each("{{ m.role }}: {{ m.content }}</s>") + "{% if add_generation_prompt %}assistant: <think>{% endif %}"
    )
    for answer in ("yes", "s", " yes"):
        ids = tokenise({"q": "what", "a": answer}, tokenizer, DataConfig(**QA))["input_ids"]
        assert str(tokenizer.decode(ids)).endswith(f"assistant: <think>{answer}</s>")


def test_an_end_token_within_the_answer_does_not_cut_it():
    answer = "one<|im_end|>two"
    assert learns(TOKENIZERS["chatml"], {"q": "?", "a": answer}) == answer + "<|im_end|>"
    assert learns(TOKENIZERS["no end"], {"q": "?", "a": answer}) == answer + "\n<|im_end|>"


DROPS = {
    "drops or rewrites the completion": each("{% if m.role == 'user' %}" + TURN + "{% endif %}"),
    "drops or rewrites the prompt": each("{% if m.role == 'assistant' %}" + TURN + "{% endif %}") + OPENS,
    r"drops or rewrites the completion 'so</think>e'": each(
        TURN.replace("m.content", "m.content.split('</think>')[-1]")
    )
    + OPENS,
    r"marks, with its \{% generation %\} blocks, only a part of the completion 'so</think>e'": assistant(
        TURN,
        "{{ m.content.split('</think>')[0] }}</think>"
        "{% generation %}{{ m.content.split('</think>')[-1] }}{% endgeneration %}<|im_end|>",
    ),
    r"cannot be used \(no chat here\)": "{{ raise_exception('no chat here') }}",
    r"cannot be used \(Unexpected end of template.*\)": "{% for m in messages %}",
    r"cannot be used \(not this row\)": "{% if 'Which' in messages[0].content %}{{ raise_exception('not this row') }}"
    "{% endif %}" + each(TURN) + OPENS,
}  # fmt: skip


@pytest.mark.parametrize(("problem", "template"), DROPS.items(), ids=list(DROPS))
def test_a_template_that_does_not_write_both_is_refused(tmp_path, problem, template):
    row = {"q": "Which?", "a": "so</think>e"}
    with pytest.raises(ConfigError, match=rf"^chat_template=True: the tokenizer's chat template {problem}; set data"):
        load_data(config_of(tmp_path, [row]), make_tokenizer(template), 0)
    assert learns(make_tokenizer(template), row, chat_template=False) == "so</think>e<|im_end|>"


SOME = {
    # What it spoils, the template's line for a message, a row that it spoils, and one that it writes as it is.
    "drops short prompts": (
        "prompt", "{% if m.role == 'assistant' or m.content|length > 12 %}{{ m.content }}{% endif %}",
        ("Which?", "yes"), ("Which one is it?", "yes"),
    ),
    "rewrites short prompts": (
        "prompt", "{{ 'Hello' if m.role == 'user' and m.content|length < 5 else m.content }}",
        ("2+2?", "yes"), ("2 + 2?", "yes"),
    ),
    "cuts long prompts": (
        "prompt", "{{ m.content | truncate(40) }}",
        ("What is the sum of 1 2 3 4 5 6 7 8 9 " * 2, "yes"), ("What is the sum of 1 2 3?", "45"),
    ),
    "cuts long answers": (
        "completion", "{{ m.content[:20] }}",
        ("Which?", "yes, for many reasons that follow"), ("Which?", "yes"),
    ),
    "replaces short answers": (
        "completion", "{{ 'I cannot say' if m.role == 'assistant' and m.content|length < 3 else m.content }}",
        ("Which?", "a"), ("Which?", "yes"),
    ),
    "replaces one answer": (
        "completion", "{{ 'I cannot say' if m.content == 'I' else m.content }}",
        ("Which?", "I"), ("Which?", "I do"),
    ),
    "drops an answer that it writes before each": (
        "completion", "{{ 'No: ' if m.role == 'assistant' else '' }}{{ m.content | replace('No', '') }}",
        ("Which?", "No"), ("Which?", "no"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("part", "line", "spoilt", "kept"), SOME.values(), ids=list(SOME))
def test_a_template_that_spoils_rows_is_refused_at_the_first(tmp_path, part, line, spoilt, kept):
    tokenizer = make_tokenizer(each(TURN.replace("{{ m.content }}", line)) + OPENS)
    rows = [dict(zip("qa", row, strict=True)) for row in (kept, spoilt)]
    assert learns(tokenizer, rows[0]).endswith(kept[1] + "<|im_end|>")
    shown_text = re.escape(repr(shorten(spoilt[part == "completion"], 40)))
    message = rf"^chat_template=True: the tokenizer's chat template drops or rewrites the {part} {shown_text}; set data"
    with pytest.raises(ConfigError, match=message):
        load_data(config_of(tmp_path, rows), tokenizer, 0)
    if part == "prompt":
        with pytest.raises(ConfigError, match=message):
            render_prompt(tokenizer, spoilt[0])
    assert learns(tokenizer, rows[1], chat_template=False) == spoilt[1] + "<|im_end|>"


def test_a_tokenizer_without_offsets_still_learns_the_answer(monkeypatch):
    tokenizer = make_tokenizer(TEMPLATES["block without the end"])
    apply = tokenizer.apply_chat_template

    def without(*args: Any, return_assistant_tokens_mask: bool = False, **options: Any) -> Any:
        if return_assistant_tokens_mask:
            raise NotImplementedError("no offsets")
        return apply(*args, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", without)
    assert learns(tokenizer, {"q": "?", "a": "e"}) == "e<|im_end|>"


def test_a_template_that_is_exchanged_counts_at_once():
    tokenizer = make_tokenizer(TEMPLATES["chatml"])
    assert learns(tokenizer, {"q": "?", "a": " e"}) == " e<|im_end|>"
    tokenizer.chat_template = TEMPLATES["strips"]
    assert learns(tokenizer, {"q": "?", "a": " e"}) == "e<|im_end|>"


# -------------------------------------------------------------------------------------------------------- BOS


@pytest.mark.parametrize("text", ["hello", "<s>hello"])
def test_bos_comes_once(text):
    tokenizer = make_tokenizer(bos=True)
    ids = tokenise({"t": text}, tokenizer, DataConfig(name="x", text="t"))["input_ids"]
    assert str(tokenizer.decode(ids)) == "<s>hello<|im_end|>"
    ids = tokenise({"q": text, "a": "e"}, tokenizer, DataConfig(**QA))["input_ids"]
    assert str(tokenizer.decode(ids)) == "<s>helloe<|im_end|>"
    tokenizer.chat_template = TEMPLATES["llama 3"]
    ids = tokenise({"q": "?", "a": "e"}, tokenizer, DataConfig(**QA))["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    without = make_tokenizer()
    ids = tokenise({"t": "<s><s>hello"}, without, DataConfig(name="x", text="t"))["input_ids"]
    assert str(without.decode(ids)) == "<s><s>hello<|im_end|>", "what the text says itself stays"


# ------------------------------------------------------------------------------------------ rows, files, names


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def config_of(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> DataConfig:
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return DataConfig(**{**QA, "name": str(folder / "d.jsonl"), "eval_examples": 0, "shuffle_buffer": 0, **changes})


def taught(config: DataConfig, tokenizer: PreTrainedTokenizerFast | None = None) -> list[str]:
    tokenizer = tokenizer or TOKENIZERS["chatml"]
    train = load_data(config, tokenizer, 0).train
    examples = map(train.example, train.epoch(0, 0)) if isinstance(train, Stream) else train
    found = [tokenizer.decode([label for label in example["labels"] if label != -100]) for example in examples]
    return [str(text).removesuffix("<|im_end|>") for text in found]


WRITTEN = {
    "numbers": ["18", "12345678901234567", "2.5", "2.50", "1e5", "-0", "0.10000000000000000555111512", "9" * 400],
    "dates": ['"2024-01-31"', '"2024-02-29"', '"2024-02-29T12:00:00Z"'],
    "booleans": ["true", "false"],
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("on_bad_line", ["stop", "skip"])
@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_what_the_file_writes_is_taught(tmp_path, kind, streaming, on_bad_line, name):
    lines = [f'{{"q": "?", "a": {value}, "other": {value}}}' for value in WRITTEN[kind]]
    (tmp_path / name).write_text("\n".join(lines) if name == "d.jsonl" else f"[{', '.join(lines)}]")
    options = {"streaming": streaming, "on_bad_line": on_bad_line, "eval_examples": 0, "shuffle_buffer": 0}
    config = DataConfig(**{**QA, "name": str(tmp_path / name), **options})
    answers = [value.strip('"') for value in WRITTEN[kind]]
    assert taught(config) == answers
    if on_bad_line == "stop":
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / name).write_text((tmp_path / name).read_text())
        assert taught(config.model_copy(update={"name": str(tmp_path / "folder")})) == answers
    other = config.model_copy(update={"name": str(tmp_path / "e.jsonl"), "eval": config.name, "eval_examples": 9})
    (tmp_path / "e.jsonl").write_text('{"q": "?", "a": 3}')
    assert [row["a"] for row in load_data(other, TOKENIZERS["chatml"], 0).held_out_rows] == answers


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("on_bad_line", ["stop", "skip"])
def test_a_name_is_a_name(tmp_path, monkeypatch, streaming, on_bad_line):
    monkeypatch.chdir(tmp_path)
    for name, answer in {"run[1].jsonl": "right", "run1.jsonl": "OTHER", "a*.jsonl": "star", "ab.jsonl": "b"}.items():
        Path(name).write_text(json.dumps({"q": "?", "a": answer}))
    options = {**QA, "streaming": streaming, "on_bad_line": on_bad_line, "eval_examples": 0, "shuffle_buffer": 0}
    assert taught(DataConfig(**{**options, "name": "run[1].jsonl"})) == ["right"]
    assert taught(DataConfig(**{**options, "name": "a*.jsonl"})) == ["star"], "there is a file of this name"
    assert taught(DataConfig(**{**options, "name": "*n*.jsonl"})) == ["OTHER", "right"]
    assert taught(DataConfig(**{**options, "name": "run[*.jsonl"})) == ["right"], "only * is a pattern"
    data = load_data(DataConfig(**{**options, "name": "r*.jsonl"}), TOKENIZERS["chatml"], 0)
    assert list(data.told()) == ["r*.jsonl stands for 2 files: run1.jsonl, run[1].jsonl"]
    with pytest.raises(ConfigError, match=r"^eval='run1.jsonl': run1.jsonl is one of the files of name, 'r\*"):
        load_data(DataConfig(**{**options, "name": "r*.jsonl", "eval": "run1.jsonl", "eval_examples": 1}),
                  TOKENIZERS["chatml"], 0)  # fmt: skip
    for name in ("run?.jsonl", "run[2].jsonl", "x*.jsonl"):
        with pytest.raises(ConfigError, match="there is no such file"):
            taught(DataConfig(**{**options, "name": name}))


@pytest.mark.parametrize("streaming", [False, True])
def test_the_training_file_is_not_held_out_under_another_name(tmp_path, monkeypatch, streaming):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    Path("t.jsonl").write_text('{"q": "?", "a": "yes"}\n{"q": "?", "a": "no"}')
    Path("linked.jsonl").symlink_to("t.jsonl")
    Path("hard.jsonl").hardlink_to("t.jsonl")
    Path("same.jsonl").write_text(Path("t.jsonl").read_text())
    options = {**QA, "streaming": streaming, "eval_examples": 1}
    for name in ("t.jsonl", "t*.jsonl"):
        for other in (
            "./t.jsonl",
            "sub/../t.jsonl",
            str(tmp_path / "t.jsonl"),
            "linked.jsonl",
            "hard.jsonl",
            "l*.jsonl",
        ):
            with pytest.raises(ConfigError, match=r"^eval='.*': .* is one of the files of name, 't.*; hold out a file"):
                load_data(DataConfig(**{**options, "name": name, "eval": other}), TOKENIZERS["chatml"], 0)
        data = load_data(DataConfig(**{**options, "name": name, "eval": "same.jsonl"}), TOKENIZERS["chatml"], 0)
        assert len(data.held_out) == 1, "another file may say the same"
    Path("folder").mkdir()
    Path("t.jsonl").rename("folder/train.jsonl")
    with pytest.raises(ConfigError, match=r"^eval='./folder': it is the folder of name, 'folder'; use split:NAME"):
        load_data(DataConfig(**{**options, "name": "folder", "eval": "./folder"}), TOKENIZERS["chatml"], 0)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_whose_path_looks_like_a_pattern_is_refused(tmp_path, streaming):
    for name, answer in {"run[1]": "right", "run1": "OTHER"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(json.dumps({"q": "?", "a": answer}))
    config = DataConfig(**{**QA, "name": str(tmp_path / "run[1]"), "eval_examples": 0, "streaming": streaming})
    with pytest.raises(ConfigError, match=r"^name='.*': its path, .*, has a \[, \* or \?, .*; rename the folder"):
        load_data(config, TOKENIZERS["chatml"], 0)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_splits_of_a_folder_of_files(tmp_path, streaming):
    for name, answers in {"train-1": [1, 2.0], "train-2": [3.50], "validation": [4]}.items():
        lines = [json.dumps({"q": "?", "a": answer}) for answer in answers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    options = {**QA, "name": str(tmp_path), "shuffle_buffer": 0, "streaming": streaming}
    data = load_data(DataConfig(**options, eval="split:validation", eval_examples=5), TOKENIZERS["chatml"], 0)
    assert [row["a"] for row in data.held_out_rows] == ["4"]
    assert taught(DataConfig(**options, eval_examples=0)) == ["1", "2.0", "3.5"]
    slices = DataConfig(**options, eval_examples=0, split="train[1:]+validation")
    if streaming:
        with pytest.raises(ConfigError, match=r"has the split 'train' or 'validation', and no slices of it"):
            taught(slices)
    else:
        assert taught(slices) == ["2.0", "3.5", "4"]
    (tmp_path / "train-2.jsonl").write_text('{"q": "?", "a": oops}')
    with pytest.raises(ConfigError, match=r"^(data\.)?name='.*: line 1 of train-2\.jsonl is no JSON .*; repair it\.$"):
        taught(DataConfig(**options, eval_examples=0))


@pytest.mark.parametrize("on_bad_line", ["stop", "skip"])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_an_answer_are_left_out_and_counted(tmp_path, streaming, packing, on_bad_line):
    rows = [{"q": "?", "a": answer} for answer in ("yes", "", None, " \n", "no")]
    options = {"streaming": streaming, "packing": packing, "on_bad_line": on_bad_line}
    config = config_of(tmp_path, rows, **options)
    data = load_data(config, TOKENIZERS["chatml"], 0)
    sentence = "3 rows {}have no answer: left out"
    if isinstance(data.train, Stream):
        for _ in range(2):
            assert len(list(data.train.epoch(0, 0))) == (1 if packing else 2)
        assert list(data.train.told()) == [sentence.format("of the stream ")] and not list(data.told())
    else:
        assert data.train.unanswered == 3 and list(data.told()) == [sentence.format("")]
    assert "".join(taught(config)) == ("yes<|im_end|>no" if packing else "yesno")
    within = config.model_copy(update={"completion": "It is: {a}"})
    end = "<|im_end|>" if packing else ""
    assert "".join(taught(within)) == f"It is: yes{end}It is: no", "a template around nothing is no answer"
    assert len(taught(config.model_copy(update={"completion": "{q} {a}"}))) == (1 if packing else 5)
    held = config.model_copy(update={"name": str(tmp_path / "e.jsonl"), "eval": config.name, "eval_examples": 5})
    (tmp_path / "e.jsonl").write_text('{"q": "?", "a": "b"}')
    data = load_data(held, TOKENIZERS["chatml"], 0)
    assert len(data.held_out) == len(data.held_out_rows) == 2
    assert list(data.told()) == ["3 held-out rows have no answer: left out"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_without_any_answer_is_refused(tmp_path, streaming):
    config = config_of(tmp_path, [{"q": "?", "a": None}, {"q": "?", "a": " "}], streaming=streaming)
    which = "none of the first 2 rows" if streaming else "none of the 2 rows"
    with pytest.raises(ConfigError, match=rf"^completion='a': {which} of .*d\.jsonl has an answer; name the column"):
        load_data(config, TOKENIZERS["chatml"], 0)
    with pytest.raises(ConfigError, match=rf"^completion='It is: {{a}}': {which} of .*d\.jsonl has an answer; name"):
        load_data(config.model_copy(update={"completion": "It is: {a}"}), TOKENIZERS["chatml"], 0)
    text = config.model_copy(update={"prompt": None, "completion": None, "text": "a"})
    with pytest.raises(ConfigError, match=rf"^text='a': {which} of .*d\.jsonl has text; name the column"):
        load_data(text, TOKENIZERS["chatml"], 0)


@pytest.mark.parametrize("packing", [False, True])
def test_examples_keep_their_identity_if_a_template_has_the_day(tmp_path, packing):
    config = config_of(tmp_path, [{"q": "?", "a": "b"}] * 3, packing=packing)
    dated = [make_tokenizer("{{ strftime_now('') }}" + day + TEMPLATES["chatml"]) for day in ("Mon", "Tuesday")]
    identities = [data_identity(load_data(config, tokenizer, 0).train) for tokenizer in dated]
    assert identities[0] == identities[1] != data_identity(load_data(config, TOKENIZERS["chatml"], 0).train)


def test_unusable_held_out_rows_are_reported_as_held_out(tmp_path):
    rows = [{"q": "?", "a": "b"}] * 4
    held = config_of(tmp_path, rows).model_copy(update={"eval": str(tmp_path / "e.jsonl"), "eval_examples": 2})
    (tmp_path / "e.jsonl").write_text('{"q": "?", "a": null}\n{"q": "?", "a": ""}\n')
    with pytest.raises(
        ConfigError, match=r"none of the 2 rows of .*e\.jsonl that are held out has an answer; hold out"
    ):
        load_data(held, TOKENIZERS["chatml"], 0)
    (tmp_path / "e.jsonl").write_text(json.dumps({"q": "?" * 5000, "a": "b"}) + "\n")
    with pytest.raises(
        ConfigError, match=r"none of the 1 rows of .*e\.jsonl that are held out has a token of its compl"
    ):
        load_data(held, TOKENIZERS["chatml"], 0)


# ---------------------------------------------------------------------------------------------- the shown example


def test_an_example_is_shown_as_the_model_sees_it():
    tokenizer = TOKENIZERS["chatml"]
    example = tokenise({"q": "é <s>?", "a": "the end"}, tokenizer, DataConfig(**QA))
    found = shown(example, tokenizer)
    assert "".join(piece["text"] for piece in found["pieces"]) == tokenizer.decode(example["input_ids"])
    learnt = [(piece["text"], piece["special"]) for piece in found["pieces"] if piece["learnt"]]
    assert learnt == [("the end", False), ("<|im_end|>", True)]
    assert found["tokens"] == len(example["input_ids"])
    assert found["learnt"] == sum(label != -100 for label in example["labels"])
    assert [p["text"] for p in found["pieces"] if p["special"]] == [
        "<|im_start|>", "<s>", "<|im_end|>", "<|im_start|>", "<|im_end|>"
    ]  # fmt: skip
    long = tokenise({"q": "?", "a": "x" * 3 * LONGEST}, tokenizer, DataConfig(**QA, max_length=9999))
    (text,) = [p["text"] for p in shown(long, tokenizer)["pieces"] if "x" in p["text"]]
    assert text.startswith("xxx") and text.endswith("xxx") and f"[… {2 * LONGEST} tokens …]" in text


def test_the_command_shows_the_first_example(tmp_path):
    make_tokenizer(TEMPLATES["opens think"]).save_pretrained(tmp_path / "model")
    rows = [{"q": "none", "a": None}, {"q": "[red]Which\x1b[31m?[/red]", "a": "e"}]
    data = config_of(tmp_path, rows).model_dump(exclude_defaults=True)
    settings = {"model": {"name": str(tmp_path / "model")}, "data": data, "train": {"max_steps": 9}, "grass": {}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    result = CliRunner().invoke(grass_dist.cli.app, ["show", str(tmp_path / "run.yaml"), "name=other"])
    assert result.exit_code == 0, result.output
    shows, told = result.output.rsplit("\n", 2)[:2]
    assert shows == (
        "<|im_start|>user\n[red]Which\ufffd[31m?[/red]<|im_end|>\n<|im_start|>assistant\n<think>\n>>>e<|im_end|><<<"
    )
    assert told.endswith(" tokens; 2 of them are learnt (between >>> and <<<).")
    result = CliRunner().invoke(grass_dist.cli.app, ["show", str(tmp_path / "run.yaml"), "data.completion=z"])
    assert result.exit_code == 1 and "data.completion='z': there is no column 'z'" in result.output
