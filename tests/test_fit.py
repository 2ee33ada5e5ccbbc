"""Tokenizers, pad tokens and lengths that do not fit the model are found before the first step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from grass_dist.errors import ConfigError
from grass_dist.finetune.answers import greedy_answer
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.data.batches import Example
from grass_dist.finetune.data.loading import Stream, load_data
from grass_dist.finetune.fit import Padding, check_fit, learnt_positions, vocabulary_of

BYTES = 257
"""The ids of the tokenizer: `</s>` and one for each byte; what is added comes after them."""

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def tokenizer(**names: Any) -> PreTrainedTokenizerFast:
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    byte_level.train_from_iterator([], trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=byte_level, **names)


def model(kind: str = "llama", vocabulary: int = BYTES, positions: int = 64, **more: Any) -> Any:
    settings = AutoConfig.for_model(kind, vocab_size=vocabulary, **{**SMALL, **more})
    settings.max_position_embeddings = positions
    settings.rotary_dim = 4
    return AutoModelForCausalLM.from_config(settings).eval()


def run_of(folder: Path, answer: str = "an answer", **data: Any) -> RunConfig:
    rows = [json.dumps({"q": f"question {index}", "a": answer if index == 7 else "yes"}) + "\n" for index in range(12)]
    (folder / "x.jsonl").write_text("".join(rows))
    given = {"name": str(folder / "x.jsonl"), "prompt": "q", "completion": "a", "eval_examples": 0, "max_length": 64}
    return RunConfig.model_validate(
        {
            "model": {"name": "the/model"},
            "data": {**given, **data},
            "train": {"max_steps": 4},
            "grass": {"active_layers": 1, "probe_steps": 1},
        }
    )


def fitted(config: RunConfig, model: Any, tokenizer: Any) -> tuple[Padding, Any]:
    data = load_data(config.data, tokenizer, 0)
    return check_fit(config, model, tokenizer, data), data.train


def refused(*args: Any) -> str:
    with pytest.raises(ConfigError) as error:
        fitted(*args)
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "longest"),
    [
        *[(kind, 64) for kind in ("gpt2", "opt", "gptj", "codegen", "biogpt", "gpt_bigcode", "openai-gpt", "ctrl")],
        *[(kind, 64) for kind in ("bert", "electra", "roformer", "trocr", "xlm")],
        ("roberta", 62),  # counts from the row after that of its padding
        *[(kind, None) for kind in ("llama", "gpt_neox", "xglm", "bloom", "mpt", "falcon", "gemma2", "phi", "mamba")],
    ],
)
def test_learnt_positions_are_those_that_a_model_takes(kind, longest):
    made = model(kind, **({"pad_token_id": 1} if kind == "roberta" else {}))
    assert learnt_positions(made) == longest
    with torch.no_grad():
        made(input_ids=torch.full((1, longest or 80), 5))
        if longest is not None:
            with pytest.raises((IndexError, RuntimeError)):
                made(input_ids=torch.full((1, longest + 1), 5))


def test_a_length_beyond_the_learnt_positions_is_refused(tmp_path):
    said = refused(run_of(tmp_path, max_length=65), model("gpt2"), tokenizer(eos_token="</s>"))
    assert said == (
        "data.max_length=65: the/model has learnt 64 positions, and no example can be longer; use 64 or less."
    )
    assert fitted(run_of(tmp_path), model("gpt2"), tokenizer(eos_token="</s>"))[0] == Padding(0)
    assert fitted(run_of(tmp_path, max_length=900), model("llama"), tokenizer(eos_token="</s>"))[0] == Padding(0)


def test_a_tokenizer_without_pad_and_eos_is_refused(tmp_path):
    said = refused(run_of(tmp_path), model(), tokenizer())
    assert said.startswith("model.name='the/model': its tokenizer names neither an eos token nor a pad token")
    assert said.endswith("set eos_token in its tokenizer_config.json.")


def test_another_token_pads_where_the_pad_token_has_no_weights(tmp_path):
    names = {"eos_token": "</s>", "pad_token": "[PAD]"}
    padding, _ = fitted(run_of(tmp_path), model(), tokenizer(**names))
    assert padding.id == 0 and padding.told is not None
    assert "pad token '[PAD]' (id 257, 257 embeddings): batches are padded with '</s>' (id 0)" in padding.told
    assert fitted(run_of(tmp_path), model(vocabulary=258), tokenizer(**names))[0] == Padding(257)


@pytest.mark.parametrize("more", [{}, {"packing": True}, {"eval_examples": 6}])
def test_a_token_without_weights_is_named(tmp_path, more):
    added = tokenizer(eos_token="</s>")
    added.add_tokens(["<tool>"])
    said = refused(run_of(tmp_path, "a <tool> call", **more), model(), added)
    assert said == (
        "model.name='the/model': its tokenizer writes '<tool>' as id 257, and the model has weights for the ids below "
        "257; give it the tokenizer that it was trained with, or resize its embeddings and save it with them."
    )
    fitted(run_of(tmp_path, "a <tool> call", **more), model(vocabulary=258), added)
    fitted(run_of(tmp_path, **more), model(), added)  # the data do not use it


def test_an_eos_token_without_weights_is_named(tmp_path):
    added = tokenizer(eos_token="<end>")
    assert "its tokenizer writes '<end>' as id 257" in refused(run_of(tmp_path), model(), added)


@pytest.mark.parametrize("packing", [False, True])
def test_a_token_without_weights_is_named_within_a_stream(tmp_path, packing):
    added = tokenizer(eos_token="</s>")
    added.add_tokens(["<tool>"])
    config = run_of(tmp_path, "a <tool> call", streaming=True, shuffle_buffer=0, packing=packing)
    _, stream = fitted(config, model(), added)
    assert isinstance(stream, Stream)
    made: list[Example] = []
    with pytest.raises(ConfigError, match="its tokenizer writes '<tool>' as id 257"):
        made.extend(stream.example(item) for item in stream.epoch(0, 0))
    assert packing or len(made) == 7


def test_labels_are_held_to_the_rows_of_the_head():
    made = model()
    made.set_output_embeddings(torch.nn.Linear(32, 200, bias=False))
    vocabulary = vocabulary_of("the/model", made, tokenizer(eos_token="</s>"))
    vocabulary.check({"input_ids": [250, 3], "labels": [-100, 3]})
    with pytest.raises(ConfigError, match="weights for the ids below 200"):
        vocabulary.check({"input_ids": [3, 250], "labels": [3, 250]})


def test_an_answer_ends_with_the_positions():
    made, words = model("gpt2", positions=16), tokenizer(eos_token="</s>")
    made.generation_config.eos_token_id = None
    assert len(words(greedy_answer(made, words, [65] * 12, 40))["input_ids"]) <= 16
    said = greedy_answer(made, words, [65] * 16, 40)
    assert said == "(the prompt has 16 tokens, and the model 16 positions)"
