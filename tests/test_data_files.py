"""Files that are read by their path: of every kind that is named, with the numbers as the file writes them."""

from __future__ import annotations

import datetime
import gzip
import json
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grass_dist.errors import ConfigError
from grass_dist.finetune.data.config import DataConfig, kind_of
from grass_dist.finetune.data.loading import load_data, load_rows
from tests.test_data import make_tokenizer

ROWS = [{"q": f"q{n}", "a": "a b", "n": "2.50"} for n in range(6)]
JSON_LINES = "".join(f'{{"q": "q{n}", "a": "a b", "n": 2.50}}\n' for n in range(6))
CSV = "q,a,n\n" + "".join(f"q{n},a b,2.50\n" for n in range(6))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def put(file: Path, text: str) -> Path:
    file.write_bytes(gzip.compress(text.encode()) if file.name.lower().endswith(".gz") else text.encode())
    return file


def put_parquet(file: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), file, row_group_size=4)
    return file


def read(file: Path | str, **settings: Any) -> list[dict[str, Any]]:
    given = {"prompt": "q", "completion": "{a} {n}", "eval_examples": 0, **settings}
    return list(load_rows(DataConfig(name=str(file), **given), 0)[0])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        *("d.json", "d.jsonl", "d.JSONL", "d.ndjson", "d.jsonl.gz", "d.NDJSON.GZ", "d.json.gz"),
        *("d.csv", "d.CSV", "d.csv.gz", "d.tsv", "d.parquet", "d.Parquet"),
    ],
)
def test_every_kind_gives_the_same_rows(tmp_path, name, streaming):
    kind = kind_of(name)
    if kind == ".parquet":
        columns = {key: [row[key] for row in ROWS] for key in ROWS[0]}
        put_parquet(tmp_path / name, {**columns, "n": pa.array([Decimal("2.50")] * 6)})
    else:
        listed = f"[{','.join(JSON_LINES.splitlines())}]"
        texts = {".csv": CSV, ".tsv": CSV.replace(",", "\t"), ".json": listed}
        put(tmp_path / name, texts.get(kind, JSON_LINES))
    assert read(tmp_path / name, streaming=streaming) == ROWS
    assert read(tmp_path / name, streaming=streaming, limit=2) == ROWS[:2]
    assert len(load_data(_config(tmp_path / name, streaming), make_tokenizer(), 0).held_out) == 2


def _config(file: Path, streaming: bool) -> DataConfig:
    return DataConfig(name=str(file), prompt="q", completion="a", eval_examples=2, streaming=streaming)


def test_every_value_of_csv_is_the_text_of_the_file(tmp_path):
    values = ["18", "2.50", "1e5", "0012", "NA", "null", "true", "2024-01-02", '"a, ""b""\nc"', "", "é"]
    file = put(tmp_path / "d.csv", "\ufeffq,a\n" + "".join(f"q,{value}\n" for value in values))
    found = [row["a"] for row in read(file, completion="a")]
    assert found == [*values[:8], 'a, "b"\nc', "", "é"]


