"""Conversations of many turns: there is loss on what the assistant writes, and on the ends of its turns, alone."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grass_dist.errors import ConfigError
from grass_dist.finetune.data.config import DataConfig
from grass_dist.finetune.data.conversations import Dialogues
from grass_dist.finetune.data.loading import load_data, tokenise

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + ' ' + c.function.arguments | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = CHATML.replace(
    "{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}",
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content or '' }}"
    "{% endgeneration %}{% else %}{{ m.content or '' }}{% endif %}",
)
FORGETFUL = (  # leaves the thinking of earlier turns out, as Qwen3 does
    "{% for m in messages %}{% set text = m.content if loop.last else m.content.split('</think>')[-1] %}"
    "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPENED = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
WITHOUT_END = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Good day."},
    {"role": "user", "content": "Assistant, and now?"},
    {"role": "assistant", "content": "Good night."},
]
CALLS = [
    {"role": "user", "content": "2 * 3?"},
    {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "mul", "arguments": {"a": 2}}}]},
    {"role": "tool", "name": "mul", "content": "6"},
    {"role": "assistant", "content": "It is 6."},
]
CONFIG = DataConfig(name="x", messages="m", max_length=4000)


def tokenizer(template: str | None, eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """A byte each; the special tokens are one id."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = template
    return made


def learnt(template: str, messages: list[dict[str, Any]], eos: str = "<|im_end|>", **row: Any) -> list[str]:
    """The texts that are learnt, one for each turn."""
    made = tokenizer(template, eos)
    config = CONFIG.model_copy(update={"tools": "tools"}) if row else CONFIG
    example = tokenise({"m": messages, **row}, made, config)
    assert len(example["input_ids"]) == len(example["labels"])
    pieces, before = list[list[int]](), -1
    for at, (token, label) in enumerate(zip(example["input_ids"], example["labels"], strict=True)):
        assert label in (token, -100)
        if label == -100:
            continue
        pieces += [] if before == at - 1 and pieces else [[]]
        pieces[-1].append(token)
        before = at
    return [made.decode(piece) for piece in pieces]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["rendered turn by turn", "marked by the template"])
def test_the_turns_of_the_assistant_are_learnt(template):
    assert learnt(template, TALK) == ["Good day.<|im_end|>", "Good night.<|im_end|>"]
    assert learnt(template, TALK[:-2]) == ["Good day.<|im_end|>"]


def test_calls_of_tools_are_learnt_and_results_are_not():
    assert learnt(CHATML, CALLS) == ['<call>mul {"a": 2}<|im_end|>', "It is 6.<|im_end|>"]
    shown = CHATML.replace("{% for m in", "{{ tools | tojson if tools else '' }}{% for m in", 1)
    tools = [{"type": "function", "function": {"name": "mul", "parameters": {"type": "object"}}}]
    assert learnt(shown, CALLS, tools=json.dumps(tools)) == learnt(CHATML, CALLS)
    example = tokenise({"m": CALLS, "t": tools}, made := tokenizer(shown), CONFIG.model_copy(update={"tools": "t"}))
    assert made.decode(example["input_ids"]).startswith('[{"type": "function"')


def test_a_template_that_writes_earlier_turns_in_another_way():
    thought = [dict(message) for message in TALK]
    thought[2]["content"], thought[4]["content"] = "<think>A</think>Good day.", "<think>B</think>Good night."
    assert learnt(FORGETFUL, thought) == ["Good day.<|im_end|>", "<think>B</think>Good night.<|im_end|>"]


def test_what_opens_a_turn_may_be_given():
    thought = [*TALK[:2], {"role": "assistant", "content": "<think>\nA\n</think>\nGood day."}]
    assert learnt(OPENED, thought) == ["A\n</think>\nGood day.<|im_end|>"]


def test_a_template_without_ends_gets_one_at_the_end():
    said = learnt(WITHOUT_END, TALK, eos="<|im_end|>")
    assert said[-1].endswith("Good night.\n<|im_end|>") and "Hello" not in "".join(said)


@pytest.mark.parametrize(
    ("template", "messages", "problem"),
    [
        (None, TALK, "the tokenizer has no chat template"),
        (CHATML.replace("m.content or ''", "(m.content or '') | upper"), TALK, "drops or rewrites"),
        (CHATML, [{"from": "human", "value": "x"}], "message 0 of a row has no role, but has from, value"),
        (CHATML, "no list", "column 'm' holds text that is no JSON"),
        (CHATML.replace("{% for m in", "{{ raise_exception('no') if messages | length > 3 }}{% for m in", 1), TALK,
         r"the tokenizer's chat template refuses a conversation \(no\)"),
        (CHATML.replace("<call>' + c.function.name", "<call>'"), CALLS, "drops the call of 'mul'"),
    ],
)  # fmt: skip
def test_what_cannot_be_taught_is_refused(template, messages, problem):
    with pytest.raises(ConfigError, match=problem):
        tokenise({"m": messages}, tokenizer(template), CONFIG)


@pytest.mark.parametrize("kind", ["jsonl", "text in jsonl", "parquet", "saved"])
def test_conversations_are_read_from_any_file(tmp_path, kind):
    rows = [{"m": TALK if i % 2 else CALLS, "other": i} for i in range(8)]
    rows.append({"m": [{"role": "user", "content": "nobody answers"}], "other": 9})
    name = tmp_path / "d.jsonl"
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(name := tmp_path / "d.parquet")
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(name := tmp_path / "d")
    else:
        told = [{**row, "m": json.dumps(row["m"])} if kind == "text in jsonl" else row for row in rows]
        name.write_text("\n".join(map(json.dumps, told)))
    data = load_data(
        DataConfig(name=str(name), messages="m", eval_examples=0, max_length=4000), made := tokenizer(CHATML), 0
    )
    assert len(data.train) == 8 and data.train.unanswered == 1  # type: ignore[arg-type]
    expected = [tokenise({"m": row["m"]}, made, CONFIG) for row in rows[:8]]
    assert list(data.train) == expected  # type: ignore[arg-type]


@pytest.mark.skipif(find_spec("trl") is None, reason="the templates of models that people use come with trl")
@pytest.mark.parametrize(
    ("name", "eos", "said"),
    [
        ("qwen3", "<|im_end|>", ["Good day.<|im_end|>", "<think>\n\n</think>\n\nGood night.<|im_end|>"]),
        ("qwen2_5", "<|im_end|>", ["Good day.<|im_end|>", "Good night.<|im_end|>"]),
        ("qwen3_training", "<|im_end|>", [f"<think>\n\n</think>\n\nGood {d}.<|im_end|>\n" for d in ("day", "night")]),
        ("llama3_1", "<|eot_id|>", ["Good day.<|eot_id|>", "Good night.<|eot_id|>"]),
        ("gemma3", "<end_of_turn>", ["Good day.<end_of_turn>", "Good night.<end_of_turn>"]),
        ("glm4moe", "<|user|>", [f"\n<think></think>\nGood {d}.<|user|>" for d in ("day", "night")]),
    ],
)
def test_templates_that_people_use(name, eos, said):
    import trl

    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    found = learnt(template, TALK, eos)
    assert [text.strip().removeprefix(">").strip() for text in found] == [text.strip() for text in said]


def test_the_question_is_the_last_turn():
    made = tokenizer(CHATML)
    given = made.decode(Dialogues(made).given_ids(TALK[:-1], None))
    assert given.endswith("and now?<|im_end|>\n<|im_start|>assistant\n")
