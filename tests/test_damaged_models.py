"""A damaged folder of a model ends in one sentence, or works; what cannot be made is not begun."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from grass_dist.errors import GrassError
from grass_dist.finetune.answers import greedy_answer
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.data.loading import load_data
from grass_dist.finetune.fit import check_fit
from grass_dist.finetune.identity import model_identity
from grass_dist.finetune.setup import load_model, load_tokenizer
from grass_dist.model.foreign import ForeignModel, plain_config
from tests.test_data import CHATML, make_tokenizer

ONE, MANY, PICKLED = "in one file", "in shards", "pickled"
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 40}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
WRONG = ("x", -1, [], None, 10**30, "a\0b")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with a tiny model, its weights in one file, in shards, and pickled; and data for it."""
    parent = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **SIZES, **HEADS))
    for name, size in ((ONE, "1GB"), (MANY, "40KB"), (PICKLED, "1GB")):
        model.save_pretrained(parent / name, max_shard_size=size)
        make_tokenizer(CHATML).save_pretrained(parent / name)
    weights = parent / PICKLED / "model.safetensors"
    torch.save(load_file(weights), parent / PICKLED / "pytorch_model.bin")
    weights.unlink()
    (parent / "train.jsonl").write_text('{"q": "a b", "a": "c d"}\n' * 6)
    return parent


@pytest.fixture
def limited() -> Iterator[None]:
    """Neither for ever nor into all of the memory."""

    def late(*_: object) -> None:
        raise AssertionError("it did not end within 20 s")

    before, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, limits[1]))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, limits)


def run_of(folder: Path) -> RunConfig:
    data = {"name": str(folder.parent / "train.jsonl"), "prompt": "q", "completion": "a", "eval_examples": 2}
    settings = {"model": {"name": str(folder), "dtype": "float32"}, "data": {**data, "max_length": 32}}
    return RunConfig.model_validate({**settings, "train": {"max_steps": 4}, "grass": {"probe_steps": 1}})


