"""What a sentence shows of a long value."""

from __future__ import annotations

import errno

import pytest

from grass_dist.errors import ConfigError, RanksDisagree, shorten
from grass_dist.finetune.config import ModelConfig
from grass_dist.finetune.setup import load_tokenizer
from grass_dist.ranks import raise_if_ranks_differ


def test_a_long_value_keeps_its_beginning_and_its_end():
    assert shorten("abcdefghij", 10) == "abcdefghij"
    assert shorten("abcdefghijk", 10) == "abcd...ijk"
    path = "/scratch/" + "long/" * 40 + "train.jsonl"
    said = str(ConfigError("data.name", path, "there is no such file", "give the path of a file"))
    value = said.removeprefix("data.name=").partition(": there")[0]
    assert value.startswith("'/scratch/long") and value.endswith("/train.jsonl'") and len(value) == 80


def test_ranks_that_differ_at_the_end_of_a_long_value_are_shown():
    path = "/scratch/" + "long/" * 40
    with pytest.raises(RanksDisagree, match=r"/a.jsonl' on rank 1 and '/scratch.*/b.jsonl' on rank 0"):
        raise_if_ranks_differ([{"data.name": repr(path + end)} for end in ("b.jsonl", "a.jsonl")])


def test_a_home_that_cannot_be_written_names_hf_home(monkeypatch, tmp_path):
    def refuse(*_args, **_more):
        raise OSError("cannot load") from PermissionError(errno.EACCES, "Permission denied", "/home/x/.cache")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    with pytest.raises(ConfigError, match=r"set HF_HOME to a folder that you can write in; /home/x/.cache is not one"):
        load_tokenizer(ModelConfig(name=str(tmp_path)))
