"""`grass-dist convert --universal`: what it writes, and what it refuses (engines read it in `test_zero_universal`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from grass_dist.backends.zero.saved_state import GRASS_KEY, UPDATED_PARAMS_KEY
from grass_dist.checkpoint.universal_files import LATEST, to_universal
from grass_dist.cli import app
from grass_dist.errors import CheckpointError
from tests.hostile import reseal
from tests.test_export import Trained, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("trained"), (4,), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def made(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    done = CliRunner().invoke(app, ["convert", str(trained.folder), str(out), "--universal"])
    assert done.exit_code == 0, done.output
    assert (out / LATEST).read_text() == "step-000004" and sorted(p.name for p in out.iterdir()) == [
        LATEST,
        "step-000004",
    ]
    return out / "step-000004"


def read(file: Path) -> torch.Tensor:
    return torch.load(file, weights_only=True)["param"]


def test_masters_and_moments_are_as_they_were(trained: Trained, made: Path) -> None:
    states, found = trained.optimizer.state, 0
    for name, param in trained.model.named_parameters():
        folder, state = made / "zero" / name, states.get(param, {})
        weight = read(folder / "fp32.pt")
        assert weight.dtype == torch.float32 and weight.shape == param.shape
        assert torch.equal(weight.to(param.dtype), param)
        assert (folder / "exp_avg.pt").exists() == ("exp_avg" in state)
        if "exp_avg" in state:
            found += 1
            assert torch.equal(read(folder / "exp_avg.pt"), state["exp_avg"].view(param.shape))
            assert torch.load(folder / "step.pt", weights_only=True) == state["step"]
            assert not torch.equal(weight, param.float()), "the master, which is not rounded"
    assert 0 < found < len(list(trained.model.parameters()))


def test_the_position_and_the_groups_are_there(trained: Trained, made: Path) -> None:
    common = torch.load(made / "zero" / "optimizer_state.pt", weights_only=True)
    grass = trained.optimizer.grass
    assert common[GRASS_KEY]["step"] == grass.step == 4
    assert common[GRASS_KEY]["tracker"]["importances"] == list(grass.importances)
    assert common["param_groups"][0]["betas"] == (0.9, 0.999) and "foreach" not in common["param_groups"][0]
    trained_names = {name for name, param in trained.model.named_parameters() if trained.optimizer.state.get(param)}
    assert set(common[UPDATED_PARAMS_KEY]) == trained_names


def test_inspect_says_what_it_is(made: Path) -> None:
    told = CliRunner().invoke(app, ["inspect", str(made.parent)])
    assert told.exit_code == 1 and "holds a universal checkpoint of DeepSpeed" in " ".join(told.output.split())


def test_there_is_nothing_besides_after_a_refusal(trained: Trained, made: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already; give another folder"):
        to_universal(trained.checkpoints / "step-000004", made.parent)
    assert sorted(p.name for p in made.parent.iterdir()) == [LATEST, "step-000004"]


@pytest.mark.parametrize("name", ["../../away", ".", "a/b", "", "x" * 300])
def test_a_name_that_leads_elsewhere_is_refused(trained: Trained, name: str, tmp_path: Path) -> None:
    source = Path(shutil.copytree(trained.checkpoints / "step-000004", tmp_path / "step-000004"))
    manifest = json.loads((source / "checkpoint.json").read_text())
    first = next(iter(manifest["weights"]))
    manifest["weights"] = {name: manifest["weights"].pop(first), **manifest["weights"]}
    (source / "checkpoint.json").write_text(json.dumps(manifest))
    reseal(source)
    with pytest.raises(CheckpointError, match="cannot be the name of a folder|there is no weight"):
        to_universal(source, tmp_path / "out" / "deep")
    assert not list((tmp_path / "out").rglob("*.pt")) and not (tmp_path / "away").exists()
