"""`save_checkpoint` and `load_checkpoint` in one process, and the files that they leave."""

from __future__ import annotations

import json
import threading

import pytest
import torch
import torch.distributed.checkpoint as dcp

from grass_dist import AsyncCheckpointer, CheckpointError, load_checkpoint, save_checkpoint
from grass_dist.checkpoint import saving
from grass_dist.checkpoint.files import read_manifest
from grass_dist.checkpoint.folders import checkpoints_in
from grass_dist.checkpoint.loading import newest_good, open_checkpoint
from grass_dist.checkpoint.saving import write_snapshot
from grass_dist.checkpoint.torch_run import TorchHoldings
from tests.offload_runs import make, outcome, same, train

STEPS = 12


def test_a_loop_of_ones_own_goes_on_to_the_bit(tmp_path):
    model, optimizer = make({})
    train(model, optimizer, range(7))
    save_checkpoint(tmp_path, optimizer, 7, extra={"place": [1, 2]})
    drawn = train(model, optimizer, range(7, STEPS))
    again, other = make({"mode": "stream", "slots": 2})
    torch.manual_seed(99)
    assert load_checkpoint(tmp_path, other) == (7, {"place": [1, 2]})
    assert train(again, other, range(7, STEPS)) == drawn
    assert same(outcome(optimizer, model), outcome(other, again))


def test_a_background_save_writes_what_there_was_at_the_save(tmp_path, monkeypatch):
    model, optimizer = make({})
    train(model, optimizer, range(5))
    at_once = save_checkpoint(tmp_path / "at once", optimizer, 5)
    before, may_write = [p.detach().clone() for p in model.parameters()], threading.Event()

    def held_up(*args):
        assert may_write.wait(60)
        return write_snapshot(*args)

    monkeypatch.setattr(saving, "write_snapshot", held_up)
    checkpointer = AsyncCheckpointer(tmp_path / "beside", optimizer)
    checkpointer.save(5)
    train(model, optimizer, range(5, 9))
    assert checkpointer.latest() is None
    may_write.set()
    checkpointer.wait()
    assert checkpointer.latest() == tmp_path / "beside" / "step-000005"
    assert content_of(tmp_path / "beside" / "step-000005") == content_of(at_once)
    again, other = make({})
    load_checkpoint(tmp_path / "beside", other)
    assert all(torch.equal(a, b) for a, b in zip(before, again.parameters(), strict=True))
    train(again, other, range(5, 9))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def content_of(folder):
    """All that a checkpoint holds, as bytes; safetensors writes the names of tensors in any order."""
    reader = open_checkpoint(folder).tensors()
    read = {key: reader.read(key, 0, torch.empty(numel, dtype=dtype)) for key, (numel, dtype) in reader.tensors.items()}
    return (folder / "state.json").read_bytes(), {key: tensor.numpy().tobytes() for key, tensor in read.items()}


def test_a_save_waits_for_the_one_before_and_the_newest_stay(tmp_path):
    model, optimizer = make({})
    there = []
    with AsyncCheckpointer(
        tmp_path, optimizer, keep=2, add_files=lambda _: there.append([path.name for path in checkpoints_in(tmp_path)])
    ) as checkpointer:
        assert checkpointer.latest() is None
        for step in range(4):
            train(model, optimizer, range(step, step + 1))
            checkpointer.save(step + 1, extra={"epoch": step})
    steps = [f"step-00000{step}" for step in range(1, 5)]
    assert there == [[], steps[:1], steps[1::-1], steps[2:0:-1]]
    assert sorted(path.name for path in tmp_path.iterdir()) == steps[2:]
    assert checkpointer.latest() == tmp_path / steps[3]
    assert load_checkpoint(tmp_path, optimizer) == (4, {"epoch": 3})


def test_an_error_of_the_thread_is_raised_once_by_the_next_call(tmp_path):
    model, optimizer = make({})
    train(model, optimizer, range(3))
    full = [True]
    checkpointer = AsyncCheckpointer(tmp_path, optimizer, add_files=lambda at: no_room(at) if full else None)
    checkpointer.save(3)
    with pytest.raises(CheckpointError, match="step 3 was not written: .*no room"):
        checkpointer.wait()
    checkpointer.wait()
    checkpointer.save(3)
    train(model, optimizer, range(3, 4))
    with pytest.raises(CheckpointError, match="step 3 was not written: .*no room"):
        checkpointer.save(4)
    assert not list(tmp_path.iterdir())
    full.clear()
    checkpointer.save(4)
    checkpointer.wait()
    assert checkpointer.latest() == tmp_path / "step-000004"


def test_the_end_of_the_block_waits_and_its_error_comes_first(tmp_path, caplog):
    model, optimizer = make({})
    train(model, optimizer, range(3))

    def save(step, error=None, add_files=None):
        with AsyncCheckpointer(tmp_path, optimizer, add_files=add_files) as checkpointer:
            checkpointer.save(step)
            if error:
                raise error

    with pytest.raises(CheckpointError, match="no room"):
        save(3, add_files=no_room)
    with pytest.raises(KeyError):
        save(3, KeyError())
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"] and "not written" not in caplog.text
    with pytest.raises(KeyError):
        save(4, KeyError(), no_room)
    assert "step 4 was not written" in caplog.text


