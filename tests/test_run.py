"""`grass_dist.run` in one process: the script's world is as without it, and other processes are left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grass_dist.config import GrassConfig
from grass_dist.errors import ConfigError
from grass_dist.run import config_from_environment
from grass_dist.startup import FOLDER, VARIABLE

ROOT = str(Path(__file__).parents[1])
RUN = ["-m", "grass_dist.run"]

WORLD = """
import json, os, sys
import beside
def show():
    main = sys.modules["__main__"]
    spec = main.__spec__ and main.__spec__.name
    file = getattr(main, "__file__", None)
    print(json.dumps([sys.argv, sys.path[0], __name__, file, spec, main.__dict__ is globals(), __package__]))
show()
if "fail" in sys.argv:
    raise ValueError("by the script")
if "exit" in sys.argv:
    sys.exit(7)
if "spawn" in sys.argv and __name__ == "__main__":
    import multiprocessing
    multiprocessing.get_context("spawn").Process(target=show).start()
"""


def python(*arguments: str, cwd=None, **environ: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name not in (VARIABLE, "GRASS_CONFIG", "RANK")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**kept, "PYTHONPATH": ROOT, **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def script(tmp_path):
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "pkg").mkdir()
    for file in (tmp_path / "script.py", tmp_path / "pkg" / "__main__.py"):
        file.write_text(WORLD)
    (tmp_path / "pkg" / "beside.py").write_text("")
    return tmp_path / "script.py"


# --- the script


@pytest.mark.parametrize("arguments", [["-m", "--config", "x", "--", "--help"], ["fail"], ["exit"], ["spawn"]])
@pytest.mark.parametrize("how", [["script.py"], ["-m", "pkg"]], ids=["file", "module"])
def test_a_script_sees_what_it_sees_without_us(script, how, arguments):
    plain = python(*how, *arguments, cwd=script.parent)
    ours = python(*RUN, "--active-layers", "2", *how, *arguments, cwd=script.parent)
    told, _, err = ours.stderr.partition("\n")
    assert told == f"GRASS: on for {how[-1]} and what it starts, with active_layers=2."
    assert (ours.returncode, ours.stdout) == (plain.returncode, plain.stdout) and ours.stdout
    # python -m shows its own frames above the module's
    assert err == "\n".join(line for line in plain.stderr.split("\n") if "<frozen runpy>" not in line)
    assert ("by the script" in err) == (arguments == ["fail"])


def test_the_command_passes_every_argument_through(script):
    passed = ["--config", "x", "--", "--help", "-m"]
    ours = python("-m", "grass_dist.cli", "run", "--active-layers", "2", str(script), *passed, cwd=script.parent)
    assert json.loads(ours.stdout)[0] == [str(script), *passed]
    assert "--active-layers" in python("-m", "grass_dist.cli", "run", "--help").stdout


def test_the_rank_option_of_deepspeed_reaches_the_script(script):
    ours = python(*RUN, "--local_rank=1", "--active-layers", "2", str(script), "x", RANK="1")
    assert json.loads(ours.stdout)[0] == [str(script), "--local_rank=1", "x"]
    assert ours.stderr == ""  # rank 0 speaks


def test_a_command_is_found_by_its_name(tmp_path):
    (command := tmp_path / "train-it").write_text(f"#!{sys.executable}\nimport sys; print(sys.argv)")
    command.chmod(0o755)
    ours = python(*RUN, "train-it", "x", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert ours.stdout == f"['{command}', 'x']\n", ours.stderr


def test_a_script_with_a_wrong_syntax_fails_as_without_us(tmp_path):
    (script := tmp_path / "wrong.py").write_text("x = = 1\n")
    plain, ours = python(str(script)), python(*RUN, str(script))
    assert ours.returncode == plain.returncode == 1
    assert ours.stderr.endswith(plain.stderr)


# --- the settings


def test_settings_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    (file := tmp_path / "grass.yaml").write_text("active_layers: 3\nalways_active: []\noffload: {mode: none}\n")
    monkeypatch.delenv("GRASS_CONFIG", raising=False)
    assert config_from_environment() is None
    expected = GrassConfig(active_layers=3, always_active=(), offload={"mode": "none"})
    for given in (str(file), file.read_text() and '{"active_layers": 3, always_active: [], offload: {mode: none}}'):
        monkeypatch.setenv("GRASS_CONFIG", given)
        assert config_from_environment() == expected
    code = "import os; print(os.environ['GRASS_DIST_RUN'])"
    (script := tmp_path / "s.py").write_text(code)
    ours = python(*RUN, "--config", str(file), str(script), GRASS_CONFIG="{active_layers: 1}")
    assert GrassConfig(**json.loads(ours.stdout)) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("active_layer: 3", "GRASS_CONFIG.active_layer=3: there is no such setting; did you mean 'active_layers'."),
        ("offload: {mode: fast}", "GRASS_CONFIG.offload.mode='fast': this value cannot be used; "),
        ("- 3", 'it holds no settings; write fields of GrassConfig, e.g. "active_layers: 4".'),
        ("grass: {active_layers: 3}", "its settings stand below grass:; write them without that name above them."),
        ("self: 3", "GRASS_CONFIG.self=3: there is no such setting; leave it out."),
        ("a: b: c", "it is not YAML: "),
        (None, "it cannot be read (No such file or directory); give an existing file."),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(text, sentence, tmp_path, monkeypatch):
    file = tmp_path / "grass.yaml"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv("GRASS_CONFIG", str(file))
    with pytest.raises(ConfigError) as raised:
        config_from_environment()
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--active-layers", "0", "s.py"], "active_layers=0: this value cannot be used; "),
        (["--config", "none.yaml", "s.py"], "--config='none.yaml': it cannot be read (No such file or directory)"),
        (["--active-layers", "2", "--config", "x", "s.py"], "not allowed with argument"),
        (["--active-layers", "2"], "SCRIPT is missing"),
        (["no-such-script"], "SCRIPT='no-such-script': there is no such file and no such command; "),
        (["./no/script.py"], "SCRIPT='./no/script.py': it cannot be read (No such file or directory); "),
        (["ls"], "is no Python script; "),
        (["-m", "no.module"], "-m='no.module': it cannot be found (No module named 'no'); "),
    ],
)
def test_wrong_arguments_end_it_before_the_script(arguments, sentence):
    ours = python(*RUN, *arguments)
    assert ours.returncode in (1, 2) and "Traceback" not in ours.stderr
    assert sentence in ours.stderr and "GRASS: on" not in ours.stderr


# --- other processes

SHOWN = """
import json, sys
heavy = [name for name in ("torch", "transformers", "pydantic", "yaml") if name in sys.modules]
armed = [finder for finder in sys.meta_path if type(finder).__module__ == "grass_dist.startup"]
site = [getattr(sys.modules.get(name), "HERE", None) for name in ("sitecustomize", "usercustomize")]
print(json.dumps([heavy, len(armed), site, [path for path in sys.path if "startup" in path]]))
"""


def child(*options: str, **environ: str) -> list:
    """What a process shows that a run has started."""
    paths = {"PYTHONPATH": os.pathsep.join([FOLDER, environ.pop("PYTHONPATH", ROOT)])}
    done = python(*options, "-c", SHOWN, **{VARIABLE: "null", **paths, **environ})
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_to_import_the_file_as_a_module_arms_nothing():
    done = python("-c", f"import grass_dist.startup.sitecustomize\n{SHOWN}", **{VARIABLE: "null"})
    assert json.loads(done.stdout)[1] == 0, done.stderr


def test_a_run_reaches_the_processes_that_it_starts(tmp_path):
    (script := tmp_path / "s.py").write_text(
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SHOWN!r}], check=True)"
    )
    assert json.loads(python(*RUN, str(script)).stdout) == [[], 1, [None, None], []]
    assert json.loads(python(str(script)).stdout) == [[], 0, [None, None], []]


def test_a_process_is_armed_without_any_work():
    assert child() == [[], 1, [None, None], []]
    assert child(PYTHONPATH="")[:2] == [[], 1]  # where grass_dist itself is not on the path
    assert child(**{VARIABLE: ""})[1] == 0
    for option in ("-I", "-E", "-S"):
        assert child(option)[1] == 0


def test_other_files_that_python_runs_at_its_start_still_run(tmp_path):
    for name in ("sitecustomize", "usercustomize"):
        (tmp_path / f"{name}.py").write_text(f"import sys; HERE = {name!r}")
    heavy, armed, sites, paths = child(PYTHONPATH=os.pathsep.join([str(tmp_path), ROOT]))
    plain = json.loads(python("-c", SHOWN, PYTHONPATH=str(tmp_path)).stdout)
    assert (armed, heavy, paths) == (1, [], []) and sites == plain[2] and sites[0] == "sitecustomize"
