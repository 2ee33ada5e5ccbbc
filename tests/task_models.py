"""Tiny random models and tokenizers for each task, as Hugging Face folders, and the settings of a run on one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, PreTrainedTokenizerFast

from grass_dist.errors import ConfigError
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.data.loading import load_data
from grass_dist.finetune.setup import load_tokenizer
from grass_dist.finetune.tasks.base import Task
from grass_dist.finetune.tasks.choose import task_of
from tests import media_models

WORDS = ["good", "bad", "a", "film", "the", "was", "ann", "bob", "sees", "paris", "rome", "in", "one", "two", "three"]
ACIDS = list("LAGVSERTIDPKQNFYMHWCXBUZO.-")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def word_tokenizer(words: Sequence[str] = WORDS, *, between: str = " ") -> PreTrainedTokenizerFast:
    """A word each (of proteins a letter), between [CLS] and [SEP]."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit() if between else pre_tokenizers.Split("", "isolated")
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "unk": "[UNK]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, **{f"{name}_token": text for name, text in names.items()}, eos_token="[SEP]"
    )


def save_model(folder: Path, kind: str, auto: str, tokenizer: Any, **more: Any) -> Path:
    """A random model of transformers, e.g. ("bert", "AutoModelForMaskedLM"), with its tokenizer."""
    import transformers

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer) + len(tokenizer) % 2, **more)
    config.pad_token_id = tokenizer.pad_token_id
    getattr(transformers, auto).from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bert(folder: Path, auto: str = "AutoModel", **more: Any) -> Path:
    """A bare encoder unless another class is named; its head is new then, as in the field."""
    return save_model(folder, "bert", auto, word_tokenizer(), **{**SIZES, **NO_DROPOUT, **more})


def esm(folder: Path) -> Path:
    more = {**SIZES, **NO_DROPOUT, "position_embedding_type": "rotary", "token_dropout": True, "mask_token_id": 4}
    return save_model(folder, "esm", "AutoModelForMaskedLM", word_tokenizer(ACIDS, between=""), **more)


def t5(folder: Path) -> Path:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    more = {**sizes, "dropout_rate": 0.0, "decoder_start_token_id": 0, "eos_token_id": 2}
    return save_model(folder, "t5", "AutoModelForSeq2SeqLM", word_tokenizer(), **more)


def llama(folder: Path, template: str) -> Path:
    """A chat model; its template is of roles and words."""
    tokenizer = word_tokenizer([*WORDS, "user", "assistant", "tool", "call", "<end>"])
    tokenizer.chat_template = template
    tokenizer.eos_token = "<end>"
    return save_model(folder, "llama", "AutoModelForCausalLM", tokenizer, **SIZES)


CHAT = (
    "{% for m in messages %}{{ m.role + ' ' + (m.content or '') }}"
    "{% for c in m.tool_calls or [] %}{{ ' call ' + c.function.name }}{% endfor %}{{ ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m.role + ' ' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + ' <end>' }}"
    "{% endgeneration %}{{ ' ' }}{% else %}{{ m.content + ' <end> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def rows_of(task: str, count: int = 48) -> list[dict[str, Any]]:
    """Rows of which each task can learn something."""
    names, places, numbers = ["ann", "bob"], ["paris", "rome"], ["one", "two", "three"]
    rows: list[dict[str, Any]] = []
    for i in range(count):
        name, place, number = names[i % 2], places[i // 2 % 2], numbers[i % 3]
        good = i % 2 == 0
        rows.append(
            {
                "text": f"the film {name} sees was {'good' if good else 'bad'}",
                "label": "yes" if good else "no",
                "words": [name, "sees", place, *["in", "the"][: i % 3]],
                "tags": ["PER", "O", "LOC", *["O", "O"][: i % 3]],
                "prompt": f"{name} sees {number}",
                "completion": f"{number} film",
                "audio": f"clips/{name}_{(spoken := ['one', 'two'][i // 2 % 2])}.wav",
                "transcript": f"{name} {spoken}",
                "image": None if i % 6 == 5 else f"pictures/{'good' if good else 'bad'}.png",
                "asks": "the film was",
                "seen": "a good film" if good else "a bad film",
                "sequence": ("MKTAYIAKQR" * 3)[i % 7 : i % 7 + 12 + i % 5],
                "messages": [
                    {"role": "user", "content": f"{name} sees {number}"},
                    {"role": "assistant", "content": f"{number} film"},
                    {"role": "user", "content": f"in {place}"},
                    {"role": "assistant", "content": f"the {place}"},
                ],
            }
        )
    return rows


COLUMNS: dict[str, dict[str, str]] = {
    "causal-lm": {"messages": "messages"},
    "seq2seq-lm": {"prompt": "prompt", "completion": "completion"},
    "masked-lm": {"text": "text"},
    "sequence-classification": {"text": "text", "label": "label"},
    "token-classification": {"words": "words", "tags": "tags"},
    "protein": {"text": "sequence"},
    "speech": {"audio": "audio", "text": "transcript"},
    "image-text": {"image": "image", "prompt": "asks", "completion": "seen"},
}


def model_for(task: str, folder: Path) -> Path:
    """A model for a task; beside its folder are the recordings or images that rows of `rows_of` name."""
    if task.split()[0] in ("speech", "image-text"):
        media_models.write_media(folder.parent)
    makers: dict[str, Any] = {
        "causal-lm": lambda: llama(folder, CHAT),
        "seq2seq-lm": lambda: t5(folder),
        "masked-lm": lambda: bert(folder, "AutoModelForMaskedLM"),
        "protein": lambda: esm(folder),
        "speech": lambda: media_models.whisper(folder),
        "speech ctc": lambda: media_models.wav2vec2(folder),
        "image-text": lambda: media_models.llava(folder),
    }
    return makers.get(task, lambda: bert(folder))()


def settings_of(task: str, model: Path, data: Path, **data_settings: Any) -> dict[str, Any]:
    """The settings of a short run."""
    return {
        "task": task,
        "name": "small",
        "output_dir": str(data.parent / "runs"),
        "answer_tokens": 4,
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"name": str(data), **COLUMNS[task], "eval_examples": 8, "max_length": 32, **data_settings},
        "train": {
            "max_steps": 10,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "learning_rate": 5e-3,
            "eval_every": 5,
        },
        "grass": {"active_layers": 2, "probe_steps": 2, "sampling_interval": 2, "update_interval": 4},
        "parallel": "single",
    }


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def begun(config: RunConfig) -> tuple[Task, Any]:
    """The task of a run and its data, as the training program makes them."""
    task = task_of(config, load_tokenizer(config.model))
    return task, load_data(config.data, task.tokenizer, 0, task)


def said(config: RunConfig) -> str:
    """The refusal of a run, whose data or model cannot be used."""
    with pytest.raises(ConfigError) as error:
        begun(config)
    return str(error.value)
