"""A JSON file with broken lines in its midst: the error names the first one, or they are left out."""

from __future__ import annotations

import json
import os
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grass_dist.errors import ConfigError, GrassError
from grass_dist.finetune.data import json_lines
from grass_dist.finetune.data.config import DataConfig, fill_template
from grass_dist.finetune.data.loading import Data, Stream, load_data, load_rows
from tests.test_data import QA, make_tokenizer, rows_of, write

GOOD = b'{"q": "a", "a": "b"}'
BOM = b"\xef\xbb\xbf"

STOPS = {
    b'{"q": "a", "a": oops}': r"is no JSON \(Expecting value at character 17 of it\)",
    b'{"q": "a", "a': r"is no JSON \(Unterminated string starting at character 12 of it\)",
    GOOD + GOOD[:5]: r"is no JSON \(Extra data at character 21 of it\)",
    b'{"q": "a", "a": 1e999}': "holds a number that is too large",
    b'{"q": "a", "a": NaN}': "holds NaN, which is no JSON",
    b'{"q": "a", "a": -Infinity}': "holds -Infinity, which is no JSON",
    b'{"q": "a", "q": "b", "a": "c"}': "names a column twice",
    b"[1, 2]": "is a list, not an object",
    b"5": "is a number, not an object",
    b'"x"': "is text, not an object",
    b'{"q": "\xff", "a": "b"}': r"is no valid UTF-8 \(byte 8 of it\)",
    b"\0\0\0": r"is no JSON \(.*\)",
    b'{"q": "a\0", "a": "b"}': r"is no JSON \(Invalid control character at character 9 of it\)",
    BOM + GOOD: r"is no JSON \(Expecting value at character 1 of it\)",
    rb'{"q": "\ud800", "a": "b"}': "holds half a surrogate pair",
    b'{"q": "a", "a": "b", "x": %s}' % (b"[" * 63 + b"]" * 63): "is nested in more than 63 levels",
    b'{"q": "a", "a": "b", "x": %s}' % (b"[" * 1200 + b"]" * 1200): "is nested in more than 63 levels",
    b'{"q": "a", "a": "b", "x": %s}' % (b'{"x":' * 30_000 + b"1" + b"}" * 30_000): "is nested in more than 63 levels",
    b'{"q": "a", "a": ["b"]}': r"does not fill completion \(column 'a' holds a list\)",
    b'{"q": {"x": 1}, "a": "b"}': r"does not fill prompt \(column 'q' holds a dict\)",
}
"""Lines that nothing can be made of, and what is said about them."""

NOT_IN_USE = {
    b'{"q": "a", "a": "b", "x": NaN}': "holds NaN, which is no JSON",
    b'{"q": "a", "a": "b", "x": [1e999]}': "holds a number that is too large",
    b"null": "is null, not an object",
    b'{"q": "a"}': r"does not fill completion \(there is no column 'a'\)",
}
"""Lines that "skip" leaves out, and that "stop" makes something of."""

ELEMENTS = {
    b"5": "is a number, not an object",
    b'{"q": "\xff", "a": "b"}': r"is no valid UTF-8 \(byte 8 of it\)",
    b'{"q": "a", "a": 1e999}': "holds a number that is too large",
    b'{"q": "a", "q": "b", "a": "c"}': "names a column twice",
    b'{"q": "a", "a": "b", "x": %s}' % (b"[" * 63 + b"]" * 63): "is nested in more than 63 levels",
}
"""Elements of a list that can be left out."""

NO_ELEMENTS = {
    b'{"q": "a", "a": oops}': r"is no JSON \(Expecting value at character 17 of it, in line 2\)",
    b'{"q": "a", "a": 01}': r"is no JSON \(Expecting ',' delimiter at character 18 of it, in line 2\)",
    b"{}}": r"is no JSON \(Expecting ',' delimiter at character 3 of it, in line 2\)",
    b"": r"is no JSON \(Expecting value at character 1 of it, in line 2\)",
    b'{"q": "a': r"is no JSON \(Invalid control character at character 10 of it, in line 2\)",
    b'{"q": "a", "a": "b", "x": %s}' % (b"[" * 1200 + b"]" * 1200): "is nested in more than 63 levels",
}
"""What stands between the commas of a list and is no JSON, so that the list ends there."""

streaming_too = pytest.mark.parametrize("streaming", [False, True], ids=["memory", "stream"])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)


def config_of(path: Path, **changes) -> DataConfig:
    return DataConfig(**{**QA, "name": str(path), "eval_examples": 0, "shuffle_buffer": 0, **changes})


