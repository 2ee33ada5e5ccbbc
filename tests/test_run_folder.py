"""The folder of a run: who has it, what may lie in it, and that a start which is refused changes nothing in it."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grass_dist.checkpoint import disk, folders
from grass_dist.errors import CheckpointError, ConfigError
from grass_dist.finetune import run_folder
from grass_dist.finetune.config_file import load_config
from grass_dist.finetune.run_folder import LOCK, RunFolder
from grass_dist.job.world import World

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"


@pytest.fixture(scope="module")
def world():
    """Of one rank."""
    environment = dict(os.environ)
    world = World.join(datetime.timedelta(seconds=60))
    yield world
    world.close()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def open_folder(world, tmp_path):
    """Makes the `RunFolder` of ``runs/demo``."""

    def make(resume: str | None = None, *overrides: str) -> RunFolder:
        config = load_config(DEMO, [f"output_dir={tmp_path / 'runs'}", "overwrite=false", *overrides])
        return RunFolder(config, world, resume)

    return make


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "runs" / "demo"
    path.mkdir(parents=True)
    return path


def begin(folder: RunFolder, checkpoint: Any = None, step: int = 0) -> None:
    """As the program does."""
    with folder:
        folder.check(checkpoint)
        folder.begin(checkpoint, step)


def write(run: Path, *names: str, text: str = "x") -> None:
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)


def tree(folder: Path) -> dict[str, Any]:
    paths = sorted(folder.rglob("*"))
    return {str(p): (p.lstat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in paths}


RECORD, MODEL, STEP = "metrics.jsonl", "model/config.json", "checkpoints/step-000003/checkpoint.json"
END = "\n".join(json.dumps({"event": event, "step": 9}) for event in ("step", "end", "answer"))
SAVED = "\n".join(json.dumps({"event": "checkpoint", "step": 9, "error": error}) for error in (None, "full"))
REFUSED = {
    "an earlier run": (None, [RECORD], "x", r"name='demo': .* holds an earlier run; choose another name"),
    "a model alone": (None, [MODEL], "x", "holds an earlier run"),
    "checkpoints alone": (None, [STEP], "x", "holds an earlier run"),
    "a model, by auto": ("auto", [RECORD, MODEL, "report.html"], "x", r"has ended \(its model is in .*/model\), and"),
    "a model alone, by auto": ("auto", [MODEL], "x", "has ended"),
    "an end, by auto": (
        "auto",
        [RECORD],
        END,
        r"has ended \(metrics.jsonl says so\), and",
    ),
    "a save, by auto": ("auto", [RECORD], SAVED, r"was saved \(metrics.jsonl says so\), and --resume auto finds no"),
    "a file in the place of the model": (None, ["model"], "x", "demo/model is a file, and the model is to be written"),
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: c.replace(" ", "-"))
def test_what_an_earlier_run_left_is_refused_and_not_changed(open_folder, run, case):
    resume, names, text, message = REFUSED[case]
    write(run, *names, text=text)
    before = tree(run)
    with pytest.raises(ConfigError, match=message):
        begin(open_folder(resume))
    assert tree(run) == before


def test_a_file_in_the_place_of_the_run_is_refused(open_folder, run):
    run.rmdir()
    run.write_text("mine")
    with pytest.raises(ConfigError, match="output_dir=.*demo is not a folder"):
        begin(open_folder())
    assert run.read_text() == "mine"


def test_auto_restarts_a_run_stopped_before_its_first_checkpoint(open_folder, run):
    write(run, "plots/loss.png")
    write(
        run, RECORD, text=json.dumps({"event": "checkpoint", "step": 3, "error": "the disk was full"}) + '\n{"event": '
    )
    begin(open_folder("auto"))
    assert sorted(path.name for path in run.iterdir()) == [LOCK, "config.yaml"]


def test_overwrite_replaces_a_run_and_keeps_links_and_others(open_folder, run, tmp_path):
    write(run, RECORD, MODEL, STEP, "report.html", "notes.txt", "tensorboard/a/events")
    (run / "checkpoints").rename(tmp_path / "scratch")
    (run / "checkpoints").symlink_to(tmp_path / "scratch")
    begin(open_folder(None, "overwrite=true"))
    assert sorted(path.name for path in run.iterdir()) == [LOCK, "checkpoints", "config.yaml", "notes.txt"]
    assert (run / "checkpoints").is_symlink() and list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize("linked", ["checkpoints", "."], ids=["checkpoints are a link", "the run is a link"])
def test_a_run_on_a_scratch_disk_goes_on_and_keeps_its_record(open_folder, run, tmp_path, linked):
    write(run, RECORD, MODEL, STEP)
    moved, at = tmp_path / "scratch", run / linked
    at.rename(moved)
    (run if linked == "." else at).symlink_to(moved)
    checkpoint = SimpleNamespace(folder=run / "checkpoints" / "step-000003")
    folder = open_folder("auto")
    assert folder.goes_on(checkpoint) and not open_folder(None, "name=other").goes_on(checkpoint)
    begin(folder, checkpoint, 3)
    assert all((run / name).read_text() == "x" for name in (RECORD, MODEL, STEP))


@pytest.mark.parametrize("part", ["", "demo", "demo/checkpoints", "demo/model"])
def test_a_dangling_link_is_said_as_that(open_folder, run, tmp_path, part):
    run.rmdir()
    at = tmp_path / "runs" / part if part else tmp_path / "runs"
    if not part or part == "demo":
        run.parent.rmdir() if not part else None
    else:
        run.mkdir()
    at.symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError) as error:
        begin(open_folder())
    assert f"{at} is a link to {tmp_path}/gone, which does not exist; make that folder" in str(error.value)
    (tmp_path / "gone").mkdir()
    begin(open_folder())


def test_one_start_has_the_folder_and_another_is_told_who_has_it(open_folder, run):
    write(run, RECORD)
    holder = f"in use by process {os.getpid()} on host {socket.gethostname()}, since "
    with open_folder("auto") as first:
        before = tree(run)
        with pytest.raises(ConfigError, match=holder), open_folder(None, "overwrite=true"):
            pass
        assert tree(run) == before
        first.begin(None, 0)
        with pytest.raises(ConfigError, match=holder), open_folder("auto"):
            pass
    begin(open_folder("auto"))
    assert (run / LOCK).read_text() == ""


def test_a_start_that_another_has_overtaken_is_refused(open_folder, run):
    run.rmdir()  # neither finds a folder to hold
    with open_folder() as first, open_folder() as second:
        second.begin(None, 0)
        write(run, RECORD)
        with pytest.raises(ConfigError, match="in use by process"):
            first.begin(None, 0)
    with open_folder() as first:
        pass
    with pytest.raises(ConfigError, match="holds an earlier run"):
        first.begin(None, 0)
    assert (run / RECORD).read_text() == "x"


def test_the_lock_of_a_host_that_is_gone_can_be_removed(open_folder, run):
    with open_folder() as gone:
        gone.begin(None, 0)
        (run / LOCK).unlink()
        begin(open_folder())


def test_a_lock_on_a_file_that_was_removed_does_not_count(open_folder, run, monkeypatch):
    lock, late = disk.lock, []

    def lock_late(descriptor: int, how: int) -> bool:
        if not late:
            late.append(descriptor)
            (run / LOCK).unlink()
        return lock(descriptor, how)

    monkeypatch.setattr(disk, "lock", lock_late)
    with open_folder(), pytest.raises(ConfigError, match="in use by"), open_folder():
        pass
    assert late


def test_a_process_of_another_host_is_waited_for(open_folder, run, monkeypatch, caplog):
    first = open_folder()
    first.__enter__()
    (run / LOCK).write_text("process 7 on host far, since yesterday\n")
    monkeypatch.setattr(run_folder, "OUTLIVES_ITS_HOST", 0.1)
    with pytest.raises(ConfigError, match="in use by process 7 on host far, since yesterday; wait"):
        begin(open_folder("auto"))
    assert caplog.messages == [
        f"{run} is in use by process 7 on host far, since yesterday: waiting up to 0.1 s, since that may be gone."
    ]
    monkeypatch.setattr(run_folder, "OUTLIVES_ITS_HOST", 100.0)
    threading.Timer(1, first.__exit__).start()
    begin(open_folder("auto"))
    assert (run / "config.yaml").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_said_once(open_folder, run, monkeypatch, caplog, number):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(disk, "_told", set())
    for _ in range(2):
        begin(open_folder())
    [told] = caplog.messages
    assert told.startswith(f"{run}/{LOCK}: its file system has no locks ({os.strerror(number)})")


def test_a_checkpoint_in_the_way_and_in_use_is_refused_at_once(open_folder, run):
    later = "checkpoints/step-000006/checkpoint.json"
    write(run, RECORD, STEP, later)
    checkpoint = SimpleNamespace(folder=run / "checkpoints" / "step-000003")
    held = folders.hold((run / later).parent)
    assert held is not None
    before = tree(run)
    with pytest.raises(CheckpointError, match="step-000006 is being read by another process, and has to be set aside"):
        begin(open_folder("auto"), checkpoint, 3)
    assert tree(run) == before
    os.close(held)
    begin(open_folder("auto"), checkpoint, 3)