def test_only_what_trains_by_the_method_is_saved(tmp_path):
    other = torch.optim.SGD(make({})[0].parameters())
    for refused in (lambda: save_checkpoint(tmp_path, other, 1), lambda: AsyncCheckpointer(tmp_path, other)):
        with pytest.raises(CheckpointError, match="SGD is neither a GrassOptimizer nor an engine of initialize"):
            refused()


def test_a_folder_without_checkpoints_is_a_start(tmp_path):
    assert load_checkpoint(tmp_path, make({})[1]) is None


def test_the_newest_stay_and_what_an_unfinished_save_left_goes(tmp_path):
    model, optimizer = make({})
    (tmp_path / ".step-000001.writing").mkdir()
    for step in range(5):
        train(model, optimizer, range(step, step + 1))
        save_checkpoint(tmp_path, optimizer, step + 1, keep=2)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-000005", "step-000004"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000005"]


def test_a_checkpoint_in_use_stays_and_goes_with_the_next_save(tmp_path):
    model, optimizer = make({})
    train(model, optimizer, range(3))
    save_checkpoint(tmp_path, optimizer, 3)
    assert load_checkpoint(tmp_path, optimizer) == (3, {})  # and lets go of it
    with open_checkpoint(tmp_path / "step-000003") as read:
        train(model, optimizer, range(3, 4))
        save_checkpoint(tmp_path, optimizer, 4, keep=1)
        with pytest.raises(
            CheckpointError, match="step-000003 is being read by another process, so it is not replaced"
        ):
            save_checkpoint(tmp_path, optimizer, 3)
        assert [path.name for path in checkpoints_in(tmp_path)] == ["step-000004", "step-000003"]
        assert read.tensors().tensors and open_checkpoint(read.folder).step == 3
    save_checkpoint(tmp_path, optimizer, 4, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000004"]


def test_layers_that_never_trained_take_no_space(tmp_path):
    model, optimizer = make({})
    drawn = train(model, optimizer, range(5))
    folder = save_checkpoint(tmp_path, optimizer, 5)
    units = json.loads((folder / "state.json").read_text())["units"]
    trained = {layer for layers in drawn[2:] for layer in layers}
    assert {name for name in units if "layers." in name} == {f"layers.{i}" for i in trained}
    stored = dcp.HuggingFaceStorageReader(str(folder / "tensors")).read_metadata().state_dict_metadata
    of_layers = {key.split(".")[1] for key in stored if "@exp_avg" in key and key.startswith("layers.")}
    assert of_layers == {str(i) for i in trained}
    moments = sum(p.numel() for i in trained for p in model.layers[i].parameters()) * 2
    assert sum(t.size.numel() for key, t in stored.items() if "@exp" in key and "layers." in key) == moments


def test_torch_reads_the_weights_without_us(tmp_path):
    model, optimizer = make({})
    train(model, optimizer, range(4))
    folder = save_checkpoint(tmp_path, optimizer, 4)
    state = {name: torch.empty(param.numel()) for name, param in model.named_parameters()}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder / "tensors")), no_dist=True)
    for name, param in model.named_parameters():
        assert torch.equal(state[name].view(param.shape), param)


@pytest.mark.parametrize("change", [{"seed": 6}, {"temperature": 0.5}, {"probe_steps": 3}, {"active_layers": 2}, {}])
def test_other_settings_are_refused_as_by_load_state_dict(change, tmp_path):
    model, optimizer = make({})
    train(model, optimizer, range(5))
    folder = save_checkpoint(tmp_path, optimizer, 5)
    other, its = make({"mode": "stream", "slots": 2}, **(change or {"cls": torch.optim.Adamax}))
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(ValueError, match=f"^{next(iter(change), 'optimizer class')}=.* in the saved state") as of_dicts:
        its.load_state_dict(optimizer.state_dict())
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(tmp_path, its)
    assert str(refused.value) == f"{folder}: {of_dicts.value}"
    assert all(map(torch.equal, before, other.parameters())) and its.grass.step == 0


def test_a_checkpoint_that_holds_no_settings_is_taken(tmp_path, monkeypatch):
    model, optimizer = make({})
    train(model, optimizer, range(5))
    describe = TorchHoldings.describe

    def older(holdings):
        described = describe(holdings)
        return {**described, "engine": {k: v for k, v in described["engine"].items() if k != "settings"}}

    with monkeypatch.context() as patched:
        patched.setattr(TorchHoldings, "describe", older)
        save_checkpoint(tmp_path, optimizer, 5)
    again, other = make({}, temperature=0.5)
    assert load_checkpoint(tmp_path, other) == (5, {})
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def no_room(folder):
    raise OSError(28, "no room", str(folder))


def test_a_save_that_fails_leaves_what_there_was(tmp_path):
    model, optimizer = make({})
    train(model, optimizer, range(3))
    save_checkpoint(tmp_path, optimizer, 3)
    with pytest.raises(CheckpointError, match="step 4 was not written: .*no room"):
        save_checkpoint(tmp_path, optimizer, 4, add_files=no_room)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]
    found = newest_good(tmp_path)
    assert found is not None and found.step == 3


def test_a_model_with_another_shape_is_refused_and_untouched(tmp_path):
    model, optimizer = make({})
    train(model, optimizer, range(3))
    save_checkpoint(tmp_path, optimizer, 3)
    other, its = make({}, dtype=torch.bfloat16)
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(CheckpointError, match="in float32, and this run trains it in bfloat16"):
        load_checkpoint(tmp_path, its)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    assert read_manifest(tmp_path / "step-000003").weights