def load(path: Path, **changes) -> Data:
    return load_data(config_of(path, **changes), make_tokenizer(), 0)


def examples_of(data: Data) -> Iterator[list[int]]:
    train = data.train
    examples = map(train.example, train.epoch(0, 0)) if isinstance(train, Stream) else iter(train)
    return (example["input_ids"] for example in examples)


def file_of(path: Path, *lines: bytes, end: bytes = b"\n") -> Path:
    path.write_bytes(end.join(lines))
    return path


def ids(value):
    return value[:30].decode(errors="replace").replace("\0", "0") if isinstance(value, bytes) else ""


# ------------------------------------------------------------------------------------------------------- stop


@streaming_too
@pytest.mark.parametrize(("line", "problem"), STOPS.items(), ids=ids)
def test_the_error_names_the_line(tmp_path, line, problem, streaming):
    path = file_of(tmp_path / "d.jsonl", GOOD, b"", line, GOOD, line)
    fix = r"repair it, or leave such lines out with data\.on_bad_line=skip\.$"
    with pytest.raises(ConfigError, match=rf"^(data\.)?name='.*: line 3 of d\.jsonl {problem}; {fix}") as caught:
        list(examples_of(load(path, streaming=streaming)))
    assert "\n" not in str(caught.value)


@streaming_too
@pytest.mark.parametrize(("element", "problem"), ELEMENTS.items(), ids=ids)
def test_the_error_names_the_element_of_a_list(tmp_path, element, problem, streaming):
    path = file_of(tmp_path / "d.json", b"[" + GOOD, b" " + element, GOOD + b"]", end=b",\n")
    message = rf"^(data\.)?name='.*: element 2 of d\.json {problem}; .*elements out with data\.on_bad_line=skip\.$"
    with pytest.raises(ConfigError, match=message):
        list(examples_of(load(path, streaming=streaming)))


@streaming_too
@pytest.mark.parametrize("on_bad_line", ["stop", "skip"])
@pytest.mark.parametrize(("element", "problem"), NO_ELEMENTS.items(), ids=ids)
def test_a_list_with_an_element_that_is_no_json_is_refused(tmp_path, element, problem, on_bad_line, streaming):
    path = file_of(tmp_path / "d.json", b"[" + GOOD, b" " + element, GOOD + b"]", end=b",\n")
    message = rf"^name='.*': element 2 of d\.json {problem}; repair it, or write one object a line \(\.jsonl\)\.$"
    with pytest.raises(ConfigError, match=message):
        load(path, on_bad_line=on_bad_line, streaming=streaming)


@streaming_too
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'[{"q": "a", "a": "b"}, {"q": ', "element 2 of d.json is no JSON .Expecting value .* 7 of it, in line 1"),
        (b'[{"q": "a",\n"a": "b"}, {"q": "a"}', "element 2 of d.json is no JSON .Expecting ',' .* 11 of it, in line 2"),
        (b'[{"q": "a", "a": "b"},]', "element 2 of d.json is no JSON .Expecting value .* 1 of it, in line 1"),
        (b'[{"q": "a", "a": "b"}]\n{"q": 1}', "more follows after the end of the list in line 1; make it one list"),
    ],
)
def test_a_list_that_does_not_end_as_it_should(tmp_path, text, problem, streaming):
    path = file_of(tmp_path / "d.json", text)
    with pytest.raises(ConfigError, match=rf"^name='.*': {problem}"):
        load(path, streaming=streaming)


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_that_breaks_off_in_its_midst(tmp_path, packing):
    fine = b'{"q": "a", "a": "b", "n": 1}'
    path = file_of(tmp_path / "d.jsonl", *[fine] * 1200, b'{"q": oops}', fine)
    data = load(path, streaming=True, packing=packing, max_length=4)
    with pytest.raises(ConfigError, match=r"^data\.name='.*: line 1201 of d\.jsonl is no JSON.*; repair it, or"):
        list(examples_of(data))


@streaming_too
def test_columns_that_are_not_in_use_break_nothing(tmp_path, streaming):
    others = [b'"n": 1', b'"n": "x"', b'"n": [1, {"y": 2.5}], "more": 1', b'"n": %s' % (b"9" * 5000), b'"n": NaN']
    others += [b'"n": "2024-01-31"', b'"n": {}', b'"n": null', b'"n": true', b'"x": 1e999']
    path = file_of(tmp_path / "d.jsonl", *[b'{"q": "a", "a": "b", %s}' % other for other in others])
    assert len(list(examples_of(load(path, streaming=streaming)))) == len(others)


