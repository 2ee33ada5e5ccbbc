"""Streams that changed since a run was saved, or differ between ranks, are told apart before anybody reads them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import datasets
import pytest

from grass_dist.errors import CheckpointError, ConfigError, RanksDisagree
from grass_dist.finetune.checkpoints import check_settings, was_rewritten
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.data.config import DataConfig
from grass_dist.finetune.data.loading import load_data
from grass_dist.finetune.data.stream_identity import written_at
from grass_dist.finetune.identity import data_identity
from grass_dist.ranks import raise_if_ranks_differ
from tests.test_data import make_tokenizer

FILES, ROWS = "files of the stream", "first rows of the stream"
CONTENT = "content of the stream's files (a sample)"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def lines(count: int, word: str = "a") -> str:
    return "".join(f'{{"q": "q{n:06}", "a": "{word}"}}\n' for n in range(count))


def config_of(name: Path, **settings: Any) -> DataConfig:
    return DataConfig(name=str(name), prompt="q", completion="a", eval_examples=0, streaming=True, **settings)


def identity(name: Path, **settings: Any) -> dict[str, str]:
    return data_identity(load_data(config_of(name, **settings), make_tokenizer(), 0).train)


def differs(one: dict[str, str], other: dict[str, str]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if one[name] != other[name]}


def test_a_copy_elsewhere_is_the_same_stream(tmp_path):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").write_text(lines(300))
    os.utime(tmp_path / "there" / "train.jsonl", (1, 1))
    one, other = (identity(tmp_path / folder / "train.jsonl") for folder in ("here", "there"))
    assert one == other and one.keys() == {FILES, ROWS, CONTENT} and "train.jsonl (8100 bytes)" in one[FILES]
    assert identity(tmp_path / "here").keys() == one.keys()
    assert differs(identity(tmp_path / "here"), identity(tmp_path / "there")) == set()


def test_what_changed_is_found(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text(lines(3000))
    before = identity(file)
    file.write_text(lines(3000).replace("q000003", "x000003"))
    assert differs(before, identity(file)) == {ROWS, CONTENT}
    file.write_text(lines(3000).replace("q002999", "x002999"))
    assert differs(before, identity(file)) == {CONTENT}
    file.write_text(lines(3000).replace("q001500", "x001500"))
    assert differs(before, identity(file)) == {CONTENT}
    file.write_text(lines(3001))
    assert differs(before, identity(file)) >= {FILES}
    file.write_text(lines(3000))
    assert differs(before, identity(file)) == set()
    file.rename(tmp_path / "other.jsonl")
    assert differs(before, identity(tmp_path / "other.jsonl")) == {FILES}
    assert differs(before, identity(tmp_path / "other.jsonl", limit=50)) == {FILES, ROWS}


def test_of_many_files_each_is_looked_at(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(300):
        (folder / f"train-{number:03}.jsonl").write_text(lines(2))
    before = identity(folder)
    (folder / "train-299.jsonl").write_text(lines(2, "b"))
    assert differs(before, identity(folder)) == {CONTENT}
    (folder / "train-299.jsonl").unlink()
    assert FILES in differs(before, identity(folder)) and len(before[FILES]) < 220


def test_saved_and_typed_folders_are_told_apart_too(tmp_path):
    for name, word in (("one", "a"), ("two", "a"), ("three", "b")):
        datasets.Dataset.from_list([{"q": "x", "a": word}] * 5).save_to_disk(tmp_path / name)
    one, two, three = (identity(tmp_path / name) for name in ("one", "two", "three"))
    assert one[ROWS] == two[ROWS] != three[ROWS]


def test_ranks_that_see_other_files_are_refused(tmp_path):
    for folder, count in (("0", 20), ("1", 21)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").write_text(lines(count))
    reports = [{k: repr(v) for k, v in identity(tmp_path / r / "train.jsonl").items()} for r in "01"]
    with pytest.raises(RanksDisagree, match=r"^files of the stream is 'train.jsonl \(567 bytes\).* on rank 1 and '"):
        raise_if_ranks_differ(reports)


def test_a_row_that_cannot_be_used_is_said_at_the_start(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text(lines(50) + "{\n" + lines(50))
    with pytest.raises(ConfigError, match=r"^data\.name=.*: line 51 of train.jsonl is no JSON"):
        identity(file)


@dataclass
class Saved:
    """A checkpoint's part that the settings are compared with."""

    run: dict[str, Any]
    folder: str = "step-000004"

    @property
    def state(self) -> Any:
        return SimpleNamespace(run=self.run)


def run_of(data: DataConfig, **grass: Any) -> RunConfig:
    settings = {"model": {"name": "m"}, "train": {"max_steps": 4}, "grass": {"probe_steps": 1, **grass}}
    return RunConfig.model_validate({**settings, "data": data.model_dump(mode="json")})


def test_a_run_goes_on_with_its_own_stream_only(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text(lines(500))
    config, known = run_of(config_of(file)), identity(file)
    run = {"config": config.model_dump(mode="json"), "data": known, "data_written": written_at(config.data)}
    saved: Any = Saved(run)
    assert check_settings(config, saved, identity(file)) == [] and not was_rewritten(saved, written_at(config.data))
    os.utime(file, (1, 1))
    assert check_settings(config, saved, identity(file)) == [] and was_rewritten(saved, written_at(config.data))
    file.write_text(lines(501))
    with pytest.raises(CheckpointError, match=r"other examples than .* has now \(files of the stream.* differ\): a "):
        check_settings(config, saved, identity(file))
    older: Any = Saved({**run, "data": {}, "data_written": ""})
    assert check_settings(config, older, identity(file)) == [] and not was_rewritten(older, written_at(config.data))


def test_moments_that_are_rounded_from_now_on_are_said(tmp_path):
    data = config_of(tmp_path / "train.jsonl")
    before, now = run_of(data), run_of(data, offload={"host_dtype": "bfloat16", "prefetch_steps": 0})
    saved: Any = Saved({"config": before.model_dump(mode="json")})
    assert check_settings(now, saved, {}) == [
        "grass.offload.host_dtype is bfloat16, and was null when the run was saved"
    ]
    other = run_of(data, draw_ahead=0)
    with pytest.raises(ConfigError, match=r"^grass\.draw_ahead=0: the run that it goes on with has null; set it to n"):
        check_settings(other, saved, {})
