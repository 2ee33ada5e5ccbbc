"""`grass-dist export`: the model of a checkpoint as a Hugging Face folder, and what is refused."""

from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from grass_dist import GrassConfig, GrassOptimizer
from grass_dist.checkpoint import export as module
from grass_dist.checkpoint import files
from grass_dist.checkpoint.dcp import TensorReader
from grass_dist.checkpoint.export import Weight, export, model_weights, split
from grass_dist.checkpoint.folders import checkpoints_in, prune
from grass_dist.checkpoint.inspect import inspect_run
from grass_dist.checkpoint.loading import open_checkpoint
from grass_dist.checkpoint.saving import write_snapshot
from grass_dist.checkpoint.snapshot import Snapshot
from grass_dist.cli import app
from grass_dist.errors import CheckpointError, ConfigError, GrassError
from grass_dist.finetune.export import write_model_files
from grass_dist.model.adapters import adapter_config
from grass_dist.ranks import Ranks
from grass_dist.terminal import parse_size
from integration_tests.support.program import make_model

GRASS = GrassConfig(active_layers=2, probe_steps=2, sampling_interval=3, update_interval=3, draw_ahead=1)
IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [10, 11, 12, 3, 4, 1]])


@dataclass
class Trained:
    """A run that has saved checkpoints, and what it was at the last of them."""

    folder: Path
    model: Any
    optimizer: GrassOptimizer
    tokenizer: Any
    samples: list[dict[str, Any]]

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def save(self, step: int, *, with_model: bool = True, extra: dict[str, Any] | None = None) -> Path:
        def add(writing: Path) -> None:
            self.model.generation_config.save_pretrained(writing / files.MODEL)
            write_model_files(self.model.config, self.tokenizer, adapter_config(self.model), writing / files.MODEL)

        config = {"grass": self.optimizer.grass.config.model_dump(mode="json")}
        extra = {"config": config, "step": step} if extra is None else extra
        snapshot = Snapshot.take(self.optimizer.holdings(), step, extra)
        return write_snapshot(self.checkpoints, snapshot, Ranks(), keep=3, add_files=add if with_model else None)

    def logits(self) -> torch.Tensor:
        return self.model(input_ids=IDS).logits


def train(
    folder: Path,
    save_at: tuple[int, ...],
    *,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    grass: GrassConfig = GRASS,
    optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
    extra: dict[str, Any] | None = None,
) -> Trained:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    source = make_model(folder / "source")
    config = LlamaConfig.from_pretrained(source)
    config.tie_word_embeddings, config.use_cache = tied, False
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    samples: list[dict[str, Any]] = []

    def observe(event: Any) -> None:
        if hasattr(event, "active_layers"):
            samples.append({"event": "sample", "step": event.step, "round": event.round})
            samples[-1]["active_layers"] = event.active_layers

    kwargs = {"lr": 1e-2}
    optimizer = GrassOptimizer(model, optimizer_class, kwargs, config=grass, observers=[observe])
    run = Trained(folder / "runs" / "small", model, optimizer, AutoTokenizer.from_pretrained(source), samples)
    if 0 in save_at:
        run.save(0, extra=extra)
    for step in range(max(save_at)):
        ids = torch.roll(IDS, step, 1)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in save_at:
            run.save(step + 1, extra=extra)
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("run"), (4, 6))


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Trained:
    """A copy that a test may damage."""
    shutil.copytree(trained.folder, tmp_path / "run")
    return Trained(tmp_path / "run", trained.model, trained.optimizer, trained.tokenizer, trained.samples)