@streaming_too
def test_a_column_that_only_some_lines_have(tmp_path, streaming):
    path = file_of(tmp_path / "d.jsonl", *[b'{"a": "b", "x": "%s"}' % (b"y" * 2000)] * 900, GOOD)
    rows = list(load_rows(config_of(path, streaming=streaming), 0)[0])
    assert [row["q"] for row in rows] == [None] * 900 + ["a"], "what it lacks is empty"
    with pytest.raises(ConfigError, match=r"^prompt='z': there is no column 'z'; the columns are a, x(, q)?\.$"):
        load(path, prompt="z", streaming=streaming)
    path = file_of(tmp_path / "e.jsonl", b'{"q": "a"}', GOOD, b"oops")
    with pytest.raises(ConfigError, match=r"line 3 of e\.jsonl is no JSON"):
        list(examples_of(load(path, streaming=streaming)))


@streaming_too
@pytest.mark.parametrize("line", NOT_IN_USE, ids=ids)
def test_what_does_not_matter_does_not_stop(tmp_path, line, streaming):
    data = load(file_of(tmp_path / "d.jsonl", GOOD, line, GOOD), streaming=streaming)
    unanswered = line in (b"null", b'{"q": "a"}')
    assert len(list(examples_of(data))) == 3 - unanswered
    assert data.train.unanswered == unanswered and data.skipped == ()


@streaming_too
def test_texts_that_look_like_lists_in_a_column_of_mixed_kinds(tmp_path, streaming):
    path = file_of(tmp_path / "d.jsonl", GOOD, b'{"q": 5, "a": "b"}', b'{"q": "[1]", "a": "b"}')
    with pytest.raises(
        ConfigError, match=r"line 2 of d\.jsonl holds a number in column 'q', where line 1 holds text; write both"
    ):
        list(examples_of(load(path, streaming=streaming)))
    assert len(list(examples_of(load(path, streaming=streaming, on_bad_line="skip")))) == 3


@streaming_too
def test_an_error_that_is_about_no_line(tmp_path, streaming):
    path = file_of(tmp_path / "d.jsonl", GOOD, b'{"q": 5, "a": "b", "more": 1}')
    with pytest.raises(ConfigError, match=r"^name='.*': split 'dev' cannot be loaded \(.*train.*\); give"):
        load(path, split="dev", streaming=streaming)
    with pytest.raises(ConfigError, match=r"^prompt='x': there is no column 'x'; the columns are q, a"):
        load(path, prompt="x", streaming=streaming)


# ------------------------------------------------------------------------------------------------------- skip


@streaming_too
@pytest.mark.parametrize(("line", "problem"), [*STOPS.items(), *NOT_IN_USE.items()], ids=ids)
def test_a_broken_line_is_left_out(tmp_path, line, problem, streaming):
    path = file_of(tmp_path / "d.jsonl", BOM + GOOD, b"", line, b'{"q": "c", "a": "d"}', line, end=b"\r\n")
    data = load(path, streaming=streaming, on_bad_line="skip")
    clean = load(file_of(tmp_path / "clean.jsonl", GOOD, b'{"q": "c", "a": "d"}'), streaming=streaming)
    assert list(examples_of(data)) == list(examples_of(clean)) and len(list(examples_of(data))) == 2
    (skipped,) = data.skipped
    assert (skipped.file, skipped.count, skipped.first_lines) == (str(path), 2, [3, 5])
    sentence = str(skipped)
    assert re.fullmatch(rf".*d\.jsonl: left out 2 broken lines \(3, 5\); line 3 {problem}", sentence), sentence


@streaming_too
@pytest.mark.parametrize(("element", "problem"), ELEMENTS.items(), ids=ids)
def test_a_broken_element_is_left_out(tmp_path, element, problem, streaming):
    path = file_of(tmp_path / "d.json", b" [" + GOOD, element, GOOD, b'{"q": [","], "a": 1}' + b"]", end=b",\n")
    data = load(path, streaming=streaming, on_bad_line="skip")
    assert len(list(examples_of(data))) == 2
    assert re.fullmatch(rf".*: left out 2 broken elements \(2, 4\); element 2 {problem}", str(data.skipped[0]))


@streaming_too
def test_only_the_first_three_numbers_are_kept(tmp_path, streaming):
    path = file_of(tmp_path / "d.jsonl", *[b"{"] * 5000, GOOD)
    (skipped,) = load(path, streaming=streaming, on_bad_line="skip").skipped
    assert (skipped.count, skipped.first_lines) == (5000, [1, 2, 3]) and "5000 broken lines (1, 2, 3, …)" in str(
        skipped
    )


