"""Configuration files that others have written: they are read, or refused in one sentence, soon."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grass_dist.errors import ConfigError
from grass_dist.finetune.config_file import LARGEST, load_config
from tests.hostile import UGLY, VALUES, drop, paths, put

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
TREE = yaml.safe_load(DEMO.read_text())

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
TEXTS: dict[str, str | bytes] = {
    "nothing": "",
    "a word": "word",
    "a list": "- 1",
    "null": "null",
    "ten megabytes": "a" * 10 * 2**20,
    "ten megabytes of settings": "model:\n" + "  name: x\n" * 2**20,
    "a billion laughs": LAUGHS,
    "an alias of itself": "a: &a [*a]",
    "deep lists": "[" * 100_000,
    "deep settings": "".join(" " * i + "a:\n" for i in range(400)),
    "deep keys": "? " * 20_000,
    "deep flow": "{a: " * 20_000,
    "tabs": "model:\n\tname: x",
    "a NUL": "model: \0",
    "an escape": "model: \x1b[2J",
    "no UTF-8": b"model: \xff\xfe",
    "UTF-16": "model: x".encode("utf-16"),
    "a bomb of tags": "!!python/object/apply:os.mkdir [executed]",
    "a tag of a module": "model: !!python/module:os",
    "an unknown tag": "model: !" + "x" * 5000 + " 1",
    "merged settings": "<<: {name: a, model: {name: b}}",
    "merged numbers": "model: {<<: 5}",
    "merged aliases": "a: &a {b: 1}\nmodel: {<<: *a}",
    "keys twice": "name: a\nname: b\n",
    "a huge number": "train: {max_steps: " + "9" * 5000 + "}",
    "a huge number of base 16": "train: {max_steps: 0x" + "f" * 6000 + "}",
    "a huge number as a key": "? 0x" + "f" * 6000 + "\n: 1",
    "a number of base 60": "train: {max_steps: 1" + ":1" * 50_000 + "}",
    "a fraction of base 60": "train: {learning_rate: 1" + ":1" * 5000 + ".5}",
    "many digits and a letter": "name: " + "1" * 100_000 + "x",
    "many digits and a point": "name: " + "1" * 50_000 + "." + "1" * 50_000 + "x",
    "a date": "train: {max_steps: 2001-01-01}",
    "a date that is none": "train: {max_steps: 2001-99-99}",
    "an integer of nothing": 'train: {max_steps: !!int ""}',
    "an integer of a list": "train: {max_steps: !!int [1]}",
    "a float of nothing": 'train: {learning_rate: !!float ""}',
    "a truth of neither": 'overwrite: !!bool "x"',
    "a time of no time": "name: !!timestamp x",
    "bytes": "name: !!binary AAAA",
    "bytes of no base": "name: !!binary é",
    "a set": "name: !!set {a, b}",
    "infinity": "train: {learning_rate: .inf, eps: .nan}",
    "self": "self: 1",
    "self within": "model: {self: 1}",
    "a number for a name": "model: {1: 2}",
    "null for a name": "model: {null: 2}",
    "a list for a name": "model: {[1]: 2}",
    "an empty name": '"": 1',
    "dots": '"...": 1',
    "many dots": "? " + "a." * 5000 + "b\n: 1",
    "an ugly name": json.dumps(UGLY * 50) + ": 1",
    "an ugly value": "model: " + json.dumps(UGLY * 50),
    "a setting within a word": "model: x\nmodel.name: y",
    "two documents": "a: 1\n---\nb: 2",
    "a directive": "%YAML 9.9\n---\na: 1",
    "an anchor alone": "a: &",
    "many settings": "".join(f"a{i}: 1\n" for i in range(4000)),
    "many numbers": "a: [" + "1," * 10_000 + "]",
}


def refused(file: Path, *overrides: str) -> str:
    """The sentence that a file is refused with; "" if it is read."""
    began = time.process_time()  # the machine may be busy with other things
    try:
        load_config(file, overrides)
        text = ""
    except ConfigError as error:
        text = str(error)
        assert 10 < len(text) < 500 and text.isprintable(), text
    assert time.process_time() - began < 20
    return text


@pytest.mark.parametrize("what", TEXTS)
def test_strange_texts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.chdir(tmp_path)
    text = TEXTS[what]
    (tmp_path / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert refused(tmp_path / "c.yaml")
    assert os.listdir() == ["c.yaml"]


STRANGE: dict[str, Callable[[Path], object]] = {
    "nothing": lambda at: None,
    "a folder": lambda at: at.mkdir(),
    "a pipe": lambda at: os.mkfifo(at),
    "a device": lambda at: at.symlink_to("/dev/zero"),
    "a link to itself": lambda at: at.symlink_to(at.name),
    "a file without end": lambda at: (at.touch(), os.truncate(at, 2**40)),
}


@pytest.mark.parametrize("what", STRANGE)
def test_strange_files_are_refused(tmp_path: Path, what: str) -> None:
    STRANGE[what](tmp_path / "c.yaml")
    assert refused(tmp_path / "c.yaml")
    STRANGE[what](tmp_path / "ds.json")
    write(tmp_path / "d.yaml", {**TREE, "parallel": {"backend": "deepspeed", "config": "ds.json"}})
    assert refused(tmp_path / "d.yaml")


JSONS = ["{", "[]", "[" * 50_000, '{"a":' * 900 + "1" + "}" * 900, '{"grass": {"self": 1}}', '{"a": 1, "a": 2}', "\xff"]
JSONS += ['{"grass": {"active_layers": ' + "9" * 4000 + "}}", json.dumps({UGLY: UGLY}), '{"a": ' + "1" * 5000 + "}"]


@pytest.mark.parametrize("text", JSONS, ids=range(len(JSONS)))
def test_strange_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "ds.json").write_text(text, encoding="latin-1" if text == "\xff" else "utf-8")
    parallel = {"backend": "deepspeed", "config": "ds.json"}
    write(tmp_path / "c.yaml", {k: v for k, v in {**TREE, "parallel": parallel}.items() if k != "grass"})
    assert refused(tmp_path / "c.yaml")


NO_FILES = ["", ".", "..", "x" * 300, "x" * 10_000, "a\0b", UGLY, "/etc", "/dev/zero", "/proc/kcore"]


@pytest.mark.parametrize("name", NO_FILES, ids=range(len(NO_FILES)))
def test_strange_names_are_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "c.yaml", {**TREE, "parallel": {"backend": "deepspeed", "config": name}})
    assert refused(tmp_path / "c.yaml")


OVERRIDES = ["", "=", "a", ".=1", "a..b=1", "name.x=1", "self=1", "train.self=1", "train.max_steps=2001-99-99"]
OVERRIDES += ["name={", "train.max_steps=0x" + "f" * 6000, "a." * 3000 + "b=1", "name=*x", "name=" + "[" * 9999]
OVERRIDES += [f"{UGLY}=1", f"name={UGLY}", "grass.fixed_layers=[-5]", "train.x=!!int"]


@pytest.mark.parametrize("override", OVERRIDES, ids=range(len(OVERRIDES)))
def test_strange_overrides_are_refused(override: str) -> None:
    assert refused(DEMO, override)


MANY_LAYERS = [{"sampler": "uniform", "active_layers": 10**12}, {"sampler": "random-cyclic", "active_layers": 10**9}]
MANY_LAYERS += [{"sampler": "fixed", "active_layers": 1, "fixed_layers": [n]} for n in (10**12, 10**30, -5, -(10**30))]
MANY_LAYERS += [{"active_layers": 10**30}]


@pytest.mark.parametrize("grass", MANY_LAYERS, ids=range(len(MANY_LAYERS)))
def test_many_layers_fill_no_memory(tmp_path: Path, grass: dict[str, Any]) -> None:
    write(tmp_path / "c.yaml", {**TREE, "grass": grass})
    tracemalloc.start()
    try:
        assert refused(tmp_path / "c.yaml")
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


def write(file: Path, tree: Any) -> None:
    file.write_text(yaml.safe_dump(tree))


def test_every_setting_can_be_anything_or_missing(tmp_path: Path) -> None:
    for path in paths(TREE):
        for value in VALUES:
            write(tmp_path / "c.yaml", put(TREE, path, value))
            refused(tmp_path / "c.yaml")
        write(tmp_path / "c.yaml", drop(TREE, path))
        refused(tmp_path / "c.yaml")


def yaml_values() -> st.SearchStrategy[Any]:
    text = st.text(max_size=12) | st.sampled_from(["self", "auto", "fsdp2", "{", "train", "<<", "="])
    numbers = st.booleans() | st.integers() | st.integers(-2, 10) | st.floats() | st.dates()
    leaves = st.none() | numbers | st.binary() | text
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4))


@settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(at=st.integers(0, 2**20), value=yaml_values())
def test_any_setting_can_be_any_value(tmp_path: Path, at: int, value: Any) -> None:
    ways = [(), *paths(TREE)]
    write(tmp_path / "c.yaml", put(TREE, ways[at % len(ways)], value))
    refused(tmp_path / "c.yaml")


def test_what_we_ship_is_read_and_far_from_the_limit() -> None:
    assert not refused(DEMO) and DEMO.stat().st_size < LARGEST / 50
