"""launch/finetune.py with the loss in chunks: the run is the one with whole logits, under each wrapper."""

from __future__ import annotations

import pytest

from integration_tests.support.program import events, run_all
from integration_tests.test_program_deepspeed import SETTINGS, launch, torchrun

pytestmark = [pytest.mark.timeout(300), pytest.mark.integration]
CHUNKED = ["model.logits=chunked", "save_model=false", *SETTINGS]


@pytest.fixture(scope="module")
def whole(config):
    return run_all(config, 2, "name=whole", "save_model=false", *SETTINGS)


@pytest.mark.parametrize("backend", ["fsdp2", "ddp", "zero2", "zero3"])
def test_a_run_is_the_one_with_whole_logits(config, whole, backend):
    name = f"name=chunked-{backend}"
    if backend.startswith("zero"):
        parallel = ["parallel=deepspeed", f"parallel.config={backend}.json"]
        done = launch(torchrun(), config, name, *parallel, *CHUNKED)
        assert done.returncode == 0, done.stderr[-3000:]
        run = config.parent / "runs" / f"chunked-{backend}"
    else:
        run = run_all(config, 2, name, f"parallel={backend}", *CHUNKED)
    mine, theirs = events(run, "step"), events(whole, "step")
    for key in ("active_layers", "tokens"):
        assert [s[key] for s in mine] == [s[key] for s in theirs], key
    assert [s["loss"] for s in mine] == pytest.approx([s["loss"] for s in theirs], abs=1e-5)
    evals = [[e["loss"] for e in events(folder, "eval")] for folder in (run, whole)]
    assert evals[0] == pytest.approx(evals[1], abs=1e-5) and len(evals[0]) > 1