@streaming_too
def test_a_file_without_broken_lines_is_read_as_ever(tmp_path, streaming):
    for name in ("d.json", "d.jsonl"):
        path = Path(write(tmp_path / name, rows_of(20)))
        both = [load(path, streaming=streaming, on_bad_line=mode, eval_examples=5) for mode in ("stop", "skip")]
        assert both[1].skipped == () and both[0].held_out_rows == both[1].held_out_rows
        assert list(examples_of(both[0])) == list(examples_of(both[1]))
        rows = list(load_rows(config_of(path, on_bad_line="skip", streaming=streaming), 0)[0])
        assert rows == [{key: row[key] for key in ("q", "a")} for row in rows_of(20)]
    assert load(path, streaming=streaming).skipped == ()


@streaming_too
def test_a_held_out_file_obeys_too(tmp_path, streaming):
    good = Path(write(tmp_path / "d.jsonl", rows_of(5)))
    other = file_of(tmp_path / "e.jsonl", b"{", GOOD, b"5", GOOD, b"6")
    with pytest.raises(ConfigError, match=r"^eval='.*: line 1 of e\.jsonl is no JSON .*=skip\.$"):
        load(good, eval=str(other), eval_examples=2, streaming=streaming)
    data = load(good, eval=str(other), eval_examples=2, streaming=streaming, on_bad_line="skip")
    assert len(data.held_out) == 2
    assert [(each.file, each.first_lines) for each in data.skipped] == [(str(other), [1, 3])], "as far as it is needed"
    other.write_bytes(b'{"q": ["a"], "a": "b"}')
    with pytest.raises(
        ConfigError, match=r"^eval='.*: line 1 of e\.jsonl does not fill prompt \(column 'q' holds a list"
    ):
        load(good, eval=str(other), eval_examples=2, streaming=streaming)


@streaming_too
def test_nothing_is_left(tmp_path, streaming):
    path = file_of(tmp_path / "d.jsonl", b"{", b"5")
    why = r"left out 2 broken lines \(1, 2\); line 1 is no JSON \(.*\)"
    with pytest.raises(ConfigError, match=rf"^name='.*': split 'train' has no examples \(.*{why}\); give a dataset"):
        load(path, on_bad_line="skip", streaming=streaming)
    for text in (b"", b"\n\n", BOM):
        with pytest.raises(ConfigError, match=r"^name='.*': split 'train' has no examples; give"):
            load(file_of(path, text), on_bad_line="skip", streaming=streaming)


@streaming_too
def test_columns_of_mixed_kinds_are_put_into_words_as_they_stand(tmp_path, streaming):
    answers = [b'"b"', b"3", b"2.5", b"true", b"null", b"%d" % 2**70, b"0"]
    lines = [b'{"q": "a", "a": %s, "x": %s}' % (answer, b"[]" if answer == b"3" else b"1") for answer in answers]
    data = load(file_of(tmp_path / "d.jsonl", *lines), prompt="q", completion="{a}", streaming=streaming,
                on_bad_line="skip", eval_examples=3, eval=write(tmp_path / "e.jsonl", rows_of(3)))  # fmt: skip
    config = config_of(tmp_path / "d.jsonl", streaming=streaming, on_bad_line="skip")
    rows = list(load_rows(config, 0)[0])
    assert [fill_template("a", row, "completion") for row in rows] == ["b", "3", "2.5", "true", "", str(2**70), "0"]
    assert data.skipped == ()


def test_a_slice_counts_the_lines_that_are_left(tmp_path):
    path = file_of(tmp_path / "d.jsonl", *[b"{", b'{"q": "a", "a": "b"}', b'{"q": "c", "a": "d"}'] * 2)
    rows = load_rows(config_of(path, split="train[:2]+train[75%:]", on_bad_line="skip"), 0)[0]
    assert [row["q"] for row in rows] == ["a", "c", "c"]
    for split in ("dev", "train[", "train[::]"):
        with pytest.raises(ConfigError, match=r"^name='.*': split '.*' cannot be loaded \(.*\); give"):
            load(path, split=split, on_bad_line="skip")
    with pytest.raises(
        ConfigError, match=r"cannot be loaded \(a stream of a file has the split 'train', and no slices"
    ):
        load(path, split="train[:2]", on_bad_line="skip", streaming=True)


@streaming_too
def test_no_more_is_read_than_is_needed(tmp_path, streaming):
    path = file_of(tmp_path / "d.jsonl", GOOD, b"{", GOOD, b"{", GOOD)
    data = load(path, limit=2, on_bad_line="skip", streaming=streaming)
    assert data.skipped[0].first_lines == [2] and len(list(examples_of(data))) == 2


