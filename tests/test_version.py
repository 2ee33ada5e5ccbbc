"""The version is the package's own: it is there in a checkout that was never installed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from setuptools.config.pyprojecttoml import read_configuration

import grass_dist

ROOT = Path(__file__).parents[1]
NEVER_INSTALLED = """
import importlib.metadata, sys
from pathlib import Path

find = importlib.metadata.Distribution.from_name.__func__

def from_name(cls, name):
    if name.replace("_", "-") == "grass-dist":
        raise importlib.metadata.PackageNotFoundError(name)
    return find(cls, name)

importlib.metadata.Distribution.from_name = classmethod(from_name)

import torch
from typer.testing import CliRunner
import grass_dist.cli
from grass_dist import GrassConfig, GrassOptimizer, load_checkpoint, save_checkpoint
from grass_dist.doctor.gather import find_versions
from grass_dist.finetune.identity import versions
from tests.tiny import take_steps, tiny

model = tiny()
optimizer = GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=GrassConfig(active_layers=2, probe_steps=1))
take_steps(model, optimizer, range(2))
save_checkpoint(sys.argv[1], optimizer, 2)
print(load_checkpoint(sys.argv[1], optimizer)[0])
print(CliRunner().invoke(grass_dist.cli.app, ["--version"]).stdout.strip())
print(find_versions()["grass-dist"], versions()["version of grass-dist"])
"""


def test_a_checkout_that_was_never_installed_saves(tmp_path):
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", NEVER_INSTALLED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)
    own = grass_dist.__version__
    assert done.stdout.splitlines() == ["2", f"grass-dist {own}", f"{own} {own}"], done.stderr[-2000:]


def test_what_is_installed_has_this_version():
    assert read_configuration(ROOT / "pyproject.toml")["project"]["version"] == grass_dist.__version__
    assert version("grass-dist") == grass_dist.__version__
