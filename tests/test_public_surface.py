"""What `import grass_dist` offers, and what the wheel holds besides modules."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

import grass_dist
from grass_dist import GrassConfig, GrassController, GrassOptimizer, Observer, OffloadConfig, Refreshed, find_layers
from tests.tiny import take_steps, tiny

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


def test_the_package_shows_its_public_names_and_no_others():
    shown = {name for name in dir(grass_dist) if not name.startswith("__")}
    assert shown == set(grass_dist.__all__) and "__version__" in dir(grass_dist)
    assert all(hasattr(grass_dist, name) for name in dir(grass_dist))
    assert grass_dist.__all__ == sorted(grass_dist.__all__, key=lambda name: (name[0].islower(), name))


def test_the_public_names_are_enough_for_a_watched_training():
    seen = []
    watcher: Observer = seen.append
    model = tiny()
    config = GrassConfig(active_layers=2, probe_steps=1, offload=OffloadConfig(mode="none"))
    optimizer = GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=config)
    assert isinstance(optimizer.grass, GrassController)
    optimizer.grass.add_observer(watcher)
    take_steps(model, optimizer, range(2))
    assert isinstance(seen[0], Refreshed) and len(seen[0].importances) == len(find_layers(model).layers)


def test_the_wheel_is_typed_and_has_the_template_of_the_report(tmp_path):
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "grass_dist", tmp_path / "grass_dist", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", BUILD, "dist"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    wheels = list((tmp_path / "dist").glob("*.whl"))
    assert len(wheels) == 1, done.stderr[-2000:]
    names = set(zipfile.ZipFile(wheels[0]).namelist())
    assert {"grass_dist/py.typed", "grass_dist/report/page.html.j2"} <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "grass_dist").rglob("*.py")} <= names
