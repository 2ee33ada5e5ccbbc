"""Files that somebody else has made, given to every command: nothing in them is executed, imported or downloaded."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grass_dist.checkpoint import files
from grass_dist.checkpoint.saving import write_snapshot
from grass_dist.checkpoint.snapshot import Snapshot
from grass_dist.cli import app
from grass_dist.finetune.config_file import load_config
from grass_dist.ranks import Ranks
from integration_tests.support.program import make_config, make_data
from tests import hostile
from tests.foreign_commands import SITE
from tests.test_export import GRASS, Trained, train
from tests.test_report import events, write_run

ROOT = Path(__file__).parents[1]
HUB = "evil/model"
STEP = 4
TRAP = """
import os
open(os.environ["GRASS_TRAP"], "a").write("executed code that came with the model\\n")
from transformers import PretrainedConfig as TrapConfig, LlamaForCausalLM as TrapModel
from transformers import PreTrainedTokenizerFast as TrapTokenizer
"""
CODE = {"AutoConfig": "trap.TrapConfig", "AutoModelForCausalLM": "trap.TrapModel"}


class Sets:
    """A pickle that leaves a line in the trap's file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import os; open(os.environ['GRASS_TRAP'], 'a').write('executed a pickle\\n')",)


def poison(folder: Path, **settings: Any) -> None:
    """Has everything in a checkpoint that names something name what must not be touched."""
    model = folder / files.MODEL
    config = json.loads((model / "config.json").read_text())
    config |= {"auto_map": CODE, "_name_or_path": HUB, "attn_implementation": "evil/kernel", "use_kernels": True}
    (model / "config.json").write_text(json.dumps(config | settings))
    (model / "trap.py").write_text(TRAP)
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["trap.TrapTokenizer", None]}, "tokenizer_class": "TrapTokenizer"}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (model / name).write_bytes(pickle.dumps(Sets()))
    state = hostile.read(folder / files.STATE)
    run = state["run"]["config"]
    run["model"] = {"name": HUB, "trust_remote_code": True}
    run["data"] = {"name": HUB, "text": "text"}
    run["parallel"] = {"backend": "deepspeed", "config": str(folder / "nowhere.json")}
    run["grass"]["offload"] = {"mode": "interval", "folder": str(folder.parents[1] / "offload")}
    run["output_dir"] = str(folder.parents[1] / "elsewhere")
    state["groups"] *= 2  # as the program groups parameters, so that a conversion comes to its end
    hostile.write(folder / files.STATE, state)
    hostile.reseal(folder)


def other_sampler(folder: Path) -> None:
    poison(folder)
    state = hostile.read(folder / files.STATE)
    state["run"]["config"]["grass"]["sampler"] = "trap:draw"
    hostile.write(folder / files.STATE, state)
    hostile.reseal(folder)


def in_deepspeeds_files(folder: Path) -> None:
    poison(folder)
    hostile.of_deepspeed(folder)
    for file in (folder / files.DEEPSPEED / "state").iterdir():
        torch.save({"module": Sets(), "optimizer_state_dict": Sets()}, file)
    hostile.reseal(folder)


RUNS: dict[str, Callable[[Path], None]] = {
    "known": poison,
    "strange": lambda folder: poison(folder, model_type="trap"),
    "backbone": lambda folder: poison(folder, model_type="dpt", backbone=HUB, use_timm_backbone=False),
    "sampler": other_sampler,
    "deepspeed": in_deepspeeds_files,
}
"""Ways to make a checkpoint of its own for each folder of a run."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("trained"), (STEP,))


def make_run(parent: Path, trained: Trained, attack: Callable[[Path], None]) -> Path:
    """A run's folder, with a record for a report and one checkpoint."""
    settings = load_config(ROOT / "configs" / "demo.yaml").model_dump(mode="json")
    settings["grass"] = GRASS.model_dump(mode="json")
    run = {"config": settings, "step": STEP, "updates": 2, "bad_steps": 0, "data": {}}

    def add(writing: Path) -> None:
        trained.model.config.save_pretrained(writing / files.MODEL)
        trained.tokenizer.save_pretrained(writing / files.MODEL)

    write_run(parent, events())
    snapshot = Snapshot.take(trained.optimizer.holdings(), STEP, run)
    attack(write_snapshot(parent / "checkpoints", snapshot, Ranks(), keep=3, add_files=add))
    return parent


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory, trained: Trained) -> Path:
    """A folder with a run of each kind, the trap, and what a command line names."""
    folder = tmp_path_factory.mktemp("foreign")
    for name, attack in RUNS.items():
        make_run(folder / name, trained, attack)
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    os.mkfifo(folder / "pipe")
    (folder / "doctor.json").write_text(
        json.dumps({"version": 1, "ranks": [{"device_bytes": "__import__('trap')"}], "hosts": []})
    )
    make_config(folder, folder / "nowhere", make_data(folder / "data.jsonl")).rename(folder / "own.yaml")
    return folder


PLAN = ["plan", "--gpus", "2", "--seq-len", "64", "--gpu-memory", "24GB", "--fast"]


