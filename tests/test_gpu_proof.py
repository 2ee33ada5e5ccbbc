"""`make gpu` itself: its limits, what is left of a part that ends badly, and a whole run on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.document import page
from benchmarks.gpu import __main__ as proof
from benchmarks.gpu import cost, table
from benchmarks.gpu.parts import PARTS, WHOLE

MACHINE = {"gpus": ["GPU"], "cpu": "CPU", "python": "3.12", "versions": {"torch": "2.11"}, "date": "2026-01-01"}
MACHINE |= {"cores": 1, "memory_gb": 1}


def test_all_parts_together_have_eight_minutes():
    assert len(PARTS) == 11 and sum(part.seconds for part in PARTS.values()) <= WHOLE == 480


def test_a_part_without_its_libraries_is_not_here():
    part = replace(PARTS["facts"], needs=("torch", "no_such_library"))
    found = proof.run_part("facts", part, tiny=True)
    assert found == {"state": "not here", "missing": ["no_such_library"]}
    assert table.summary(found) == "needs no_such_library"


TELLS = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu.told import Told
told = Told(Path(sys.argv[1]), tiny=True, seconds=60)
told.check("first", True)
told.attempt("second", lambda: 1 / int(sys.argv[2] != "wrong"))
print("the last line", flush=True)
time.sleep(600 if sys.argv[2] == "late" else 0)
os._exit(7 if sys.argv[2] == "dies" else 0)
"""


@pytest.mark.parametrize(("how", "state"), [("well", "holds"), ("wrong", "fails"), ("dies", "died"), ("late", "late")])
def test_what_a_part_had_found_stays_however_it_ends(how: str, state: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(proof, "TINY", 4 if how == "late" else 60)
    monkeypatch.setattr(proof, "command", lambda name, told, *_, **__: [sys.executable, "-c", TELLS, str(told), how])
    found = proof.run_part("facts", PARTS["facts"], tiny=True)
    assert found["state"] == state and found["checks"]["first"] == {"holds": True}
    if how == "wrong":
        assert found["checks"]["second"]["error"].startswith("ZeroDivisionError")
        assert "1 of 2 hold; not: second (error ZeroDivisionError" in table.summary(found)
    if state in ("died", "late"):
        assert found["last lines"] == ["the last line"] and found["exit"] == {"dies": 7, "late": None}[how]
    if how == "dies":
        assert table.summary(found) == "exit status 7: the last line; 1 of 1 hold"


def test_results_are_added_to_those_of_the_same_machine():
    record: dict[str, Any] = {"tiny": False, "machine": None, "parts": {}}
    record = proof.with_part(record, "slot", {"state": "holds", "machine": MACHINE})
    record = proof.with_part(record, "facts", {"state": "measured", "machine": MACHINE})
    record = proof.with_part(record, "zero", {"state": "not here", "missing": ["deepspeed"]})
    assert list(record["parts"]) == ["facts", "slot", "zero"] and record["machine"] == MACHINE
    other = {**MACHINE, "gpus": ["another GPU"]}
    record = proof.with_part(record, "slot", {"state": "fails", "machine": other})
    assert list(record["parts"]) == ["slot"] and record["machine"] == other


def test_without_a_gpu_it_asks_for_the_trial(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(proof, "_has_gpu", lambda: False)
    for arguments, said in (([], "--tiny tries the parts"), (["--parts", "facts,cots"], "--parts cots: use some of")):
        with pytest.raises(SystemExit):
            proof.main(arguments)
        assert said in capsys.readouterr().err


def test_the_page_shows_results_of_gpus_and_no_trials():
    part = {"state": "fails", "seconds": 3.2, "checks": {"a | b": {"holds": False, "apart": 0.5}}, "figures": {}}
    measured = {"state": "measured", "seconds": 1, "figures": {"none": {"batch 1": {"tokens a second": 7}}}}
    record = {"machine": MACHINE, "parts": {"slot": part, "cost": measured}}
    results = {"gpu_x": {**record, "tiny": False}, "gpu": {**record, "tiny": True}, "offload_cpu": {}}
    [(where, found)] = page.proofs(results)
    assert where.startswith("2026-01-01, GPU, 1 GB") and "0 of 1 hold; not: a \\| b (apart 0.5)" in found
    assert found.splitlines()[-1] == "| cost | none: batch 1: tokens a second | 7 |"


def test_idle_time_and_launches_are_read_from_a_trace():
    def event(name: str, begin: float, end: float, cat: str, tid: int) -> dict[str, Any]:
        return {"ph": "X", "name": name, "cat": cat, "pid": 0, "tid": tid, "ts": begin, "dur": end - begin}

    events = [event("gemm", at, at + 5, "kernel", 7) for at in range(0, 100, 10)]
    events += [event("Memcpy HtoD (Pinned -> Device)", 2, 12, "gpu_memcpy", 9)]
    events += [event("GRASS last update", 200, 300, "user_annotation", 1), event("adam", 210, 250, "kernel", 7)]
    told = cost.of_trace(events)
    assert told == {"share of copies under kernels": 0.5, "GPU idle in an update": 0.6, "kernels a step": 2}


@pytest.mark.integration
@pytest.mark.timeout(900)
def test_every_part_runs_on_the_cpu(tmp_path: Path):
    file = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--json", str(file)]
    ended = subprocess.run(command, cwd=proof.ROOT, env=dict(os.environ), capture_output=True, text=True)
    record = json.loads(file.read_text())
    states = {name: part["state"] for name, part in record["parts"].items()}
    assert list(states) == list(PARTS) and record["tiny"] and record["machine"]["versions"]["torch"]
    fails = states["memory"] == "fails"  # the norm of bf16 gradients is taken of fp64 copies, as a GPU would show
    assert states.pop("memory") in ("holds", "fails") and ended.returncode == int(fails), ended.stdout
    assert states == {name: "measured" if name in ("facts", "cost") else "holds" for name in states}, ended.stdout
    assert "5 of 5 hold" in ended.stdout
