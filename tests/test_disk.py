"""What file systems refuse: a flush of a folder, a removal, the space for a model. Nothing is lost by it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grass_dist.checkpoint import disk, folders
from grass_dist.errors import CheckpointError, GrassError
from grass_dist.finetune.export import save_pretrained
from integration_tests.support.program import make_model


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(disk, "_told", set())


@pytest.fixture
def mount(tmp_path):
    """Mounts a small file system of its own at a folder."""

    def mount(place: Path, size: str) -> Path:
        place.mkdir(parents=True, exist_ok=True)
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], capture_output=True
        ).returncode:
            pytest.skip("a file system can only be mounted by root")
        return place

    yield mount
    places = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for place in places:  # it may have been renamed meanwhile
        if place.startswith(f"{tmp_path}/"):
            subprocess.run(["umount", place], check=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_checkpoints(parent: Path, *steps: int) -> list[Path]:
    made = [parent / folders.folder_name(step) for step in steps]
    for path in made:
        (path / "tensors").mkdir(parents=True)
        (path / folders.MANIFEST).write_text("{}")
    return made


def test_a_folder_that_its_file_system_cannot_flush_is_said_once(tmp_path, caplog):
    disk.sync(tmp_path)
    assert caplog.messages == []
    for _ in range(2):
        disk.sync(Path("/proc/self"))  # of a file system that answers EINVAL
    [told] = caplog.messages
    assert told.startswith("/proc/self: its file system cannot flush a folder (Invalid argument)")


def test_a_file_that_is_not_on_the_disk_is_an_error():
    with pytest.raises(OSError, match="Invalid argument"):
        disk.sync(Path("/proc/self/status"))


def test_what_cannot_be_removed_is_said_once_and_pruning_goes_on(tmp_path, mount, caplog):
    [first, *_] = make_checkpoints(tmp_path, 1, 2, 3)
    mount(first / "tensors" / "busy", "100k")
    for step in (4, 5):
        folders.prune(tmp_path, 2)
        make_checkpoints(tmp_path, step)
    stays = tmp_path / ".step-000001.removing"
    [told] = caplog.messages
    assert told == f"{stays} cannot be removed (busy: Device or resource busy): it takes space until you remove it."
    assert folders.put_away(make_checkpoints(tmp_path, 1)[0])  # of the same name
    assert (tmp_path / ".step-000001.1.removing").exists()
    folders.sweep(tmp_path, 9)
    assert names(tmp_path) == [stays.name, *(f"step-00000{n}" for n in (3, 4, 5))] and len(caplog.messages) == 1


def test_a_checkpoint_that_is_read_is_pruned_only_afterwards(tmp_path):
    [first, *_] = make_checkpoints(tmp_path, 1, 2, 3)
    held = [folders.hold(first), folders.hold(first)]  # by two readers
    for descriptor in held:
        folders.prune(tmp_path, 1)
        assert names(tmp_path) == ["step-000001", "step-000003"]
        assert descriptor is not None
        os.close(descriptor)
    folders.prune(tmp_path, 1)
    assert names(tmp_path) == ["step-000003"]


def test_a_checkpoint_that_is_being_removed_is_not_opened(tmp_path):
    [first, second] = make_checkpoints(tmp_path, 1, 2)
    with folders.unread(first) as free:
        assert free
        with pytest.raises(CheckpointError, match="step-000001 is being removed"):
            folders.hold(first)
    (second / folders.MANIFEST).unlink()
    assert folders.hold(second) is None and folders.put_away(second)


def test_a_checkpoint_moved_away_before_it_was_held_is_not_read(tmp_path, monkeypatch):
    [first, _] = make_checkpoints(tmp_path, 1, 2)
    lock = disk.lock

    def lock_late(descriptor: int, how: int) -> bool:
        monkeypatch.setattr(disk, "lock", lock)
        folders.prune(tmp_path, 1)
        return lock(descriptor, how)

    monkeypatch.setattr(disk, "lock", lock_late)
    with pytest.raises(CheckpointError, match="step-000001 is being removed"):
        folders.hold(first)
    assert names(tmp_path) == ["step-000002"]


def test_a_folder_written_beside_replaces_the_old_when_complete(tmp_path):
    place = tmp_path / "scratch"
    (tmp_path / "model").symlink_to(place)
    for number in (1, 2):
        (tmp_path / ".scratch.writing" / "left").mkdir(parents=True)  # by one that was killed
        (tmp_path / ".scratch.replaced").mkdir()
        with disk.written_beside(tmp_path / "model") as writing:
            (writing / "weights").write_text(str(number))
            assert not place.exists() or (place / "weights").read_text() == "1"
        assert names(place) == ["weights"] and (place / "weights").read_text() == str(number)
    with pytest.raises(IsADirectoryError), disk.written_beside(tmp_path / "model") as writing:
        writing.write_text("3")
    assert (tmp_path / "model" / "weights").read_text() == "2" and names(tmp_path) == ["model", "scratch"]


def test_a_folder_whose_replacement_fails_stays(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("1")
    with pytest.raises(FileNotFoundError):
        disk.put_in_place(tmp_path / "is not there", tmp_path / "model", tmp_path / "old")
    (tmp_path / "new").mkdir()
    with pytest.raises(OSError, match="not empty"):
        disk.put_in_place(tmp_path / "new", tmp_path / "model", None)
    assert (tmp_path / "model" / "weights").read_text() == "1" and names(tmp_path) == ["model", "new"]


@pytest.mark.parametrize("earlier", [False, True], ids=["the first", "in the place of another"])
def test_a_model_for_which_the_disk_has_no_room_leaves_nothing(tmp_path, mount, earlier):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = make_model(tmp_path / "made")
    model: Any = AutoModelForCausalLM.from_pretrained(made)
    run = mount(tmp_path / "run", "200k")
    if earlier:
        (run / "model").mkdir()
        (run / "model" / "config.json").write_text("{}")
    before = sorted(run.rglob("*"))
    said = r"run/model was not written \(.*No space left on device.*\), and nothing of it is left: mend that, and go on"
    tokenizer, main = AutoTokenizer.from_pretrained(made), SimpleNamespace(is_main=True)
    with pytest.raises(GrassError, match=said):
        save_pretrained(model, model.state_dict(), tokenizer, run / "model", main)  # type: ignore[arg-type]
    assert sorted(run.rglob("*")) == before
    save_pretrained(model, model.state_dict(), tokenizer, tmp_path / "model", main)  # type: ignore[arg-type]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names(tmp_path / "model"))
