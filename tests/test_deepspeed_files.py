"""Checkpoints in DeepSpeed's files: read entry by entry, without executing anything in them, and converted."""

from __future__ import annotations

import json
import os
import re
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grass_dist.backends.zero.groups import extents_of
from grass_dist.checkpoint import dcp, files
from grass_dist.checkpoint.convert import to_dcp
from grass_dist.checkpoint.deepspeed_files import DeepSpeedReader, read_file
from grass_dist.checkpoint.loading import Checkpoint, State, open_checkpoint
from grass_dist.checkpoint.per_rank import per_rank_pieces
from grass_dist.checkpoint.pieces import Piece
from grass_dist.checkpoint.saving import write_snapshot
from grass_dist.checkpoint.snapshot import Snapshot
from grass_dist.checkpoint.torch_files import LARGEST_PICKLE
from grass_dist.errors import CheckpointError
from grass_dist.ranks import Ranks

os.environ.setdefault("DS_ACCELERATOR", "cpu")
WORLD = 3
SHAPES = {"a.weight": (5, 3), "a.bias": (4,), "b.weight": (2, 7), "frozen": (5, 2), "mean": (6,)}
GROUPS = [("a", ["a.weight"]), ("a", ["a.bias"]), ("b", ["b.weight"])]
"""Units and parameters of DeepSpeed's groups; ``mean`` is a buffer."""
DTYPE = torch.bfloat16


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    ranks=st.integers(1, 5),
    padding=st.integers(0, 9),
    stage3=st.booleans(),
)
def test_the_partitions_of_all_ranks_hold_each_entry_once(sizes, ranks, padding, stage3):
    named = [(str(i), size) for i, size in enumerate(sizes)]
    shards = [-(-size // ranks) for size in sizes] if stage3 else None
    partition = -(-(sum(sizes) + padding) // ranks)
    flat = torch.zeros(ranks, sum(shards) if shards else partition)
    held = {name: torch.zeros(size) for name, size in named}
    for rank in range(ranks):
        for extent in extents_of(named, rank, partition, shards):
            held[extent.name][extent.start : extent.start + extent.length] += 1
            flat[rank, extent.at : extent.at + extent.length] += 1
    assert all(entries.eq(1).all() for entries in held.values())
    assert flat.le(1).all() and flat.sum() == sum(sizes)


def truth() -> dict[str, torch.Tensor]:
    """All tensors, flat, under the keys of a checkpoint; ``b`` never trained."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, shape in SHAPES.items():
        master = torch.randn(*shape, generator=generator).reshape(-1)
        found[name] = master.to(DTYPE)
        if name.startswith("a."):
            found[f"{name}@master"], found[f"{name}@exp_avg"] = master, master * 2
    return found


def partitions(flat: dict[str, torch.Tensor], names: list[str], stage: int) -> list[torch.Tensor]:
    """What each rank has of a group, as DeepSpeed lays it out."""
    if stage == 3:
        cut = [padded(flat[name], 1).view(WORLD, -1) for name in names]
        return [torch.cat([shards[rank] for shards in cut]) for rank in range(WORLD)]
    return list(padded(torch.cat([flat[name] for name in names]), 2).view(WORLD, -1))


def padded(tensor: torch.Tensor, alignment: int) -> torch.Tensor:
    unit = WORLD * alignment
    return torch.cat([tensor, tensor.new_full((-tensor.numel() % unit,), 99.0)])


def deepspeed_files(folder: Path, stage: int) -> None:
    """What DeepSpeed writes, by hand."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    true = truth()
    masters_key, optimizer_key = (
        ("fp32_flat_groups", "optimizer_state_dict")
        if stage == 3
        else ("single_partition_of_fp32_groups", "base_optimizer_state")
    )
    masters = {n: true.get(f"{n}@master", true[n].float()) for _, names in GROUPS for n in names}
    moments = {n: true.get(f"{n}@exp_avg") for n in masters}
    folder.mkdir()
    module = OrderedDict((name, tensor.view(SHAPES[name])) for name, tensor in true.items() if "@" not in name)
    for rank in range(WORLD):
        of_groups = [partitions(masters, names, stage)[rank] for _, names in GROUPS]
        states = {
            i: {"step": torch.tensor(4.0), "exp_avg": partitions(moments, names, stage)[rank]}
            for i, (unit, names) in enumerate(GROUPS)
            if unit == "a"
        }
        state = {
            masters_key: of_groups,
            optimizer_key: {"state": states, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.99)}]},
            "loss_scaler": LossScaler(1.0),
            "zero_stage": ZeroStageEnum(stage),
            "param_slice_mappings": [OrderedDict(a=fragment_address(3, 0))],
        }
        torch.save({"optimizer_state_dict": state}, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        if stage == 3:
            shards = padded(true["frozen"], 1).view(WORLD, -1)
            content = {"module": {"mean": module["mean"]}, "frozen_param_fragments": {"frozen": shards[rank].clone()}}
            torch.save(content, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    if stage < 3:
        torch.save({"module": {f"module.{n}": t for n, t in module.items()}}, folder / "mp_rank_00_model_states.pt")


def layout(stage: int) -> dict:
    def placed(name: str) -> dict:
        numel = torch.Size(SHAPES[name]).numel()
        return {"name": name, "numel": numel, "shard": -(-numel // WORLD) if stage == 3 else 0}

    groups = []
    for unit, names in GROUPS:
        partition = partitions({n: truth()[n] for n in names}, names, stage)[0].numel()
        groups.append({"unit": unit, "partition": partition, "params": [placed(name) for name in names]})
    return {"stage": stage, "groups": groups, "frozen": [placed("frozen")]}


def state_of(stage: int) -> dict:
    states = {
        "step": {"dtype": "float32", "value": 4.0},
        "exp_avg": {"dtype": "float32"},
        "master": {"dtype": "float32"},
    }
    engine = {
        "step": 4,
        "active_layers": [0],
        "next": None,
        "tracker": {"importances": [None, 1.0], "dropped": 0},
        "measured": {"layers": [[0, 1], [0, 1]]},
        "skipped": 0,
    }
    units = {"a": {"a.weight": states, "a.bias": states}}
    return {"engine": engine, "groups": [{"lr": 1e-3}], "units": units, "run": {}, "deepspeed": layout(stage)}


def make(parent: Path, stage: int) -> Path:
    """A checkpoint of kind "deepspeed" that three ranks have saved."""
    rows = torch.arange(WORLD * 4, dtype=torch.float64)
    pieces = [Piece("@measured", rows.numel(), 0, rows)]
    [rng] = [p for p in per_rank_pieces({"measured": {"rows": []}}, Ranks()) if p.key == "@rng"]
    pieces.append(Piece("@rng", rng.numel * WORLD, 0, rng.tensor.repeat(WORLD)))

    class ByHand(Snapshot):
        kind = "deepspeed"

        def write_tensors(self, folder: Path, ranks: Ranks) -> None:
            (folder / "deepspeed").mkdir()
            deepspeed_files(folder / "deepspeed/state", stage)
            super().write_tensors(folder, ranks)

    def add(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model/config.json").write_text('{"hidden_size": 3}')

    weights = {name: {"shape": list(shape), "dtype": "bfloat16"} for name, shape in SHAPES.items()}
    snapshot = ByHand(4, f"zero{stage}", state_of(stage), weights, pieces, {p.key: 1 for p in pieces})
    folder = write_snapshot(parent, snapshot, Ranks(), 9, add)
    manifest = files.read_manifest(folder).model_copy(update={"world_size": WORLD})
    return files.commit(folder.rename(parent / ".again"), manifest)


@pytest.fixture(params=[1, 2, 3])
def checkpoint(request, tmp_path) -> Checkpoint:
    return open_checkpoint(make(tmp_path, request.param))


def contents(reader: dcp.TensorReader) -> dict[str, torch.Tensor]:
    return {k: reader.read(k, 0, torch.empty(n, dtype=dtype)) for k, (n, dtype) in reader.tensors.items()}


def test_weights_and_states_are_as_saved_untrained_have_none(checkpoint):
    found, true = contents(checkpoint.tensors()), truth()
    assert set(found) == {*true, "@measured", "@rng"}
    assert all(torch.equal(found[key], true[key]) for key in true)
    assert found["@measured"].tolist() == list(range(12))


def test_any_run_of_entries_can_be_read(checkpoint):
    reader, true = checkpoint.tensors(), truth()
    for key, whole in true.items():
        for start in range(whole.numel()):
            for end in range(start, whole.numel() + 1):
                out = torch.full((end - start,), 7.0, dtype=whole.dtype)
                assert torch.equal(reader.read(key, start, out), whole[start:end])


def test_a_file_is_opened_when_something_is_read_from_it(checkpoint, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "grass_dist.checkpoint.deepspeed_files.read_file", lambda file: opened.append(file.name) or read_file(file)
    )
    reader = checkpoint.tensors()
    assert not opened
    for _ in range(2):
        reader.read("a.weight@exp_avg", 0, torch.empty(2))
    assert opened == ["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"]
    reader.read("a.weight@master", 0, torch.empty(15))
    assert len(opened) == WORLD
    monkeypatch.setattr("grass_dist.checkpoint.deepspeed_files.OPEN_FILES", 1)
    assert torch.equal(reader.read("a.weight@master", 0, torch.empty(15)), truth()["a.weight@master"])


# --- damaged and forged ones


def changed(checkpoint: Checkpoint, change) -> dcp.TensorReader:
    """The tensors after ``change`` of what state.json says."""
    state = json.loads((checkpoint.folder / files.STATE).read_text())
    change(state["deepspeed"])
    return Checkpoint(checkpoint.folder, checkpoint.manifest, State(**state)).tensors()


LIES = {
    "no stage": lambda told: told.pop("stage"),
    "a stage that there is not": lambda told: told.update(stage=4),
    "an unknown weight": lambda told: told["groups"][0]["params"][0].update(name="c"),
    "another size": lambda told: told["groups"][0]["params"][0].update(numel=14),
    "a unit that is nowhere": lambda told: [group.update(unit="z") for group in told["groups"]],
    "no groups": lambda told: told.update(groups=[]),
    "negative": lambda told: told["groups"][0].update(partition=-1),
    "a word": lambda told: told.update(groups="all"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_description_that_cannot_be_is_refused(checkpoint, lie):
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        changed(checkpoint, LIES[lie])


SHIFTS = {
    "a longer partition": lambda told: told["groups"][0].update(partition=1000),
    "longer shards": lambda told: told["groups"][0]["params"][0].update(shard=1000),
    "no partition": lambda told: [group.update(partition=0, params=[]) for group in told["groups"]],
    "twice": lambda told: told["groups"].append(told["groups"][0]),
}


@pytest.mark.parametrize("shift", SHIFTS)
def test_a_description_of_other_partitions_is_refused_on_reading(checkpoint, shift):
    with pytest.raises(CheckpointError, match="does not hold|holds no tensor|holds .* twice"):  # noqa: PT012
        reader = changed(checkpoint, SHIFTS[shift])
        if (shift, checkpoint.manifest.backend[-1] == "3") in (("a longer partition", True), ("longer shards", False)):
            pytest.skip("of no meaning at this stage")
        reader.read("a.weight@master", 0, torch.empty(15))


def test_a_missing_file_is_named(checkpoint):
    names = {n: e for n, e in checkpoint.manifest.files.items() if "rank_2_mp_rank_00_optim" not in n}
    manifest = checkpoint.manifest.model_copy(update={"files": names})
    with pytest.raises(CheckpointError, match=r"no mp_rank_00_optim_states\.pt of rank 2 among DeepSpeed's files"):
        Checkpoint(checkpoint.folder, manifest, checkpoint.state).tensors()


class Executes:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("content", [Executes(), [torch.ones(2), {"a": Path("x")}], pytest.approx(1)])
def test_a_file_that_would_execute_something_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save({"optimizer_state_dict": content}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt holds an object of .*, and is not read, since"):
        read_file(tmp_path / "x.pt")
    assert not (tmp_path / "executed").exists()


def test_what_is_allowed_is_not_executed_nor_allowed_for_long(tmp_path):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    torch.save({"a": DynamicLossScaler(2.0, 2.0, 10, 1.0, 1, False)}, tmp_path / "x.pt")
    before = torch.serialization.get_safe_globals()
    assert type(read_file(tmp_path / "x.pt")["a"]).__module__.startswith("grass_dist.")
    assert set(torch.serialization.get_safe_globals()) == set(before)


@pytest.mark.parametrize("content", [b"", b"nothing", b"PK\x03\x04" + bytes(100)])
def test_a_file_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pt cannot be read|x\.pt holds something else"):
        read_file(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "wrong", [None, "a", torch.ones(2), torch.ones(99, dtype=torch.float64), torch.ones(1).expand(99)]
)
def test_another_thing_in_the_place_of_a_tensor_is_refused(checkpoint, wrong):
    file = checkpoint.folder / "deepspeed/state/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = torch.load(file, weights_only=False)
    optimizer = content["optimizer_state_dict"]
    (optimizer.get("fp32_flat_groups") or optimizer["single_partition_of_fp32_groups"])[0] = wrong
    torch.save(content, file)
    with pytest.raises(
        CheckpointError, match=r"optim_states\.pt does not hold optimizer_state_dict/.*/0 as state\.json"
    ):
        checkpoint.tensors().read("a.weight@master", 0, torch.empty(15))


# --- files that are small and take much memory


def archive(file: Path, pickled: bytes, method: int = zipfile.ZIP_STORED, **more: bytes) -> Path:
    """As `torch.save` writes them, with this description."""
    with zipfile.ZipFile(file, "w") as made:
        for name, content in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", **more}.items():
            made.writestr(f"archive/{name}", content, compress_type=method if name == "data.pkl" else None)
    return file


def long_text(length: int) -> bytes:
    return b"X" + length.to_bytes(4, "little") + b"a" * length


BEGIN, KEY, END = b"\x80\x02}", b"X\x01\x00\x00\x00a", b"s."
DICT = b"ccollections\nOrderedDict\n"
BIG = b"]q\x05(" + b"K\x01" * 100_000 + b"e"
PAIRS = b"K\x01q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(40))
"""A tuple of two references to such a tuple, and so on: to hash the last one takes 2^40 steps."""
SMALL_AND_LARGE = {
    "a byte array of a gigabyte": (KEY + b"cbuiltins\nbytearray\nJ\x00\x00\x00\x40\x85R", "builtins.bytearray"),
    "a tensor of four gigabytes": (KEY + b"ctorch\nTensor\nJ\x00\x00\x00\x40\x85R", "torch.Tensor"),
    "text in another encoding": (KEY + b"c_codecs\nencode\n" + long_text(9) + b"X\x06\0\0\0utf-32\x86R", "_codecs.enc"),
    "many copies of a list": (
        KEY + b"(cbuiltins\nset\nq\x01" + BIG + b"h\x01h\x05\x85R" * 1000 + b"t",
        "copies something large",
    ),
    "many copies of a dict": (KEY + DICT + b")Rq\x01}q\x05" + b"h\x05b" * 1000, "copies something large"),
    "a key that takes for ever": (b"(" + PAIRS + b"NtN", "something large as a key"),
    "many instructions": (KEY + b"(" + b"N" * 4_000_000 + b"t", "more than 4000000 instructions"),
    "a long description": (KEY + long_text(LARGEST_PICKLE), f"more than {LARGEST_PICKLE} bytes"),
    "an instruction of another protocol": (KEY + b"\x96" + (1).to_bytes(8, "little") + b"a", "BYTEARRAY8"),
    "a text that is cut": (KEY + b"X\xff\xff\0\0a", "is damaged"),
    "nothing on the stack": (b"0" * 9, "POP"),
    "a reference to nothing": (KEY + b"h\x07", "is damaged"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", SMALL_AND_LARGE)
def test_a_description_that_takes_much_memory_is_refused_first(tmp_path, monkeypatch, what):
    pickled, reason = SMALL_AND_LARGE[what]
    file = archive(tmp_path / "x.pt", BEGIN + pickled + END)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch was given it"))
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        read_file(file)


def test_a_deflated_description_is_refused_unread(tmp_path):
    """Limits count what is unpacked, and torch.save packs nothing."""
    file = archive(tmp_path / "x.pt", BEGIN + KEY + long_text(2**26) + END, zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 2**20
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="is compressed, which torch.save never does"):
        read_file(file)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def lie(file: Path, *changes: tuple[bytes, int, bytes]) -> None:
    """Writes bytes so far behind the last place of a signature."""
    content = bytearray(file.read_bytes())
    for signature, offset, new in changes:
        at = content.rindex(signature) + offset
        content[at : at + len(new)] = new
    file.write_bytes(content)


ENTRY, LAST = b"PK\x01\x02", b"PK\x05\x06"
LIES_OF_ARCHIVES = {
    "a record that claims gigabytes": lambda file: lie(file, (ENTRY, 20, b"\xff\xff\xff\x7f" * 2)),
    "a record that claims more than it has": lambda file: lie(file, (ENTRY, 24, b"\xff\xff\xff\x7f")),
    "a record behind the end": lambda file: lie(file, (ENTRY, 42, b"\xff\xff\xff\x7f")),
    "a directory elsewhere": lambda file: lie(file, (LAST, 16, b"\0\0\0\0")),
    "a longer directory": lambda file: lie(file, (LAST, 12, b"\xff\xff\0\0")),
    "a comment": lambda file: lie(file, (LAST, 20, b"\1")),
    "something behind the end": lambda file: file.write_bytes(file.read_bytes() + bytes(100)),
    "something in front": lambda file: file.write_bytes(b"PK\x03\x04" + bytes(96) + file.read_bytes()),
    "the description twice": lambda file: archive(file, b"}.", **{"DATA.pkl": b"}."}),
    "two descriptions": lambda file: archive(file, b"}.", **{"more/data.pkl": b"}."}),
    "no description": lambda file: zipfile.ZipFile(file, "w").writestr("archive/version", "3"),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
    "a link": lambda file: (file.rename(file.with_name("y.pt")), file.symlink_to("y.pt")),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", LIES_OF_ARCHIVES)
def test_an_archive_that_says_what_it_does_not_hold_is_refused(tmp_path, monkeypatch, what):
    file = archive(tmp_path / "x.pt", BEGIN + KEY + long_text(50) + END)
    assert read_file(file) == {"a": "a" * 50}
    LIES_OF_ARCHIVES[what](file)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch was given it"))
    with pytest.raises(CheckpointError, match=r"x\.pt cannot be read"):
        read_file(file)


def test_what_torch_saves_is_read_as_it_reads_it(tmp_path):
    shared = (0.9, 0.99)
    content = {
        "tensors": [torch.ones(3, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool)],
        "groups": [{"betas": shared, "eps": 1e-8}, {"betas": shared, "eps": 1e-8}],
        "twice": [torch.nn.Parameter(torch.zeros(2))] * 2,
        "shapes": OrderedDict(a=torch.Size((2, 3)), b=torch.Size(())),
        "others": {"set": {"x"}, "dtype": torch.float16, "device": torch.device("cpu"), "none": None, "n": 2**40},
    }
    torch.save(content, tmp_path / "x.pt")
    assert str(read_file(tmp_path / "x.pt")) == str(content)


# --- converting


def test_a_converted_checkpoint_is_the_same_in_usual_files(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(dcp, "FILE_BYTES", 100)
    at_once: list[int] = []
    stock = DeepSpeedReader.read_data
    monkeypatch.setattr(
        DeepSpeedReader, "read_data", lambda self, *args: at_once.append(len(args[0].items)) or stock(self, *args)
    )
    made = open_checkpoint(to_dcp(checkpoint.folder, tmp_path / "out"))
    assert len(at_once) == len(checkpoint.tensors().tensors)  # each tensor by itself, when its file is written
    assert made.manifest.kind == "dcp" and made.manifest.world_size == WORLD and made.folder.name == "step-000004"
    found, wanted = contents(made.tensors()), contents(checkpoint.tensors())
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in found)
    assert made.state == checkpoint.state.model_copy(update={"deepspeed": None})
    assert len([name for name in made.manifest.files if name.startswith("tensors/")]) > 3
    assert (made.folder / "model/config.json").read_text() == '{"hidden_size": 3}'


def test_converting_leaves_nothing_on_failure_overwrites_nothing(checkpoint, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="exists already"):
        to_dcp(checkpoint.folder, checkpoint.folder.parent)
    made = to_dcp(checkpoint.folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is in that format already"):
        to_dcp(made, tmp_path / "other")
    monkeypatch.setattr(DeepSpeedReader, "read_data", lambda *_: 1 / 0)
    with pytest.raises(CheckpointError, match="division by zero"):
        to_dcp(checkpoint.folder, tmp_path / "third")
    assert list((tmp_path / "third").iterdir()) == []