def check_loads(folder: Path, run: Trained) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    assert model.dtype == run.model.dtype
    assert torch.equal(model.eval()(input_ids=IDS).logits, run.logits())
    own = run.model.state_dict()
    assert {k: v.dtype for k, v in model.state_dict().items()} == {k: v.dtype for k, v in own.items()}
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(folder)("how many apples").input_ids == [3, 4, 5]
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_the_exported_model_is_the_trained_one_to_the_bit(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    run = train(tmp_path, (5,), tied=tied, dtype=dtype)
    done = export(run.folder, tmp_path / "new" / "out")
    model = check_loads(tmp_path / "new" / "out", run)
    config = json.loads((tmp_path / "new" / "out" / "config.json").read_text())
    assert config["use_cache"] is True and config["dtype"] == str(dtype).removeprefix("torch.")
    assert "torch_dtype" not in config and config["tie_word_embeddings"] is tied
    assert done.shards == 1 and done.step == 5
    assert len({path.stat().st_mode for path in (tmp_path / "new" / "out").iterdir()}) == 1
    assert done.nbytes == sum(p.nbytes for p in model.parameters())
    with safe_open(tmp_path / "new" / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_several_files_are_named_and_filled_as_by_transformers(trained: Trained, tmp_path: Path) -> None:
    limit = 40_000
    done = export(trained.folder, tmp_path / "out", max_shard_bytes=limit)
    check_loads(tmp_path / "out", trained)
    trained.model.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    mine, theirs = (
        json.loads((tmp_path / at / "model.safetensors.index.json").read_text()) for at in ("out", "theirs")
    )
    assert mine["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert set(mine["weight_map"]) == set(theirs["weight_map"])
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(names) == done.shards > 2
    assert names == [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    assert set(mine["weight_map"].values()) == set(names)


@pytest.mark.parametrize("limit", [1, 5, 6, 9, 100])
def test_shards_are_those_of_hugging_face(limit: int) -> None:
    from huggingface_hub.serialization import split_torch_state_dict_into_shards

    tensors = {f"t{i}": torch.zeros(n, dtype=torch.uint8) for i, n in enumerate([3, 3, 7, 2, 0, 6, 6, 1])}
    theirs = split_torch_state_dict_into_shards(tensors, max_shard_size=limit).filename_to_tensors
    mine = split([Weight(k, tuple(t.shape), t.dtype, t.numel()) for k, t in tensors.items()], limit)
    assert [[weight.key for weight in shard] for shard in mine] == [keys for keys in theirs.values() if keys]


def test_one_shard_is_in_memory_at_a_time_and_no_optimizer_state(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, highest, read = 0, 0, set()
    inner = TensorReader.read_all

    def freed(nbytes: int) -> None:
        nonlocal live
        live -= nbytes

    def watched(self: TensorReader, wanted: Any) -> Any:
        nonlocal live, highest
        for key, _, out in wanted:
            read.add(key)
            live += out.nbytes
            weakref.finalize(out.untyped_storage(), freed, out.nbytes)
        highest = max(highest, live)
        return inner(self, wanted)

    monkeypatch.setattr(TensorReader, "read_all", watched)
    done = export(trained.folder, tmp_path / "out", max_shard_bytes=40_000)
    checkpoint = open_checkpoint(trained.checkpoints / "step-000006")
    shards = split(model_weights(checkpoint, checkpoint.tensors()), 40_000)
    assert highest == max(sum(weight.nbytes for weight in shard) for shard in shards) <= 40_000 < done.nbytes / 2
    assert live == 0 and read == set(checkpoint.manifest.weights)


def test_entries_that_several_ranks_saved_are_put_together(tmp_path: Path) -> None:
    from grass_dist.checkpoint.dcp import open_tensors, write
    from grass_dist.checkpoint.pieces import Piece

    whole = torch.arange(12, dtype=torch.bfloat16)
    for name, start, end in (("a", 0, 5), ("b", 5, 12)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, [Piece("w", 12, start, whole[start:end])], {"w": 1}, None)
    part = next((tmp_path / "b").glob("*.safetensors"))
    part.rename(tmp_path / "a" / "shard-00002-model-00001-of-00001.safetensors")
    reader = open_tensors(tmp_path / "a")
    module._write_shard(reader, [Weight("w", (3, 4), torch.bfloat16, 12)], tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("w"), whole.view(3, 4))


def test_tensors_without_entries_and_without_dimensions(tmp_path: Path) -> None:
    reader = SimpleNamespace(
        tensors={"scalar": (1, torch.int64)}, read_all=lambda wanted: [out.fill_(7) for _, _, out in wanted]
    )
    weights = [Weight("scalar", (), torch.int64, 1), Weight("empty", (0, 4), torch.float32, 0)]
    module._write_shard(reader, weights, tmp_path / "out.safetensors")  # type: ignore[arg-type]
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.get_tensor("scalar").item() == 7 and file.get_tensor("empty").shape == (0, 4)


def test_a_damaged_checkpoint_is_left_for_the_one_before(run: Trained, tmp_path: Path) -> None:
    damage(run.checkpoints / "step-000006")
    ended = CliRunner().invoke(app, ["export", str(run.folder), str(tmp_path / "out")])
    assert ended.exit_code == 0, ended.output
    assert "the model after step 4, 0.25 MB in 1 file" in ended.stdout
    assert "damaged" in ended.stderr and "Going back" in ended.stderr
    ended = CliRunner().invoke(app, ["export", str(run.folder), str(tmp_path / "other"), "--step", "6"])
    assert ended.exit_code == 1 and "is damaged" in ended.stderr and ended.stderr.count("\n") == 1
    assert not ended.stdout and not (tmp_path / "other").exists()
    damage(run.checkpoints / "step-000004")
    with pytest.raises(CheckpointError, match="none of its checkpoints is good"):
        export(run.folder, tmp_path / "other")


def damage(folder: Path) -> None:
    file = next((folder / files.TENSORS).iterdir())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_step_and_a_checkpoints_folder(trained: Trained, tmp_path: Path) -> None:
    old = trained.checkpoints / "step-000004"
    assert export(trained.folder, tmp_path / "a", step=4).step == 4
    assert export(old, tmp_path / "b").step == export(old, tmp_path / "c", step=4).step == 4
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    for folder in (old, trained.folder):
        with pytest.raises(CheckpointError, match="no checkpoint of step 5; there is .*step-000004"):
            export(folder, tmp_path / "d", step=5)


@pytest.mark.parametrize("name", ["nothing", "empty", "file"])
def test_what_is_no_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    ended = CliRunner().invoke(app, ["export", str(tmp_path / name), str(tmp_path / "out")])
    assert ended.exit_code == 1 and name in ended.stderr and ended.stderr.count("\n") == 1
    (tmp_path / "empty" / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        export(tmp_path / "empty", tmp_path / "out")


def test_links_are_not_followed(run: Trained, tmp_path: Path) -> None:
    (run.checkpoints / "step-000009").symlink_to(run.checkpoints / "step-000004")
    with pytest.raises(CheckpointError, match="step-000009 is a link"):
        export(run.folder, tmp_path / "out")
    (run.checkpoints / "step-000009").unlink()
    secret, config = tmp_path / "secret", run.checkpoints / "step-000006" / files.MODEL / "config.json"
    config.rename(secret)
    config.symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"config\.json is a link"):
        export(run.folder, tmp_path / "out", step=6)
    run.checkpoints.rename(tmp_path / "elsewhere")
    run.checkpoints.symlink_to(tmp_path / "elsewhere")
    assert not (tmp_path / "out").exists()


def test_a_run_whose_folders_are_links_is_exported(run: Trained, tmp_path: Path) -> None:
    newest = open_checkpoint(checkpoints_in(run.checkpoints)[0]).step
    run.checkpoints.rename(tmp_path / "elsewhere")
    run.checkpoints.symlink_to(tmp_path / "elsewhere")
    run.folder.rename(tmp_path / "run elsewhere")
    run.folder.symlink_to(tmp_path / "run elsewhere")
    assert export(run.folder, tmp_path / "out").step == newest
    prune(run.checkpoints, 1)  # which nobody reads any more
    assert [path.name for path in run.checkpoints.iterdir()] == [f"step-{newest:06d}"]
    assert {row["health"] for row in inspect_run(run.folder)["checkpoints"]} == {"good"}


def test_a_checkpoint_of_the_library_alone_has_no_model(run: Trained, tmp_path: Path) -> None:
    run.save(7, with_model=False)
    with pytest.raises(CheckpointError, match=r"step-000007 has no model/config\.json, since"):
        export(run.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_in_out_stays_unless_it_is_a_replaceable_model(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export(trained.folder, out)  # an empty folder is fine
    (out / "old").touch()
    with pytest.raises(GrassError, match="not empty; choose another folder or give --overwrite"):
        export(trained.folder, out)
    assert (out / "old").exists()
    ended = CliRunner().invoke(app, ["export", str(trained.folder), str(out), "--overwrite"])
    assert ended.exit_code == 0 and not (out / "old").exists()
    check_loads(out, trained)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(GrassError, match="holds no model"):
        export(trained.folder, other, overwrite=True)
    with pytest.raises(GrassError, match="is a file"):
        export(trained.folder, other / "thesis.tex", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_a_checkpoint_is_never_written_into_or_replaced(run: Trained, tmp_path: Path) -> None:
    with pytest.raises(GrassError, match="lies in the checkpoint"):
        export(run.folder, run.checkpoints / "step-000004" / "hf")
    (run.folder / "config.json").touch()
    (run.folder / "a.safetensors").touch()
    with pytest.raises(GrassError, match="holds the checkpoint"):
        export(run.folder, run.folder, overwrite=True)
    assert open_checkpoint(run.checkpoints / "step-000004").step == 4


def test_a_failure_leaves_nothing(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(trained.checkpoints / "step-000006" / files.MODEL, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").touch()
    inner, calls = module._write_shard, []

    def fails(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) % 2 == 0:
            raise OSError(28, "No space left on device", "model-00002")
        inner(*arguments)

    monkeypatch.setattr(module, "_write_shard", fails)
    for out in (tmp_path / "new" / "deep" / "out", tmp_path / "out"):
        with pytest.raises(GrassError, match="was not written: model-00002: No space left on device.$"):
            export(trained.folder, out, max_shard_bytes=40_000, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == 0


def test_a_full_disk_is_reported_before_anything_is_written(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    monkeypatch.setattr(module, "_write", lambda *_: pytest.fail("it wrote"))
    ended = CliRunner().invoke(app, ["export", str(trained.folder), str(tmp_path / "out")])
    assert ended.exit_code == 1 and "GB and its disk has 0.0001 GB free" in ended.stderr
    assert not list(tmp_path.iterdir())


def rewrite(folder: Path, **changes: Any) -> None:
    """Changes the manifest as somebody would who wants it to look whole."""
    body = json.loads((folder / files.MANIFEST).read_text())
    body.pop("digest")
    body |= changes
    (folder / files.MANIFEST).write_text(json.dumps({**body, "digest": files._digest_of(body)}))


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "lists no weights"),
        ({NORM: {"shape": [33], "dtype": "float32"}}, "does not hold 'model.norm.weight' as its"),
        ({NORM: {"shape": [32], "dtype": "int32"}}, "does not hold"),
        ({NORM: {"shape": [32], "dtype": "load"}}, "no such weight"),
        ({NORM: {"shape": [32], "dtype": "\ud800"}}, "no such weight"),
        ({NORM: {"shape": [-4, -8], "dtype": "float32"}}, "a shape that no tensor has"),
        ({NORM: {"shape": [2**40], "dtype": "float32"}}, "a shape that no tensor has"),
        ({NORM: {"shape": ["32"], "dtype": "float32"}}, "is damaged"),
        ({"\x1b[2J": {"shape": [2], "dtype": "float32"}}, "does not hold"),
        ({"__metadata__": {"shape": [2], "dtype": "float32"}}, "no such weight"),
        ({NORM: {"shape": [0, 2**40], "dtype": "float32"}}, "a shape that no tensor has"),
    ],
)
def test_a_manifest_that_lies_is_refused(run: Trained, tmp_path: Path, weights: Any, message: str) -> None:
    rewrite(run.checkpoints / "step-000006", weights=weights)
    ended = CliRunner().invoke(app, ["export", str(run.folder), str(tmp_path / "out"), "--step", "6"])
    assert ended.exit_code == 1 and message in ended.stderr, ended.output
    assert "Traceback" not in ended.stderr and "\x1b" not in ended.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", ["[]", '"x"', "{", '{"a": NaN}'])
def test_a_configuration_that_is_none_is_refused(run: Trained, tmp_path: Path, config: str) -> None:
    folder = run.checkpoints / "step-000006"
    (folder / files.MODEL / "config.json").write_text(config)
    rewrite(folder, files={name: files.digest(folder / name).model_dump() for name in files.files_in(folder)})
    with pytest.raises(CheckpointError, match=r"config\.json is (damaged|no configuration)"):
        export(run.folder, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_other_weights_and_adapters_in_the_folder_are_not_copied(run: Trained, tmp_path: Path) -> None:
    folder = run.checkpoints / "step-000006"
    names = ["pytorch_model.bin", "model.safetensors", "model.safetensors.index.json", "adapter_config.json"]
    for name in [*names, "chat_template.jinja"]:
        (folder / files.MODEL / name).write_text("{}")
    entries = {name: files.digest(folder / name).model_dump() for name in files.files_in(folder)}
    rewrite(folder, files=entries)
    export(run.folder, tmp_path / "out")
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert there & set(names) == {"model.safetensors"} and {"chat_template.jinja", "tokenizer.json"} <= there
    check_loads(tmp_path / "out", run)


def test_sizes() -> None:
    assert [parse_size("x", text) for text in ("4GB", "1.5mb", "7", "2 KiB")] == [4 * 10**9, 1_500_000, 7, 2048]
    for text in ("0", "4 apples", "", "-1GB", "0.1", "1e9", "9" * 5000):
        with pytest.raises(ConfigError, match="this is no size"):
            parse_size("--max-shard-size", text)