def commands(at: Path) -> dict[str, list[list[str]]]:
    """What each command is given, by its name."""
    of = [at / name for name in RUNS]
    models = [str(run / "checkpoints" / f"step-{STEP:06d}" / "model") for run in of]
    return {
        "report": [["report", str(of[0])]],
        "inspect": [["inspect", str(run)] for run in of] + [["inspect", "--json", "--fast", str(run)] for run in of],
        "export": [["export", str(run), str(at / "out" / run.name)] for run in of],
        "convert": [["convert", str(run), str(at / "dcp" / run.name)] for run in of]
        + [["convert", str(run), str(at / "ds" / run.name), "--universal"] for run in of],
        "plan": [[*PLAN, "--model", model] for model in models]
        + [[*PLAN, "--model", f"{models[0]}/config.json"], [*PLAN, "--model", str(at / "pipe")]]
        + [[*PLAN, "--params", "7B", "--from", str(at / name)] for name in ("doctor.json", "pipe")],
        "show": [["show", str(at / "own.yaml"), f"model.name={model}"] for model in models[:2]],
        "doctor": [["doctor", "--folder", str(of[0]), "--size", "1KB"]],
        "train": [],  # it takes a process of its own: `test_a_resumed_fine_tune_loads_what_its_configuration_names`
    }


@pytest.fixture(scope="module")
def told(there: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """What each command line answered, in one process with a Hub that cannot be asked without being noticed."""
    lines = [line for of in commands(there).values() for line in of]
    ended = run_guarded(there, [sys.executable, "-m", "tests.foreign_commands"], json.dumps(lines))
    assert ended.returncode == 0, ended.stderr

    answers = json.loads(ended.stdout.splitlines()[-1])
    return dict(zip(map(tuple, lines), answers, strict=True))


def run_guarded(there: Path, argv: list[str], given: str = "") -> subprocess.CompletedProcess[str]:
    online = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")}
    environ = online | {"GRASS_TRAP": str(there / "trap"), "HF_ENDPOINT": "http://hub.invalid", "PYTHONPATH": ""}
    environ |= {"PYTHONPATH": f"{there / 'site'}:{ROOT}", "HF_HOME": str(there / "home"), "DS_ACCELERATOR": "cpu"}
    environ |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0"}  # datasets tells its host of the reader that is used
    return subprocess.run(argv, input=given, capture_output=True, text=True, cwd=ROOT, env=environ, timeout=200)


def test_every_command_is_tried(there: Path) -> None:
    """But for ``train``, which has a test below, and ``run``, which executes what it is given."""
    names = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    assert names == {*commands(there), "train", "run"}, "give a command that reads files a case here"


def test_the_trap_works(there: Path, tmp_path: Path) -> None:
    model = there / "strange" / "checkpoints" / f"step-{STEP:06d}" / "model"
    code = (
        "import pickle, sys, urllib.request\n"
        f"from transformers import AutoConfig\nAutoConfig.from_pretrained({str(model)!r}, trust_remote_code=True)\n"
        f"pickle.loads(open({str(model / 'optimizer.pt')!r}, 'rb').read())\n"
        "try: urllib.request.urlopen('http://hub.invalid')\nexcept OSError: pass\n"
    )
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    ended = run_guarded(tmp_path, [sys.executable, "-c", code])
    assert ended.returncode == 0, ended.stderr
    caught = (tmp_path / "trap").read_text()
    for line in ("executed code that came with the model", "executed a pickle", "asked for the host hub.invalid"):
        assert line in caught


@pytest.mark.timeout(240)
def test_no_command_executes_imports_or_asks_for_anything(there: Path, told: dict[tuple[str, ...], Any]) -> None:
    assert not (there / "trap").exists(), (there / "trap").read_text()
    for name in RUNS:
        assert not (there / name / "offload").exists() and not (there / name / "elsewhere").exists()
    for line, answer in told.items():
        assert answer["error"] is None, (line, answer)
        assert "Traceback" not in answer["output"], line


SENTENCES = {
    ("convert", "known", "--universal"): "load it by engine.load_checkpoint",
    ("convert", "deepspeed"): "and is not read, since that could execute anything",
    ("export", "deepspeed"): "and is not read, since that could execute anything",
    ("export", "known"): "has code that came with the checkpoint (model/trap.py): it was copied and not run",
    ("plan", "strange"): "has no model_type 'trap', and the code that comes with the model is not run",
    ("plan", "backbone"): "it takes a part of the model from elsewhere, backbone = ",
    ("plan", "known"): "comes with code of its own, which is not run",
    ("plan", "pipe"): "it is not a file",
    ("plan", "doctor.json"): "--from.ranks[0].device_bytes",
    ("report", "known"): "report.html",
    ("show", "known"): "it cannot be loaded",
    ("show", "strange"): "it cannot be loaded",
}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("words", SENTENCES, ids="-".join)
def test_what_a_command_says(told: dict[tuple[str, ...], Any], words: tuple[str, ...]) -> None:
    found = [answer for line, answer in told.items() if all(any(word in part for part in line) for word in words)]
    assert found
    for answer in found:
        assert SENTENCES[words] in " ".join(answer["output"].split()), answer["output"]


def test_a_resumed_fine_tune_loads_what_its_configuration_names(there: Path, trained: Trained, tmp_path: Path) -> None:
    config = make_config(tmp_path, trained.folder.parents[1] / "source", make_data(tmp_path / "data.jsonl"))
    trusts = ["parallel=single", "model.trust_remote_code=true"]  # its own model, and not that of the checkpoint
    argv = ["-m", "grass_dist.cli", "train", str(config), *trusts, "--resume", str(there / "known")]
    ended = run_guarded(there, [sys.executable, *argv])
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr
    assert f"the code that comes with {trained.folder.parents[1] / 'source'} may run: model.trust" in ended.stdout
    assert "error: data.chat_template=True: the run that it goes on with has null" in ended.stderr
    assert not (there / "trap").exists(), (there / "trap").read_text()
