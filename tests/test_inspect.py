"""`grass-dist inspect`: what it says of checkpoints, compared with the optimizer that saved them."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from grass_dist import GrassConfig
from grass_dist.checkpoint import files
from grass_dist.checkpoint.inspect import describe, inspect_run, layer_names
from grass_dist.checkpoint.loading import open_checkpoint
from grass_dist.cli import app
from tests.test_export import GRASS, Trained, damage, rewrite, train

LAYERS = 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("run"), (2, 7, 10))


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Trained:
    """A copy that a test may damage."""
    shutil.copytree(trained.folder, tmp_path / "run")
    return Trained(tmp_path / "run", trained.model, trained.optimizer, trained.tokenizer, trained.samples)


def write_metrics(run: Trained, events: list[dict[str, Any]], more: str = "") -> None:
    lines = [{"event": "step", "step": 1}, *events, {"event": "answer", "step": 10, "text": 'a "sample" of it'}]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + more)


def by_cli(folder: Path, *options: str) -> dict[str, Any]:
    ended = CliRunner().invoke(app, ["inspect", str(folder), "--json", *options])
    assert ended.exit_code == 0, ended.output
    return json.loads(ended.stdout)


def times_of(run: Trained, until: int) -> list[int]:
    """Steps that each layer trained, by what the observers were told."""
    times, ends = [0] * LAYERS, [s["step"] for s in run.samples[1:]] + [10**6]
    for sample, end in zip(run.samples, ends, strict=True):
        for layer in sample["active_layers"]:
            times[layer] += max(0, min(end, until) - sample["step"])
    return times


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_the_optimizers(tmp_path: Path, dtype: torch.dtype) -> None:
    trained = train(tmp_path, (2, 7, 10), dtype=dtype)
    found, grass = by_cli(trained.folder), trained.optimizer.grass
    assert [row["step"] for row in found["checkpoints"]] == [10, 7, 2]
    assert [row["health"] for row in found["checkpoints"]] == ["good"] * 3
    for row in found["checkpoints"]:
        assert row["ranks"] == 1 and row["format"] == "dcp" and row["backend"] == grass.backend.name
        on_disk = sum(f.stat().st_size for f in Path(row["folder"]).rglob("*") if f.is_file())
        assert row["bytes"] == on_disk - (Path(row["folder"]) / files.MANIFEST).stat().st_size
    good = found["newest_good"]
    assert (good["step"], good["phase"], good["round"]) == (10, grass.phase, grass.round) == (10, "train", 2)
    assert (good["skipped"], good["dropped"], good["notes"]) == (0, 0, [])
    assert [layer["importance"] for layer in good["layers"]] == list(grass.importances)
    assert [layer["probability"] for layer in good["layers"]] == list(grass.probabilities)
    assert [i for i, layer in enumerate(good["layers"]) if layer["now"]] == list(grass.active_layers)
    upcoming = grass._next
    assert upcoming is not None and good["next"] == {"layers": list(upcoming.active_layers), "from_step": upcoming.step}
    assert [i for i, layer in enumerate(good["layers"]) if layer["next"]] == list(upcoming.active_layers)
    assert [layer["name"] for layer in good["layers"]] == [f"model.layers.{i}" for i in range(LAYERS)]
    bytes_of = {optimizer.unit.name: optimizer.nbytes for optimizer in trained.optimizer._unit_optimizers}
    params = {optimizer.unit.name: len(optimizer.unit.params) for optimizer in trained.optimizer._unit_optimizers}
    for unit in [*good["layers"], *good["roles"]]:  # a step count is a tensor of four bytes, and is left out
        counts = 4 * params[unit["name"]] if bytes_of[unit["name"]] else 0
        assert unit["state_bytes"] == bytes_of[unit["name"]] - counts
    assert {role["name"]: role["times_trained"] for role in good["roles"]} == {"embeddings": 8, "final_norm": 8}
    assert good["state_bytes"] == sum(unit["state_bytes"] for unit in [*good["layers"], *good["roles"]])


def test_record_and_states_agree_how_often_layers_trained(run: Trained) -> None:
    wanted = times_of(run, 10)
    assert sum(wanted) == 2 * 8
    good = by_cli(run.folder)["newest_good"]
    assert good["times_trained_by"] == "state.json"
    assert [layer["times_trained"] for layer in good["layers"]] == wanted
    later = {**run.samples[-1], "step": 14, "round": 4}  # the run went on
    write_metrics(run, [run.samples[0], *run.samples, later], more='{"event": "sample", "st')
    good = by_cli(run.folder)["newest_good"]
    assert good["times_trained_by"] == "metrics.jsonl"
    assert [layer["times_trained"] for layer in good["layers"]] == wanted
    damage(run.checkpoints / "step-000010")
    good = by_cli(run.folder)["newest_good"]
    assert good["times_trained_by"] == "metrics.jsonl" and good["step"] == 7
    assert [layer["times_trained"] for layer in good["layers"]] == times_of(run, 7)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda samples: samples[1:],
        lambda samples: [*samples[:-1], {**samples[-1], "active_layers": [0, 1, 2]}],
        lambda samples: [{**samples[0], "active_layers": [77]}, *samples[1:]],
        lambda samples: [{**samples[0], "active_layers": 3}, *samples[1:]],
        lambda samples: [{**samples[0], "step": "2"}, *samples[1:]],
        lambda samples: [{"event": "sample"}, *samples],
        lambda samples: ["sample", *samples],
        lambda samples: [["sample"], *samples],
        lambda samples: [*samples, {"more": "x" * 2**21, "event": "sample"}],
    ],
)
def test_a_record_that_is_not_of_this_run_does_not_count(run: Trained, spoil: Any) -> None:
    write_metrics(run, spoil(run.samples))
    good = inspect_run(run.folder)["newest_good"]
    assert good["times_trained_by"] == "state.json"
    assert [layer["times_trained"] for layer in good["layers"]] == times_of(run, 10)


def test_a_record_that_is_a_link_or_a_pipe_is_not_read(run: Trained) -> None:
    write_metrics(run, run.samples)
    record = run.folder / "metrics.jsonl"
    record.rename(run.folder / "elsewhere.jsonl")
    record.symlink_to(run.folder / "elsewhere.jsonl")
    assert inspect_run(run.folder)["newest_good"]["times_trained_by"] == "state.json"
    record.unlink()
    os.mkfifo(record)
    assert inspect_run(run.folder)["newest_good"]["times_trained_by"] == "state.json"


def test_the_tables_say_it_too(trained: Trained) -> None:
    ended = CliRunner().invoke(app, ["inspect", str(trained.folder)])
    assert ended.exit_code == 0, ended.output
    out, grass = ended.stdout, trained.optimizer.grass
    assert "10 steps done, phase train, round 2, 0 skipped, 0 measurements dropped" in out
    assert "good" in out and "single" in out and "dcp" in out and "MB" in out
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if "model.layers." in line}
    assert list(rows) == [str(i) for i in range(LAYERS)]
    times = times_of(trained, 10)
    for i in range(LAYERS):
        cells = [cell.strip() for cell in rows[str(i)].split("│")[1:-1]]
        trains = [
            word
            for word, layers in (("now", grass.active_layers), ("next", grass._next.active_layers))  # type: ignore[union-attr]
            if i in layers
        ]
        shown = [str(times[i]), f"{grass.importances[i]:.3g}", f"{grass.probabilities[i]:.2%}", ", ".join(trains)]
        assert cells[1:5] == shown


def test_what_is_wrong_with_each_checkpoint(run: Trained) -> None:
    damage(run.checkpoints / "step-000010")
    (run.checkpoints / "step-000007" / files.STATE).unlink()
    (run.checkpoints / "step-000011").mkdir()
    ended = CliRunner().invoke(app, ["inspect", str(run.folder)])
    assert ended.exit_code == 0 and "has no checkpoint.json" in ended.stdout.replace("\n", " ")
    found = by_cli(run.folder)
    assert [row["step"] for row in found["checkpoints"]] == [11, 10, 7, 2]
    health = [row["health"] for row in found["checkpoints"]]
    assert "no checkpoint.json" in health[0] and "SHA-256" in health[1] and "missing" in health[2]
    assert health[3] == "good" and found["newest_good"]["step"] == 2
    fast = by_cli(run.folder, "--fast")  # the changed bit is not seen, the missing file is
    assert fast["checksums"] is False and fast["newest_good"]["step"] == 10
    assert [row["health"] for row in fast["checkpoints"]] == [health[0], "good", health[2], "good"]


def test_without_a_good_one_it_says_so_and_fails(run: Trained) -> None:
    for folder in run.checkpoints.iterdir():
        damage(folder)
    ended = CliRunner().invoke(app, ["inspect", str(run.folder), "--json"])
    assert ended.exit_code == 1 and json.loads(ended.stdout)["newest_good"] is None
    assert ended.stderr.strip().endswith("none of its checkpoints is good.")
    ended = CliRunner().invoke(app, ["inspect", str(run.folder)])
    assert ended.exit_code == 1 and ended.stdout.replace("\n", " ").count("SHA-256") == 3


def test_a_checkpoints_folder_and_what_is_none(trained: Trained, tmp_path: Path) -> None:
    found = by_cli(trained.checkpoints / "step-000007")
    assert [row["step"] for row in found["checkpoints"]] == [7] and found["newest_good"]["step"] == 7
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nothing"):
        ended = CliRunner().invoke(app, ["inspect", str(tmp_path / name)])
        assert ended.exit_code == 1 and "Traceback" not in ended.output


def test_in_the_probe_no_layer_trains(tmp_path: Path) -> None:
    grass = GrassConfig(active_layers=2, probe_steps=4)
    run = train(tmp_path, (2,), grass=grass)
    good = by_cli(run.folder)["newest_good"]
    assert (good["phase"], good["round"], good["next"]) == ("probe", -1, None)
    for layer in good["layers"]:
        assert layer["times_trained"] == 0 and layer["importance"] is None and layer["state_bytes"] == 0
        assert layer["now"] is False and layer["next"] is None and layer["name"]
        assert math.isclose(layer["probability"], 1 / LAYERS)
    CliRunner().invoke(app, ["inspect", str(run.folder)], catch_exceptions=False)


@pytest.mark.parametrize("extra", [{}, {"config": {}}, {"config": {"train": {}}, "step": 5}])
def test_without_the_programs_configuration_the_rest_is_there(tmp_path: Path, extra: dict[str, Any]) -> None:
    run = train(tmp_path, (5, 10), extra=extra)
    good = by_cli(run.folder)["newest_good"]
    assert good["phase"] == "train" and good["round"] == run.optimizer.grass.round and not good["notes"]
    assert {layer["probability"] for layer in good["layers"]} == {None}
    assert [layer["times_trained"] for layer in good["layers"]] == times_of(run, 10)
    write_metrics(run, run.samples)
    damage(run.checkpoints / "step-000010")
    good = by_cli(run.folder)["newest_good"]  # in its state no next draw tells the round
    assert (good["phase"], good["round"]) == ("train", 1)
    CliRunner().invoke(app, ["inspect", str(run.folder)], catch_exceptions=False)


def test_an_optimizer_that_counts_no_steps(tmp_path: Path) -> None:
    run = train(tmp_path, (6,), optimizer_class=torch.optim.SGD)
    good = by_cli(run.folder)["newest_good"]
    assert good["times_trained_by"] is None
    assert {layer["times_trained"] for layer in good["layers"]} == {None}
    write_metrics(run, run.samples)
    good = by_cli(run.folder)["newest_good"]
    assert [layer["times_trained"] for layer in good["layers"]] == times_of(run, 6)
    CliRunner().invoke(app, ["inspect", str(run.folder)], catch_exceptions=False)


def change_state(folder: Path, change: Any) -> None:
    """Changes state.json as somebody would who wants it to look whole."""
    body = json.loads((folder / files.STATE).read_text())
    change(body)
    (folder / files.STATE).write_text(json.dumps(body))
    entries = {name: files.digest(folder / name).model_dump() for name in files.files_in(folder)}
    rewrite(folder, files=entries)


def put(*path: Any) -> Any:
    """A change: the last of ``path`` is put where the others lead to."""

    def change(body: Any) -> None:
        *way, last, value = path
        for part in way:
            body = body[part] if part != "first" else next(iter(body.values()))
        body[last if last != "first" else next(iter(body))] = value

    return change


BAD = [
    put("engine", 3),
    put("engine", "step", "10"),
    put("engine", "active_layers", [0, 6]),
    put("engine", "active_layers", [1, 1]),
    put("engine", "next", {"step": 11}),
    put("engine", "next", "active_layers", [-1, 2]),
    put("engine", "tracker", "importances", []),
    put("engine", "tracker", "importances", [1e400] * LAYERS),
    put("engine", "tracker", "importances", [-1.0] * LAYERS),
    put("engine", "tracker", "importances", {"0": 1}),
    put("engine", "tracker", "dropped", -1),
    put("units", []),
    put("units", "first", "abc"),
    put("units", "first", {"model.norm.weight": 7}),
    put("units", "first", {"no.such.weight": {}}),
    put("units", "first", "first", {"step": "many"}),
    put("units", "first", "first", {"step": True}),
    put("units", "first", "first", {"step": [1]}),
    put("units", "first", "first", {"step": {"dtype": "float32", "value": [[1], 2]}}),
    put("units", "first", "first", {"step": {"dtype": "float32", "value": 1e400}}),
    put("units", "first", "first", {"step": -1}),
    put("units", "first", "first", {"exp_avg": {"dtype": "save"}}),
    put("units", "first", "first", {"exp_avg": {"dtype": "\ud800"}}),
    put("units", "first", "first", {"exp_avg": {"dtype": ["float32"]}}),
    put("units", "module." * 5000, {}),
    put("groups", {}),
    put("run", 5),
    put("run", {"config": [1]}),
    put("run", {"config": {"grass": "yes"}}),
    put("\x1b[2J\ud800", 1),
]


@pytest.mark.parametrize("change", BAD)
def test_a_state_that_cannot_be_ends_in_a_sentence(run: Trained, change: Any) -> None:
    for folder in run.checkpoints.iterdir():
        if folder.name != "step-000010":
            shutil.rmtree(folder)
    change_state(run.checkpoints / "step-000010", change)
    for options in (["--json"], [], ["--fast"]):
        ended = CliRunner().invoke(app, ["inspect", str(run.folder), *options])
        assert ended.exit_code == 1 and isinstance(ended.exception, SystemExit), ended.output
        assert ended.stderr.count("\n") == 1 and "Traceback" not in ended.stderr
        assert "\x1b" not in ended.output


@pytest.mark.parametrize(
    ("grass", "note"),
    [
        ({"active_layers": 7}, "the model has 6 layers"),
        ({"active_layers": 2, "sampler": "my-own"}, "there is no such sampler"),
        ({"active_layers": 2, "invented_later": 1}, "there is no such setting"),
        ({"active_layers": 1, "sampler": "fixed", "fixed_layers": [9]}, "the model has layers 0 to 5"),
        ({"active_layers": "2"}, "cannot be used"),
        ({"self": 1}, ""),
        ({**GRASS.model_dump(mode="json"), "temperature": 1e-9}, "underflows"),
    ],
)
def test_a_configuration_that_does_not_work_here_is_a_note(run: Trained, grass: dict[str, Any], note: str) -> None:
    change_state(run.checkpoints / "step-000010", put("run", {"config": {"grass": grass}}))
    good = by_cli(run.folder)["newest_good"]
    assert good["step"] == 10 and note in good["notes"][0] and len(good["notes"]) == 1
    assert {layer["probability"] for layer in good["layers"]} == {None}
    shown = CliRunner().invoke(app, ["inspect", str(run.folder)])
    assert shown.exit_code == 0 and note.split(" ")[0] in shown.stdout


def test_what_was_handed_over_cannot_steer_the_terminal(run: Trained) -> None:
    rewrite(run.checkpoints / "step-000010", saved="\x1b[31mred\ud800", backend="[bold]x[/bold]", world_size=10**4000)
    ended = CliRunner().invoke(app, ["inspect", str(run.folder)])
    assert ended.exit_code == 0 and "\x1b" not in ended.stdout
    assert by_cli(run.folder)["checkpoints"][0]["backend"] == "[bold]x[/bold]"


def test_layers_whose_names_are_not_found_are_left_without(run: Trained) -> None:
    checkpoint = open_checkpoint(run.checkpoints / "step-000010")
    assert layer_names(checkpoint, ["model.layers.0"]) and not layer_names(checkpoint, ["blocks.first"])
    folder = run.checkpoints / "step-000010"
    change_state(folder, lambda body: body["units"].update({"blocks.first": {}}))
    found = describe(open_checkpoint(folder), run.folder)
    assert {layer["name"] for layer in found["layers"]} == {None} and "left out" in found["notes"][0]
    assert CliRunner().invoke(app, ["inspect", str(run.folder)]).exit_code == 0


def test_a_stack_is_found_among_lists_of_as_many(run: Trained) -> None:
    shapes = {f"tower.{i}.w": {"shape": [2], "dtype": "float32"} for i in range(LAYERS)}
    body = json.loads((run.checkpoints / "step-000010" / files.MANIFEST).read_text())
    rewrite(run.checkpoints / "step-000010", weights={**shapes, **body["weights"]})
    change_state(run.checkpoints / "step-000010", lambda body: body["engine"].pop("names"))  # as older releases have it
    checkpoint = open_checkpoint(run.checkpoints / "step-000010")
    assert layer_names(checkpoint, []) == [f"model.layers.{i}" for i in range(LAYERS)]
    assert layer_names(checkpoint, ["tower.3"]) == [f"tower.{i}" for i in range(LAYERS)]
