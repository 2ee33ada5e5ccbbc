"""The report of a folder that somebody else has made: plain files in it alone are read, and none beside it written."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grass_dist.errors import GrassError
from grass_dist.regular_files import make_folder, open_regular, read_regular, replace_file
from grass_dist.report import build_report, load, load_run
from tests.test_report import events, run_json, write_run

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", events()[:30])


def outside(run: Path) -> Path:
    """A file beside the run that nobody may read or write."""
    file = run.parent / "secret"
    file.write_text("secret: 1\n")
    return file


def linked(name: str) -> Callable[[Path], None]:
    """Puts what is there beside the run, and a link to it in its place."""
    return lambda run: (run / name).rename(run.parent / name) and (run / name).symlink_to(run.parent / name)


def piped(name: str) -> Callable[[Path], None]:
    def attack(run: Path) -> None:
        (run / name).unlink()
        os.mkfifo(run / name)

    return attack


def grown(name: str) -> Callable[[Path], None]:
    return lambda run: os.truncate(run / name, 2**35)


REFUSED = {
    "run.json is a link": (linked("run.json"), r"run\.json: .* \(it is a link, which is not followed\)"),
    "run.json is a pipe": (piped("run.json"), r"run\.json: .* \(it is not a file\)"),
    "run.json is large": (grown("run.json"), r"run\.json: .* \(it has more than 16777216 bytes\)"),
    "the record is a link": (linked("metrics.jsonl"), r"metrics\.jsonl: .* \(it is a link, which is not followed\)"),
    "the record is a pipe": (piped("metrics.jsonl"), r"metrics\.jsonl: .* \(it is not a file\)"),
    "the record is a device": (
        lambda run: ((run / "metrics.jsonl").unlink(), (run / "metrics.jsonl").symlink_to("/dev/zero")),
        r"metrics\.jsonl: .* \(it is a link",
    ),
    "a line is long": (
        lambda run: (run / "metrics.jsonl").write_bytes(b" " + b"[" * (load.LONGEST_LINE + 1) + b"\n{}\n"),
        r"metrics\.jsonl, line 1: this line is damaged; it has more than 16777216 bytes",
    ),
    "plots is a link": (
        lambda run: ((run.parent / "theirs").mkdir(), (run / "plots").symlink_to(run.parent / "theirs")),
        r"plots: the report cannot be written here; it is a link, which is not followed; remove it\.",
    ),
    "plots is a file": (lambda run: (run / "plots").touch(), r"plots: .*; it is not a folder; remove it\."),
    "run.json is deep": (lambda run: (run / "run.json").write_text("[" * 10**5), r"run\.json: this is not JSON"),
    "many layers": (
        lambda run: (run / "run.json").write_text(json.dumps(run_json() | {"num_layers": 10**9})),
        r"run\.json: this is not the record of a run; num_layers",
    ),
    "the page is a folder": (lambda run: (run / "report.html").mkdir(), r"report\.html.*cannot be written here"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_plain_file_is_refused_in_one_sentence(run_dir: Path, what: str) -> None:
    attack, sentence = REFUSED[what]
    attack(run_dir)
    with pytest.raises(GrassError, match=sentence) as refused:
        build_report(run_dir)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 500
    assert not any((run_dir.parent / "theirs").iterdir()) if (run_dir.parent / "theirs").exists() else True
    assert not list(run_dir.glob(".*"))


def test_nothing_is_written_or_read_through_a_link(run_dir: Path) -> None:
    target = outside(run_dir)
    (run_dir / "plots").mkdir()
    for name in ("report.html", "plots/loss.png", "plots/cost.png"):
        (run_dir / name).symlink_to(target)
    (run_dir / "config.yaml").unlink()
    (run_dir / "config.yaml").symlink_to(target)
    page = build_report(run_dir)
    assert target.read_text() == "secret: 1\n"
    assert not page.is_symlink() and not (run_dir / "plots" / "loss.png").is_symlink()
    assert "secret: 1" not in page.read_text() and "config.yaml was not read: it is a link" in page.read_text()
    assert not list(run_dir.rglob(".*"))


def test_a_configuration_that_is_a_pipe_or_too_large_is_left_out(run_dir: Path) -> None:
    piped("config.yaml")(run_dir)
    assert any("config.yaml was not read: it is not a file" in note for note in load_run(run_dir).notes)
    (run_dir / "config.yaml").unlink()
    (run_dir / "config.yaml").touch()
    grown("config.yaml")(run_dir)
    assert any("it has more than 1048576 bytes" in note for note in load_run(run_dir).notes)


def test_a_long_record_is_read_line_by_line(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        for number in range(20_000):
            file.write(json.dumps({"event": "of another version", "text": "x" * 1000, "n": number}) + "\n")
    tracemalloc.start()
    load_run(run_dir)
    assert tracemalloc.get_traced_memory()[1] < 5e6 < (run_dir / "metrics.jsonl").stat().st_size
    tracemalloc.stop()
    monkeypatch.setattr(load, "MOST_EVENTS", 20)
    with pytest.raises(GrassError, match="more than 20 events"):
        load_run(run_dir)


NUMBERS: list[Any] = [-1, 0, 10**30, 10**400, 1e308, -1e308, math.inf, math.nan, None, "x", [], {}, True, [10**9]]


@pytest.mark.parametrize("kind", ["step", "eval", "refresh", "sample", "end"])
def test_any_value_in_a_record_is_read_or_refused(tmp_path: Path, kind: str) -> None:
    record = events()
    at = next(i for i, event in enumerate(record) if event["event"] == kind and event.get("step", 0) > 20)
    for key in record[at]:
        for value in NUMBERS if key != "event" else []:
            write_run(tmp_path, [*record[:at], {**record[at], key: value}, *record[at + 1 :]])
            with contextlib.suppress(GrassError):
                load_run(tmp_path)


def test_the_largest_values_that_are_read_are_drawn(run_dir: Path) -> None:
    huge = {"step": 2**52, "loss": 1e308, "tokens": 2**62, "bytes_reduced": 2**62, "state_bytes": 2**62}
    last = next(event for event in reversed(events()) if event["event"] == "step")
    write_run(run_dir, [*events()[:30], {**last, **huge, "bytes_to_host": 2**62}])
    assert build_report(run_dir).exists()


def test_a_plain_file_is_opened_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    with open_regular(tmp_path / "file") as stream:
        assert stream.read() == b"abc"
    assert read_regular(tmp_path / "link", 3, follow=True) == b"abc"
    for name, problem in {"link": "a link", "loop": "a link", "pipe": "not a file", ".": "not a file"}.items():
        with pytest.raises(OSError, match=problem):
            open_regular(tmp_path / name)
    for name in ("pipe", "."):
        with pytest.raises(OSError, match="not a file"):
            open_regular(tmp_path / name, follow=True)
    with pytest.raises(OSError, match="more than 2 bytes"):
        read_regular(tmp_path / "file", 2)


def test_a_file_is_replaced_whole_and_a_link_itself(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    replace_file(tmp_path / "link", b"new")
    assert (tmp_path / "file").read_bytes() == b"abc" and (tmp_path / "link").read_bytes() == b"new"
    assert not (tmp_path / "link").is_symlink() and len(list(tmp_path.iterdir())) == 2
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        replace_file(tmp_path / "folder", b"new")
    assert len(list(tmp_path.iterdir())) == 3
    make_folder(tmp_path / "folder")
    with pytest.raises(OSError, match="not a folder"):
        make_folder(tmp_path / "file")
