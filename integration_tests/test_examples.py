"""Each script of examples/ trains on two CPU ranks, started by the command in its first line."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import shutil
import sys

import pytest

from integration_tests.support.launched import Launched
from integration_tests.support.program import ROOT
from integration_tests.support.ranks import free_port

EXAMPLES = ROOT / "examples"
STEPS, PROBE, INTERVAL, ACTIVE, LAYERS = 20, 2, 3, 2, 6
PRINTED = re.compile(r"step (\d+): trained layers \[([\d, ]*)\], loss ([\d.]+)")

without_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
SCRIPTS = [
    pytest.param("fsdp2_loop"),
    pytest.param("deepspeed_zero", marks=pytest.mark.integration),
    pytest.param("accelerate_loop", marks=pytest.mark.integration),
    pytest.param("trl_sft", marks=[pytest.mark.integration, without_trl]),
    pytest.param("fsdp2_tp_loop", marks=pytest.mark.long),
    pytest.param("esm2_masked", marks=pytest.mark.long),
    pytest.param("esmfold_trunk", marks=pytest.mark.long),
    pytest.param("trl_dpo", marks=[pytest.mark.long, without_trl]),
    pytest.param("trl_reward", marks=[pytest.mark.long, without_trl]),
]
CARRIED = re.compile(r"after step (\d+): carried layers \[([\d, ]*)\], (\d+) of (\d+) bytes")
REWARDED = re.compile(r"step (\d+): reward ([\d.]+)")


def command_of(name: str) -> str:
    """The first line of the script's docstring."""
    docstring = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text()))
    assert docstring is not None
    return docstring.splitlines()[0]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_trains_layers_in_turn_and_learns(name, tmp_path):
    shutil.rmtree(saved := ROOT / "runs" / name, ignore_errors=True)
    launcher, *arguments = shlex.split(command_of(name))
    with Launched([launcher, "--master_port", str(free_port()), *arguments], tmp_path / "log") as run:
        code = run.end(within=150)
        said = run.said
    assert code == 0, said[-3000:]
    printed = PRINTED.findall(said)
    # Trainer probes before its first step, and its log names the layers of the step to come.
    first, probe = (2, 0) if name.startswith("trl_") else (1, PROBE)
    assert [int(step) for step, _, _ in printed] == list(range(first, STEPS + 1)), said[-3000:]  # by one rank
    steps = {int(step): tuple(map(int, filter(None, layers.split(", ")))) for step, layers, _ in printed}
    assert all(steps.pop(step) == () for step in range(1, probe + 1))
    rounds = {(step - probe - 1) // INTERVAL: layers for step, layers in steps.items()}
    assert all(rounds[(step - probe - 1) // INTERVAL] == layers for step, layers in steps.items())
    assert all(len(set(layers)) == ACTIVE and max(layers) < LAYERS for layers in rounds.values())
    assert len(set(rounds.values())) > 2
    losses = [float(loss) for _, _, loss in printed]
    # A loss of pairs begins at ln 2.
    pairs = name in ("trl_dpo", "trl_reward")
    assert sum(losses[-3:]) < (0.7 * sum(losses[:3]) if pairs else sum(losses[:3]) - 1)
    if name == "fsdp2_loop":
        assert sorted(path.name for path in saved.iterdir()) == ["step-000015", "step-000020"]


@pytest.mark.integration
@without_trl
@pytest.mark.timeout(200)
def test_the_example_of_grpo_carries_what_has_changed(tmp_path):
    launcher, *arguments = shlex.split(command_of("trl_grpo"))
    with Launched([launcher, "--master_port", str(free_port()), *arguments], tmp_path / "log") as run:
        code = run.end(within=150)
        said = run.said
    assert code == 0 and "the copy is the trained model, to the bit" in said, said[-3000:]
    carried = [
        (int(s), tuple(map(int, layers.split(", "))), int(n), int(of)) for s, layers, n, of in CARRIED.findall(said)
    ]
    step, layers, nbytes, of = carried[0]
    assert (step, layers, nbytes) == (0, tuple(range(LAYERS)), of)  # before the probe
    assert [step for step, *_ in carried] == list(range(STEPS + 1))
    assert all(len(layers) == ACTIVE and nbytes < 0.4 * of for _, layers, nbytes, of in carried[1:])
    assert len({layers for _, layers, *_ in carried}) > 3
    rewards = [float(reward) for _, reward in REWARDED.findall(said)]
    assert len(rewards) == STEPS and sum(rewards[-3:]) > sum(rewards[:3]) + 0.5


@pytest.mark.long
@pytest.mark.timeout(200)
def test_the_trunk_learns_the_structure_of_a_file_in_one_process(tmp_path):
    """A straight chain, which is learnt further than the helix is that stands for a chain without a file."""
    (tmp_path / "proteins.fasta").write_text(">straight and more words\nACDEFGHIKLMN\nPQRSTVWYAC\n>short\nACD\n")
    rows = [
        f"ATOM  {n:5d}  CA  GLY A{n:4d}    {3.8 * n:8.3f}{0:8.3f}{0:8.3f}  1.00  0.00           C" for n in range(22)
    ]
    (tmp_path / "straight.pdb").write_text("\n".join(["HEADER", *rows, "END"]))
    with Launched([sys.executable, str(EXAMPLES / "esmfold_trunk.py"), str(tmp_path)], tmp_path / "log") as run:
        code = run.end(within=150)
        said = run.said
    assert code == 0, said[-3000:]
    losses = [float(loss) for _, _, loss in PRINTED.findall(said)]
    assert len(losses) == STEPS and losses[-1] < 2.7 < losses[0], losses  # with the helix it ends at 3.2


def test_every_example_is_run_and_listed_with_its_command():
    names = sorted(path.stem for path in EXAMPLES.glob("*.py"))
    assert names == sorted([*(param.values[0] for param in SCRIPTS), "trl_grpo"])
    table = (EXAMPLES / "README.md").read_text()
    assert all(f"[{name}.py]({name}.py)" in table and f"`{command_of(name)}`" in table for name in names)
