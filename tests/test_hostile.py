"""Checkpoints that somebody has damaged or forged: they load, or are refused in one sentence with nothing changed."""

from __future__ import annotations

import random
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grass_dist import GrassConfig, GrassOptimizer
from grass_dist.checkpoint import files
from grass_dist.checkpoint.loading import load, open_checkpoint
from grass_dist.checkpoint.saving import write_snapshot
from grass_dist.checkpoint.snapshot import Snapshot
from grass_dist.errors import GrassError
from grass_dist.finetune.checkpoints import check_settings, position_of
from grass_dist.finetune.config_file import load_config
from grass_dist.ranks import Ranks
from grass_dist.states.update_rule import HOW
from tests import hostile
from tests.forgeries import CLAIMS, FORGED, HARMLESS
from tests.hostile import put_bytes, put_manifest, put_state
from tests.tiny import Tiny, take_steps

CONFIG = load_config(Path(__file__).parents[1] / "configs" / "demo.yaml")
JSON = [files.MANIFEST, files.STATE]
GRASS = GrassConfig(active_layers=2, sampling_interval=4, update_interval=6, probe_steps=2)
STEP = 5
"""After which there are states, measured steps, and a draw that waits for step 6."""


class Victim:
    """A run that what others have made is loaded into."""

    def __init__(self, layers: int = 4, **sizes: int) -> None:
        torch.manual_seed(0)
        self.model = Tiny(layers=layers, **sizes).to(torch.bfloat16)
        self.optimizer = GrassOptimizer(self.model, torch.optim.AdamW, {"lr": 1e-2}, config=GRASS)

    def save(self, parent: Path) -> Path:
        take_steps(self.model, self.optimizer, range(STEP))
        run = {"config": CONFIG.model_dump(mode="json"), "step": STEP, "updates": 3, "bad_steps": 0, "data": {"n": 1}}
        snapshot = Snapshot.take(self.optimizer.holdings(), STEP, run)
        return write_snapshot(parent, snapshot, Ranks(), keep=3)

    def all(self) -> list[Any]:
        """Everything that loading may change."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        weights = [p.detach().clone() for p in self.model.parameters()]
        return [*weights, torch.get_rng_state(), self.optimizer.grass.state_dict(), groups, len(self.optimizer.state)]


class Loading:
    """Loads what it is given, time and again; made anew after a load that succeeded."""

    def __init__(self) -> None:
        self._victim = Victim()

    def __call__(self, folder: Path) -> str | None:
        """What it was refused with; None if it loads, and training goes on from there."""
        before, refused = self._victim.all(), None
        try:
            load(open_checkpoint(folder), self._victim.optimizer.holdings())
        except GrassError as error:
            refused = _sentence(error)
        assert not (folder.parent / hostile.MARKER).exists()
        if refused is None:
            self._go_on()
        else:
            assert all(_same(a, b) for a, b in zip(before, self._victim.all(), strict=True)), refused
        return refused

    def run(self, folder: Path) -> str | None:
        """What a fine-tune refuses to go on with."""
        try:
            checkpoint = open_checkpoint(folder)
            position_of(checkpoint)
            changes = check_settings(CONFIG, checkpoint, {"n": 1})
        except GrassError as error:
            return _sentence(error)
        assert all(len(change) < 500 and change.isprintable() for change in changes)
        return None

    def _go_on(self) -> None:
        """Over the next draw, switch and refresh; what the method then finds wrong with numbers it says."""
        try:
            take_steps(self._victim.model, self._victim.optimizer, range(STEP, STEP + 3))
        except GrassError as error:
            _sentence(error)
        self._victim = Victim()


def _sentence(error: GrassError) -> str:
    text = str(error)
    assert 20 < len(text) < 500 and text.isprintable(), text
    return text


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if torch.is_tensor(a) else str(a) == str(b)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Victim().save(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def loading() -> Loading:
    return Loading()


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("space")


def copied(good: Path, to: Path) -> Path:
    """A copy to be changed, in the place of an earlier one."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    return Path(shutil.copytree(good, to / good.name))


def test_what_was_saved_loads(good: Path, loading: Loading) -> None:
    assert loading(good) is None


@pytest.mark.parametrize("kind", hostile.STRANGE)
@pytest.mark.parametrize("name", [files.MANIFEST, files.STATE, files.TENSORS, "*"])
def test_strange_files_are_refused(good: Path, loading: Loading, tmp_path: Path, name: str, kind: str) -> None:
    folder = copied(good, tmp_path / "it")
    hostile.replaced(name, hostile.STRANGE[kind])(folder)
    assert loading(folder)


MORE = {
    "a file": put_bytes("more", b"", sealed=False),
    "a pickle": lambda folder: (folder / "tensors" / ".metadata").write_bytes(b"\x80\x04."),
    "a link": lambda folder: (folder / "more").symlink_to("/etc"),
    "a link among the tensors": lambda folder: (folder / "tensors" / "a.safetensors").symlink_to("/dev/zero"),
    "a folder among the tensors": lambda folder: (folder / "tensors" / "a.safetensors").mkdir(),
    "no text": lambda folder: open(bytes(folder) + b"/\xff\n", "w").close(),
}


@pytest.mark.parametrize("what", MORE)
def test_more_files_are_refused(good: Path, loading: Loading, tmp_path: Path, what: str) -> None:
    folder = copied(good, tmp_path / "it")
    MORE[what](folder)
    assert loading(folder)


OUTSIDE = ["..", "../x", "/etc/passwd", "a/../../x", "tensors/../../x", "state.json\0", "a\\b", "x" * 300, "x" * 10_000]
OUTSIDE += ["", ".", "tensors/", "tensors//a", "a/b/c/d", "é", hostile.UGLY, ".hidden", "~", "checkpoint.json", "nul:"]


