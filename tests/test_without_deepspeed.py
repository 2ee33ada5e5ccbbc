"""What does not need DeepSpeed runs where it is not installed: in processes in which importing it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SITE = """
import importlib.machinery, importlib.metadata, sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "deepspeed" else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
find = importlib.metadata.Distribution.from_name.__func__

def from_name(cls, name):
    if name == "deepspeed":
        raise importlib.metadata.PackageNotFoundError(name)
    return find(cls, name)

importlib.metadata.Distribution.from_name = classmethod(from_name)
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(SITE)
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "DS_ACCELERATOR")}
    environ |= {"PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, *arguments]
    return subprocess.run(argv, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=6, **sizes)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_throughput_refuses_only_its_deepspeed_wrappers(tmp_path: Path, model: Path) -> None:
    sizes = ["--model", str(model), "--rounds", "2", "--active", "2", "--length", "8"]
    what = ["--methods", "full", "grass", "--backends", "fsdp2", "zero2", "--json", str(tmp_path / "found.json")]
    ended = run(tmp_path, "-m", "benchmarks.throughput", *sizes, *what)
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["wrappers"]["zero2"]["refused"]["full"] == "ModuleNotFoundError: No module named 'deepspeed'"
    assert "full fine-tuning under zero2: ModuleNotFoundError" in ended.stdout
    assert {method: len(times) for method, times in found["wrappers"]["fsdp2"]["seconds"].items()} == {
        "full": 2,
        "grass": 2,
    }


def test_all_benchmarks_and_the_package_can_be_imported(tmp_path: Path) -> None:
    names = sorted(file.stem for file in (ROOT / "benchmarks").glob("*.py"))
    assert len(names) > 8
    lines = ["import sys", "sys.path.insert(0, 'benchmarks')", *(f"import {name}" for name in names)]
    lines += ["import grass_dist, grass_dist.cli"]
    ended = run(tmp_path, "-c", "\n".join([*lines, "assert 'deepspeed' not in sys.modules"]))
    assert ended.returncode == 0, ended.stderr
