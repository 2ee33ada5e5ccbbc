"""The scripts in launch/ with programs in the place of launchers: what they hand on, and what they never evaluate."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
RECORD = f"""#!{sys.executable}
import json, os, sys
with open(os.environ.get("RECORD", {{record!r}}), "a") as file:
    file.write(json.dumps({{{{"argv": sys.argv, "environ": dict(os.environ)}}}}) + "\\n")
"""


def programs(folder: Path, *names: str) -> Path:
    """A folder of programs that write down how they were called."""
    (folder / "bin").mkdir(exist_ok=True)
    for name in names:
        file = folder / "bin" / name
        file.write_text(RECORD.format(record=str(folder / name)))
        file.chmod(0o755)
    return folder / "bin"


def calls(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def run(script: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    plain = {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": "/nowhere", "DS_ACCELERATOR": "cpu"}
    argv = ["bash", str(ROOT / "launch" / script), *arguments]
    return subprocess.run(argv, env={**plain, **environ}, capture_output=True, text=True, timeout=60)


EVALUATED = [
    "x[$(touch {0})]",
    "$(touch {0})",
    "`touch {0}`",
    "1;touch {0}",
    "a[`touch {0}`]",
    "-1",
    "1 2",
    "1\n2",
    "x",
]
NUMBERS = {
    "torchrun.sh": ("RANKS", "PORT", "NODES", "NODE_RANK", "RESTARTS"),
    "mpirun.sh": ("RANKS",),
    "deepspeed.sh": ("RANKS", "PORT", "NODE_RANK"),
}


@pytest.mark.parametrize(("script", "name"), [(script, name) for script, names in NUMBERS.items() for name in names])
def test_what_must_be_a_number_is_never_evaluated(tmp_path: Path, script: str, name: str) -> None:
    at = programs(tmp_path, "launcher")
    launchers = dict.fromkeys(("PYTHON", "MPIRUN", "DEEPSPEED"), str(at / "launcher"))
    for text in EVALUATED:
        ended = run(script, **launchers, **{name: text.format(tmp_path / "evaluated")})
        assert ended.returncode == 2, ended
        assert ended.stderr.startswith(f"error: {name}=") and ended.stderr.count("\n") == 1
    assert not (tmp_path / "evaluated").exists() and not (tmp_path / "launcher").exists()
    ended = run(script, **launchers, **{name: "08"})
    assert ended.returncode == 0 and calls(tmp_path, "launcher"), ended.stderr


@pytest.mark.parametrize("text", ["x[$(touch {0})]", "$(shell touch {0})", "1;touch {0}"])
@pytest.mark.parametrize("name", ["RANKS", "BACKEND"])
def test_make_does_not_evaluate_them_either(tmp_path: Path, name: str, text: str) -> None:
    value = text.format(tmp_path / "evaluated")
    for argv, environ in ((["make", "-n", "demo"], {name: value}), (["make", "-n", "demo", f"{name}={value}"], {})):
        ended = subprocess.run(argv, cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True)
        assert ended.returncode == 2 and f"{name}=" in ended.stderr
    assert not (tmp_path / "evaluated").exists()


@pytest.mark.parametrize(
    ("script", "name", "text"),
    [
        ("deepspeed.sh", "HEAD", "a;touch {0}"),
        ("deepspeed.sh", "LAUNCHER", "pdsh touch"),
        ("mpirun.sh", "HOSTS", "a b"),
    ],
)
def test_names_of_hosts_are_names(tmp_path: Path, script: str, name: str, text: str) -> None:
    at = programs(tmp_path, "launcher")
    ended = run(script, MPIRUN=str(at / "launcher"), DEEPSPEED=str(at / "launcher"), **{"RANKS": "1", name: text})
    assert ended.returncode == 2 and ended.stderr.startswith(f"error: {name}=")


ODD = "a b$(touch {0})`touch {0}`\"'\\$HOME;&|<>*?~#!%h%n%% é"
SECRETS = {name: f"secret-{name}" for name in ("HF_TOKEN", "WANDB_API_KEY", "NCCL_SECRET", "MLFLOW_TRACKING_TOKEN")}
SECRETS |= {"PYTHONSTARTUP": "secret-PYTHONSTARTUP", "UCX_SECRET": "secret-UCX", "HF_PASSWORD": "secret-HF"}


def as_pdsh_does(text: str, host: str = "node1") -> str:
    """How pdsh writes what stands for its own words: %h, %u, %n and %%."""
    out, at = "", 0
    while at < len(text):
        pair = text[at : at + 2]
        words = {"%h": host, "%u": "root", "%n": "0", "%%": "%"}
        out, at = (out + words[pair], at + 2) if pair in words else (out + text[at], at + 1)
    return out


def test_a_remote_shell_gets_what_is_listed_and_no_secret(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    at = programs(tmp_path, "pdsh", "ssh", "remote")
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    odd = ODD.format(tmp_path / "evaluated")
    given = {"NCCL_SOCKET_IFNAME": odd, "HF_HOME": odd, "NCCL_DEBUG_FILE": "/tmp/%h.%p", "MINE": odd, "NCCL_IB_HCA": ""}
    arguments = [f"data.prompt={odd}", f"x={odd.replace(' ', '')}", "plain=1e-5", "", "it's", '{"a": "b c"}', "a%hb"]
    ended = run(
        "deepspeed.sh",
        *arguments,
        **{**given, **SECRETS, "HOSTFILE": str(tmp_path / "hosts"), "HEAD": "10.0.0.1", "PASS": "MINE"},
        PATH=f"{at}:{BIN}:{os.environ['PATH']}",
    )
    assert ended.returncode == 0, ended.stderr
    [call] = calls(tmp_path, "pdsh")
    assert "secret" not in json.dumps(call["argv"]) and "HF_TOKEN is not passed to the other hosts" in ended.stderr
    # What follows pdsh's own options is one line for the remote shell.
    assert call["argv"][1:6:2] == ["-S", "1024", "node1,node2"]
    line = as_pdsh_does(" ".join(call["argv"][6:]))
    line, launches = re.subn(r"\S+/python\S* -u -m deepspeed\.launcher\.launch", str(at / "remote"), line)
    assert launches == 1
    for shell in ("bash", "sh"):
        subprocess.run([shell, "-c", line], env={"PATH": os.environ["PATH"]}, check=True, timeout=30)
        remote = calls(tmp_path, "remote")[-1]
        assert {name: remote["environ"].get(name) for name in given} == given
        assert remote["argv"][-len(arguments) :] == arguments
        assert not (tmp_path / "evaluated").exists() and not SECRETS.keys() & remote["environ"].keys()


def test_the_file_of_variables_is_its_owners_alone_and_goes(tmp_path: Path) -> None:
    at = programs(tmp_path, "deepspeed")
    (at / "deepspeed").write_text(
        f'#!/bin/sh\nstat -c "%a" "$DS_ENV_FILE" > {tmp_path}/mode\necho "$DS_ENV_FILE" > {tmp_path}/file\n'
    )
    (tmp_path / "hosts").write_text("node1 slots=2\n")
    ended = run("deepspeed.sh", HOSTFILE=str(tmp_path / "hosts"), DEEPSPEED=str(at / "deepspeed"), HF_TOKEN="secret")
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "mode").read_text().strip() == "600"
    assert not Path((tmp_path / "file").read_text().strip()).exists()


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"NCCL_DEBUG": "a\nHF_HOME=b"}, "error: NCCL_DEBUG has a line break"),
        ({"NCCL_DEBUG": " INFO"}, "error: NCCL_DEBUG has a line break or spaces at an end"),
        ({"PASS": "HF_TOKEN", "HF_TOKEN": "x"}, "error: PASS names HF_TOKEN, which would be read"),
        ({"PASS": "my_api_key"}, "error: PASS names my_api_key"),
        ({"HF_ENDPOINT": "https://me:secret@mirror"}, "error: HF_ENDPOINT has a user or a password in it"),
        ({"PASS": "a$(touch x)"}, "error: PASS="),
        ({"LAUNCHER": "mpich", "NCCL_DEBUG": "a b"}, r"error: NCCL_DEBUG=a\ b: mpich would get it with quotes"),
    ],
)
def test_what_cannot_be_handed_on_is_refused(tmp_path: Path, environ: dict[str, str], message: str) -> None:
    at = programs(tmp_path, "deepspeed")
    (tmp_path / "hosts").write_text("node1 slots=2\n")
    ended = run("deepspeed.sh", DEEPSPEED=str(at / "deepspeed"), HOSTFILE=str(tmp_path / "hosts"), **environ)
    assert ended.returncode == 2 and ended.stderr.splitlines()[-1].startswith(message), ended.stderr
    assert not (tmp_path / "deepspeed").exists()


@pytest.mark.parametrize("script", ["mpirun.sh", "deepspeed.sh"])
def test_mpirun_gets_names_and_no_values(tmp_path: Path, script: str) -> None:
    at = programs(tmp_path, "launcher")
    (tmp_path / "hosts").write_text("node1 slots=2\n")
    environ = {"HF_HOME": "/odd place", "MINE": "value", "PASS": "MINE", "RANKS": "1", **SECRETS}
    if script == "mpirun.sh":
        environ |= {"HOSTS": "node1,node2", "MPIRUN": str(at / "launcher")}
    else:
        environ |= {"HOSTFILE": str(tmp_path / "hosts"), "LAUNCHER": "openmpi", "DEEPSPEED": str(at / "launcher")}
    ended = run(script, **environ)
    assert ended.returncode == 0, ended.stderr
    [call] = calls(tmp_path, "launcher")
    line = " ".join(call["argv"])
    assert "-x HF_HOME" in line and "-x MINE" in line and "/odd place" not in line and "value" not in line
    assert not any(name in line for name in SECRETS) and "HF_TOKEN is not passed" in ended.stderr


def test_slurm_passes_the_environment_on_by_itself(tmp_path: Path) -> None:
    at = programs(tmp_path, "deepspeed")
    (tmp_path / "hosts").write_text("node1 slots=2\n")
    where = {"HOSTFILE": str(tmp_path / "hosts"), "DEEPSPEED": str(at / "deepspeed"), "LAUNCHER": "slurm"}
    ended = run("deepspeed.sh", **where, HF_TOKEN="secret")
    assert ended.returncode == 0 and "HF_TOKEN" not in ended.stderr
    [call] = calls(tmp_path, "deepspeed")
    assert "secret" not in json.dumps(call["argv"]) and call["environ"]["HF_TOKEN"] == "secret"


def test_no_name_of_a_secret_is_listed() -> None:
    listed = subprocess.run(["bash", "-c", f". {ROOT}/launch/common.sh; echo $NAMES"], capture_output=True, text=True)
    names = set(listed.stdout.split())
    words = ("TOKEN", "KEY", "SECRET", "PASS", "CREDENTIAL")
    assert {name for name in names if any(word in name for word in words)} == {
        "HF_TOKEN_PATH",
        "TOKENIZERS_PARALLELISM",
    }
    assert len(names) > 50 and stat.S_ISREG((ROOT / "launch" / "common.sh").stat().st_mode)