@pytest.mark.parametrize("name", OUTSIDE, ids=range(len(OUTSIDE)))
def test_names_of_no_file_are_refused(good: Path, loading: Loading, tmp_path: Path, name: str) -> None:
    folder = copied(good, tmp_path / "it")
    put_manifest(("files", name), files.digest(folder / files.STATE).model_dump())(folder)
    assert loading(folder)


def test_deep_folders_end(good: Path, loading: Loading, tmp_path: Path) -> None:
    folder = copied(good, tmp_path / "it")
    (folder / "/".join("d" * 200)).mkdir(parents=True)
    loading(folder)


@pytest.mark.parametrize("what", CLAIMS)
def test_many_wrong_things_take_no_more_than_one(good: Path, loading: Loading, tmp_path: Path, what: str) -> None:
    folder = copied(good, tmp_path / "it")
    CLAIMS[what](folder)
    tracemalloc.start()
    try:
        assert loading.run(folder) or loading(folder)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


def test_the_weights_of_another_model_are_refused(loading: Loading, tmp_path: Path) -> None:
    for number, sizes in enumerate(({"layers": 3}, {"layers": 5}, {"vocab": 17}, {"width": 4})):
        assert "is of another model" in (loading(Victim(**sizes).save(tmp_path / str(number))) or "")


def attacked(good: Path, space: Path, loading: Loading, name: str, path: tuple[Any, ...], value: Any) -> None:
    folder = copied(good, space / "it")
    (put_manifest if name == files.MANIFEST else put_state)(path, value)(folder)
    (loading.run if path[:1] == ("run",) else loading)(folder)


@pytest.mark.parametrize("name", JSON)
def test_every_kind_of_node_can_be_anything_or_missing(good: Path, loading: Loading, space: Path, name: str) -> None:
    tree = hostile.read(good / name)
    for path in [path for path in hostile.kinds(tree) if path[-1] not in HOW]:
        for value in hostile.VALUES:
            attacked(good, space, loading, name, path, value)
        attacked(good, space, loading, name, (), hostile.drop(tree, path))
    for value in hostile.VALUES:
        attacked(good, space, loading, name, (), value)


@pytest.mark.parametrize("what", FORGED)
def test_forgeries_are_refused(good: Path, loading: Loading, tmp_path: Path, what: str) -> None:
    folder = copied(good, tmp_path / "it")
    FORGED[what](folder)
    assert (loading.run if what.startswith("run: ") else loading)(folder)


@pytest.mark.parametrize("what", HARMLESS)
def test_forgeries_that_nobody_can_tell_load(good: Path, loading: Loading, tmp_path: Path, what: str) -> None:
    folder = copied(good, tmp_path / "it")
    HARMLESS[what](folder)
    assert (loading.run if what.startswith("run: ") else loading)(folder) is None


def json_values() -> st.SearchStrategy[Any]:
    text = st.text(max_size=20) | st.sampled_from(["float32", "load", "self", "params", "@", "layers.0"])
    leaves = st.none() | st.booleans() | st.integers() | st.integers(-2, 10) | st.floats(allow_nan=False) | text
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4))


MANY = settings(
    max_examples=250, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@MANY
@given(name=st.sampled_from(JSON), at=st.integers(0, 2**20), value=json_values(), sealed=st.booleans())
def test_any_node_can_be_any_json(
    good: Path, loading: Loading, space: Path, name: str, at: int, value: Any, sealed: bool
) -> None:
    folder, tree = copied(good, space / "json"), hostile.read(good / name)
    ways = list(hostile.paths(tree))
    path = ways[at % len(ways)]
    if sealed:
        (put_manifest if name == files.MANIFEST else put_state)(path, value)(folder)
    else:
        hostile.write(folder / name, hostile.put(tree, path, value))
    refused = loading(folder)
    assert sealed or refused or hostile.read(folder / name) == tree


def garbled(content: bytes, dice: random.Random) -> bytes:
    """With a few bytes changed, put in or left out; more often where a header is."""
    found = bytearray(content)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(min(len(found), dice.choice([16, 4000, 2**30])))
        what = dice.randrange(4)
        if what == 0:
            found[at] ^= 1 << dice.randrange(8)
        elif what == 1:
            found[at:at] = dice.randbytes(dice.randint(1, 9))
        elif what == 2:
            del found[at : at + dice.randint(1, 9)]
        else:
            found[at] = dice.choice(b'0123456789-"{}[],:e.')
    return bytes(found) if dice.random() < 0.9 else bytes(found[: dice.randrange(len(found))])


@MANY
@given(seed=st.integers(0, 2**32), name=st.sampled_from([files.MANIFEST, files.STATE, "*"]), sealed=st.booleans())
def test_any_bytes_can_be_others(good: Path, loading: Loading, space: Path, seed: int, name: str, sealed: bool) -> None:
    folder, dice = copied(good, space / "bytes"), random.Random(seed)
    file = hostile.tensors(folder) if name == "*" else folder / name
    before = file.read_bytes()
    file.write_bytes(content := garbled(before, dice))
    if sealed and name != files.MANIFEST:
        hostile.reseal(folder)
    refused = loading(folder)
    assert sealed or refused or content == before or name == files.MANIFEST


def test_the_cases_are_many(good: Path) -> None:
    kinds = sum(len(hostile.kinds(hostile.read(good / name))) for name in JSON)
    named = 4 * len(hostile.STRANGE) + len(MORE) + len(OUTSIDE) + len(FORGED) + len(HARMLESS) + len(CLAIMS)
    assert named >= 300 and named + kinds * len(hostile.VALUES) + 2 * 250 >= 1500