def test_values_of_parquet_by_their_types(tmp_path):
    many = 12345678901234567
    columns = {
        "q": ["x", "y"],
        "whole": [18, None],
        "large": [many, many],
        "single": pa.array([0.1, 18.0], pa.float32()),
        "double": [0.1, 18.0],
        "exact": pa.array([Decimal("2.50"), Decimal("1E+3")]),
        "truth": [True, False],
    }
    file = put_parquet(tmp_path / "d.parquet", columns)
    (first, second) = read(file, completion="{whole} {large} {single} {double} {exact} {truth}")
    assert list(first.values()) == ["x", "18", str(many), "0.1", "0.1", "2.50", "true"]
    assert list(second.values()) == ["y", None, str(many), "18.0", "18.0", "1000.00", "false"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("q1,a,b", "line 3 of d.csv has 3 fields, and the first line names 2"),
        ("q1", "line 3 of d.csv has 1 fields, and the first line names 2"),
        ('q1,"a"b', "line 3 of d.csv is no CSV ("),
        ("q1,\udcff", "line 3 of d.csv is no valid UTF-8"),
    ],
)
def test_a_broken_line_of_csv_is_named_or_left_out(tmp_path, line, problem, streaming):
    text = f"q,a\nq0,a\n{line}\nq2,a\n"
    (tmp_path / "d.csv").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError) as error:
        load_data(_config(tmp_path / "d.csv", streaming), make_tokenizer(), 0)
    assert problem in str(error.value) and "on_bad_line=skip" in str(error.value)
    kept = read(tmp_path / "d.csv", completion="a", streaming=streaming, on_bad_line="skip")
    assert [row["q"] for row in kept] == ["q0", "q2"]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_cannot_be_read_is_one_sentence(tmp_path, streaming):
    day = datetime.date(2024, 1, 2)
    put_parquet(tmp_path / "dates.parquet", {"q": ["x"], "a": [day]})
    put_parquet(tmp_path / "nan.parquet", {"q": ["x", "y"], "a": [1.0, float("nan")]})
    put_parquet(tmp_path / "twice.parquet", {"q": ["x"], "b": [day]})
    (tmp_path / "half.parquet").write_bytes((tmp_path / "dates.parquet").read_bytes()[:-40])
    (tmp_path / "half.jsonl.gz").write_bytes(gzip.compress(JSON_LINES.encode())[:-20])
    (tmp_path / "plain.csv.gz").write_text(CSV)
    put(tmp_path / "head.csv", "q,a,a\nx,y,z\n")
    put(tmp_path / "quote.csv", 'q,a\nx,"y\n' + "x,y\n" * 5)
    put(tmp_path / "empty.csv", "")
    put(tmp_path / "d.txt", "text")
    said = {
        "dates.parquet": "row 1 of dates.parquet does not fill completion (column 'a' holds a date)",
        "nan.parquet": "row 2 of nan.parquet holds nan in column 'a'",
        "twice.parquet": "there is no column 'a'; the columns are q, b",
        "half.parquet": "split 'train' cannot be loaded (",
        "half.jsonl.gz": "split 'train' cannot be loaded (",
        "plain.csv.gz": "split 'train' cannot be loaded (Not a gzipped file",
        "head.csv": "its first line names a column twice; give it a line with the name of each column",
        "quote.csv": "a quote in line 2 does not end, which hides the next 5; repair that line",
        "empty.csv": "split 'train' has no examples",
        "d.txt": "it is no .json, .jsonl, .ndjson, .fasta, .fa, .faa, .csv, .tsv, .parquet file; write it as one",
        "none.parquet": "there is no such file; give the path of a file",
    }
    for name, sentence in said.items():
        with pytest.raises(ConfigError) as error:
            load_data(_config(tmp_path / name, streaming), make_tokenizer(), 0)
        assert sentence in str(error.value) and str(error.value).isprintable(), name


def test_of_a_wide_file_only_the_columns_in_use_are_read(tmp_path):
    file = put_parquet(tmp_path / "d.parquet", {"q": ["x"], "a": ["y"], "picture": [b"\0" * 1000], "day": [1]})
    assert read(file, completion="a") == [{"q": "x", "a": "y"}]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_a_file_to_train_on_is_not_held_out(tmp_path, kind):
    """Whichever of both is the folder; another file of the folder, of another split, may be."""
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        columns = {key: [row[key] for row in ROWS] for key in ("q", "a")}
        texts = {"jsonl": "\n".join(map(json.dumps, ROWS)), "csv": CSV}
        file = folder / f"{split}.{kind}"
        put_parquet(file, columns) if kind == "parquet" else put(file, texts[kind])
    train, test = (str(folder / f"{split}.{kind}") for split in ("train", "test"))
    (tmp_path / f"link.{kind}").symlink_to(train)
    shared = r"^eval='.*': .*train\.\w+ is one of the files of name, '.*'; hold out a file that name does not stand for"
    for name, other in ((str(folder), train), (train, str(folder)), (str(tmp_path / f"link.{kind}"), train)):
        with pytest.raises(ConfigError, match=shared):
            read(name, completion="a", eval=other, eval_examples=2)
    for name, other in ((str(folder), test), (train, test), (test, str(folder))):
        assert read(name, completion="a", eval=other, eval_examples=2)