def use(folder: Path) -> None:
    """All that a run does with the files of a model: before, in and after its training."""
    config = run_of(folder)
    config = config.model_copy(update={"grass": config.grass.model_copy(update={"active_layers": 1})})
    tokenizer = load_tokenizer(config.model)
    data = load_data(config.data, tokenizer, 0)
    model: Any = load_model(config, torch.device("cpu"))
    check_fit(config, model, tokenizer, data)
    assert model_identity(model)
    ids = torch.tensor([data.first["input_ids"]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert isinstance(greedy_answer(model, tokenizer, [9, 10], 2), str)
    model.save_pretrained(folder.parent / "saved")
    tokenizer.save_pretrained(folder.parent / "saved")


def outcome(folder: Path) -> str | None:
    """The sentence that a folder is refused with; None if it works."""
    signal.alarm(20)
    try:
        use(folder)
    except GrassError as error:
        text = str(error)
        assert 20 < len(text) < 700 and text.isprintable(), text
        return text
    finally:
        signal.alarm(0)
    return None


Damage = Callable[[Path], object]


def whole_file(raw: bytes) -> Iterator[tuple[str, Damage]]:
    yield "emptied", lambda f: f.write_bytes(b"")
    yield "cut in the middle", lambda f: f.write_bytes(raw[: len(raw) // 2])
    yield "cut at the end", lambda f: f.write_bytes(raw[:-3])
    yield "garbage", lambda f: f.write_bytes(bytes(range(256)) * 4)
    yield "zeros", lambda f: f.write_bytes(b"\0" * len(raw))
    yield "a pickle", lambda f: f.write_bytes(pickle.dumps({"a": 1}))
    yield "missing", lambda f: f.unlink()
    yield "a folder", lambda f: (f.unlink(), f.mkdir())
    yield "a link to nothing", lambda f: (f.unlink(), f.symlink_to("nowhere"))
    for text in ("[]", "3", '"x"', "null", "{}", "[" * 100_000):
        yield f"{text[:9]} alone", lambda f, text=text: f.write_text(text)


def values(raw: bytes, ways: int) -> Iterator[tuple[str, Damage]]:
    settings = json.loads(raw)
    for key in settings:
        for wrong in WRONG[:ways]:
            changed = {**settings, key: wrong}
            yield f"{key}={wrong!r}", lambda f, changed=changed: f.write_text(json.dumps(changed))
        less = {name: value for name, value in settings.items() if name != key}
        yield f"without {key}", lambda f, less=less: f.write_text(json.dumps(less))


def damages(folder: Path, name: str) -> Iterator[tuple[str, Damage]]:
    raw = (folder / name).read_bytes()
    yield from whole_file(raw)
    if name.endswith(".json"):
        yield from values(raw, len(WRONG) if name == "config.json" else 3)


def outcomes(models: Path, kind: str, name: str) -> dict[str, str | None]:
    found, work = {}, models / "work"
    for what, damage in damages(models / kind, name):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(models / kind, work)
        damage(work / name)
        try:
            found[what] = outcome(work)
        except Exception as error:
            raise AssertionError(f"{kind}, {name}, {what}: {type(error).__name__}") from error
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_undamaged_folders_work(models, limited):
    assert [outcome(models / kind) for kind in (ONE, MANY, PICKLED)] == [None] * 3


FILES = [(ONE, "config.json"), (ONE, "generation_config.json"), (ONE, "tokenizer.json"), (ONE, "tokenizer_config.json")]
FILES += [(ONE, "chat_template.jinja"), (ONE, "model.safetensors"), (MANY, "model.safetensors.index.json")]
FILES += [(MANY, "model-00001-of-00002.safetensors"), (PICKLED, "pytorch_model.bin")]


@pytest.mark.parametrize(("kind", "name"), FILES, ids=[name for _, name in FILES])
def test_every_file_of_a_model_can_be_damaged_in_every_way(models, limited, kind, name):
    if name.startswith("model-"):
        name = sorted(file.name for file in (models / kind).glob("model-*"))[0]
    found = outcomes(models, kind, name)
    refused = [what for what, sentence in found.items() if sentence is not None]
    if name not in ("generation_config.json", "chat_template.jinja"):  # without which a model is whole
        assert {"emptied", "cut in the middle", "garbage", "missing", "a folder", "null alone"} <= set(refused)
    assert len(found) > 10


def test_what_is_wrong_is_named(models, limited):
    work = models / "work"

    def said(name: str, **changes: Any) -> str:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(models / ONE, work)
        file = work / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return outcome(work) or ""

    assert "it has 1000000000 layers by its num_hidden_layers; repair its config.json" in said(
        "config.json", num_hidden_layers=10**9
    )
    assert "attention_dropout=1.5, which is no rate; write a number from 0 to 1" in said(
        "config.json", attention_dropout=1.5
    )
    assert "no number for attention_dropout" in said("config.json", attention_dropout=None)
    assert "its weights have other shapes than its config.json says" in said("config.json", vocab_size=8)
    assert said("generation_config.json", eos_token_id="x") == ""


def test_an_answer_that_cannot_be_made_is_a_sentence(models):
    model = LlamaForCausalLM.from_pretrained(models / ONE)
    model.generation_config.repetition_penalty = "x"
    assert greedy_answer(model, make_tokenizer(), [9, 10], 2).startswith("(no answer: `penalty` has to be")


def test_a_pickle_with_code_is_not_run(models, limited, tmp_path):
    work = models / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(models / PICKLED, work)

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"a": Evil()}, work / "pytorch_model.bin")
    assert "it cannot be loaded" in (outcome(work) or "") and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("depth", [10_001, 10**12, 10**30])
def test_a_configuration_of_too_many_layers_is_no_model(depth):
    for settings in ({"num_hidden_layers": depth}, {"text_config": {"n_layer": depth}}):
        with pytest.raises(ForeignModel, match=r"^it has 1\d+ layers by its "):
            plain_config({"model_type": "qwen2", **settings})