@streaming_too
def test_a_file_that_was_changed_is_read_anew(tmp_path, streaming):
    path = file_of(tmp_path / "d.jsonl", GOOD, b"{")
    stat = path.stat()
    assert len(list(examples_of(load(path, on_bad_line="skip", streaming=streaming)))) == 1
    path.write_bytes(GOOD + b"\n5")
    path.write_bytes(b'{"q": "a", "a": "c"}\n{')
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert list(load_rows(config_of(path, on_bad_line="skip", streaming=streaming), 0)[0]) == [{"q": "a", "a": "c"}]


def test_a_shuffled_stream_is_the_same_on_every_rank(tmp_path):
    lines = [b'{"q": "%s", "a": "b"}' % b"abcdefgh"[i % 8 : i % 8 + 1] if i % 3 else b"{" for i in range(60)]
    path = file_of(tmp_path / "d.jsonl", *lines)
    options = {"on_bad_line": "skip", "streaming": True, "shuffle_buffer": 8}
    streams = [load(path, **options).train for _ in range(2)]
    orders = [[list(stream.epoch(7, epoch)) for epoch in (0, 1)] for stream in streams if isinstance(stream, Stream)]
    assert orders[0] == orders[1] and orders[0][0] != orders[0][1] and len(orders[0][0]) == 40


def test_a_line_that_is_too_long_takes_no_memory(tmp_path, monkeypatch):
    path = tmp_path / "d.jsonl"
    with path.open("wb") as file:
        file.write(GOOD + b"\n")
        file.truncate(100 * 2**20)
        file.seek(0, 2)
        file.write(b"\n" + GOOD)
    tracemalloc.start()
    data = load(path, on_bad_line="skip")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (
        str(data.skipped[0]).endswith("left out 1 broken line (2); line 2 is longer than 64 MB")
        and len(data.train) == 2
    )  # type: ignore
    assert peak < 70 * 2**20
    monkeypatch.setattr(json_lines, "LONGEST", 20)
    path = file_of(tmp_path / "e.jsonl", b'{"q": "a", "a": "b" }', GOOD)
    assert load(path, on_bad_line="skip").skipped[0].first_lines == [1]


@pytest.mark.parametrize("name", ["some/set", "a/folder", "reasoning-gym:gsm_symbolic"])
@pytest.mark.parametrize("field", ["name", "eval"])
def test_only_files_have_lines(name, field):
    message = rf"^on_bad_line='skip': {name} is no local .* file, and nothing else has lines; leave"
    with pytest.raises(ConfigError, match=message):
        DataConfig(**{**QA, "name": "x.json", field: name, "on_bad_line": "skip"})
    DataConfig(**{**QA, "name": "x.json", "eval": "split:dev", "on_bad_line": "skip"})
    with pytest.raises(ConfigError, match=r"^on_bad_line='leave': .*'stop' or 'skip'"):
        DataConfig(**{**QA, "name": "x.json", "on_bad_line": "leave"})


# -------------------------------------------------------------------------------------------------- any bytes

EDITS = st.lists(
    st.tuples(
        st.integers(0, 1 << 16),
        st.integers(0, 3),
        st.sampled_from([b"\0", b"\xff", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b"\n", b"\r", b"e", b"9", b"\xef"])
        | st.binary(min_size=1, max_size=3),
    ),
    max_size=5,
)


@given(EDITS, st.sampled_from(["d.jsonl", "d.json", "lines.json"]), st.sampled_from(["stop", "skip"]), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_read_or_refused_in_one_sentence(tmp_path_factory, edits, name, mode, streaming):
    rows = [{"q": "a é", "a": "b", "n": 1, "x": [1.5, {"y": None}]}, {"q": "c", "a": "d\n", "n": 2, "x": []}] * 3
    data = json.dumps(rows).encode() if name == "d.json" else "\n".join(map(json.dumps, rows)).encode()
    for where, cut, put in edits:
        at = where % (len(data) + 1)
        data = data[:at] + put + data[at + cut :]
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(data)
    try:
        loaded = load(path, on_bad_line=mode, streaming=streaming, eval_examples=1)
        found = len(list(examples_of(loaded)))
    except GrassError as error:
        text = str(error)
        assert len(text.splitlines()) == 1 and text.endswith("."), text
    else:
        assert found >= 1 and (mode == "skip" or not loaded.skipped)
        assert all(len(str(each).splitlines()) == 1 for each in loaded.skipped)
