"""DeepSpeed's own unit tests on a CPU, in stock and with `grass_dist.initialize` for `deepspeed.initialize`.

    python -m integration_tests.deepspeed_tests --checkout DIR [--mode block|plain] [-k WORDS] [--results FILE] [FILES]

DIR is a checkout of DeepSpeed's repository, near the release that is installed. With the mode "block" an engine has a
block in which all layers train without a probe, where the model has layers; with "plain" it has none. What passes
in stock runs once more in the mode. With ``--results`` each result is appended to a file as it comes, one line of JSON,
and a test whose result is there is not run again: a run that was stopped goes on where it was.

Stock compiles operators when a test first needs them, which takes minutes: build them before, or tests seem to hang.
TORCH_EXTENSIONS_DIR must be a folder that no other process uses: locks of operators that are built are removed there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer

from integration_tests.support import deepspeed_door

FILES = """
    runtime/zero/test_zero_tensor_fragment.py runtime/zero/test_zero_context.py
    runtime/zero/test_zero_context_return.py runtime/zero/test_zero_context_ancestry.py
    runtime/zero/test_ignore_unused_parameters.py runtime/zero/test_zero_grad_clip.py
    runtime/zero/test_zero_leaf_module.py runtime/zero/test_zero_dynamic_class.py
    runtime/zero/test_zero_nesting_init.py runtime/zero/test_unwrap_model.py
    runtime/zero/test_zero_allreduce_fetch_params.py runtime/zero/test_zero_late_module_attach.py
    runtime/zero/test_zero_hook_attribute_delegation.py runtime/zero/test_zero_autocast_mixed_dtype.py
    runtime/zero/test_zeropp.py runtime/zero/test_zero_config.py checkpoint/test_latest_checkpoint.py
    checkpoint/test_lr_scheduler.py checkpoint/test_other_optimizer.py checkpoint/test_shared_weights.py
    checkpoint/test_sparse.py checkpoint/test_tag_validation.py checkpoint/test_mics_optimizer.py
    checkpoint/test_zero_optimizer.py checkpoint/test_universal_checkpoint.py
    runtime/half_precision/test_dynamic_loss_scale.py runtime/half_precision/test_zero_optim_overflow.py
    runtime/half_precision/test_fp16.py runtime/test_ds_config_dict.py runtime/test_ds_config_model.py
    runtime/test_ds_initialize.py runtime/test_lr_schedulers.py runtime/test_no_sync_ctxt.py
    runtime/test_multi_output_model.py runtime/test_multiple_models.py runtime/test_mup_optimizers.py
    runtime/test_autocast.py v1/half_precision/test_bf16.py v1/half_precision/test_with_autocast.py
    v1/half_precision/test_mixed_precision_dtype.py v1/zero/test_zero.py v1/zero/test_zero_autocast.py
    v1/zero/test_offload_states.py v1/zero/test_zero_coalesce_grad_reduction.py v1/zero/test_zero_user_backward.py
    v1/zero/test_zero_hook_count_regression.py v1/zero/test_zero_activation_checkpoint_lifecycle.py
    v1/zero/test_zero_cpu_offload_grad_accum.py
"""
"""Of DeepSpeed's tests/unit: those that make ZeRO engines, load and save, or read a configuration."""
SECONDS = 900
"""For one start of pytest; what is left then has the next one."""


def main(
    files: Annotated[list[str] | None, typer.Argument(help="Files of DeepSpeed's tests/unit, instead of all.")] = None,
    checkout: Annotated[Path, typer.Option(help="A checkout of DeepSpeed.")] = Path("DeepSpeed"),
    mode: Annotated[Literal["block", "plain"], typer.Option(help="How our engines are made.")] = "block",
    k: Annotated[str, typer.Option("-k", help="As pytest's -k.")] = "",
    results: Annotated[Path | None, typer.Option(help="Where results are kept, one line of JSON each.")] = None,
) -> None:
    """Runs DeepSpeed's unit tests in stock, then with our function; prints what differs."""
    if not (checkout / "tests/unit/common.py").is_file():
        raise typer.BadParameter(f"{checkout} has no tests/unit/common.py: it is no checkout of DeepSpeed")
    with tempfile.TemporaryDirectory() as folder:
        told = results.absolute() if results else Path(folder) / "results"
        told.touch()
        for name in files or FILES.split():
            if not (checkout / "tests/unit" / name).is_file():
                print(f"{name}: this checkout has no such file", flush=True)
                continue
            for door in ("stock", mode):
                _run(checkout, name, door, k, told)
            print(f"{name}: {_counts(deepspeed_door.read(told), mode, name)}", flush=True)
        print(_table(deepspeed_door.read(told), mode))


def _run(checkout: Path, name: str, door: str, k: str, told: Path) -> None:
    """Runs what the results lack of a file: all of it in stock, and what has passed there in a mode."""
    before = -1
    while told.stat().st_size > before:  # a start without a result leaves nothing to start again for
        before = told.stat().st_size
        if _start(checkout, name, door, k, told):
            break


def _start(checkout: Path, name: str, door: str, k: str, told: Path) -> bool:
    """Starts pytest over a file; whether all of it ran, and nothing failed that could get another try."""
    root, plugin = Path(__file__).parents[1], deepspeed_door.__name__
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", plugin]
        command += ["--basetemp", f"{folder}/tmp", *(["-k", k] if k else []), f"unit/{name}"]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "LOCAL_SIZE": "4",  # so many CPU devices there are
            "DS_DISABLE_REUSE_DIST_ENV": "1",  # what a test leaves behind must not reach the next
            deepspeed_door.MODE: door,
            deepspeed_door.RESULTS: str(told),
        }
        tests = checkout / "tests"
        try:
            ended = subprocess.run(
                command, cwd=tests, env=environment, capture_output=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            print(f"{name}: not done in {door} after {SECONDS} s", flush=True)
            return False
    return ended.returncode in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)


def _counts(results: deepspeed_door.Results, mode: str, name: str) -> str:
    of_file = [told for test, told in results.items() if test.startswith(f"unit/{name}::")]
    seen = Counter(told[mode]["outcome"] for told in of_file if mode in told)
    stock = Counter(told["stock"]["outcome"] for told in of_file if "stock" in told)
    return f"stock {dict(stock)}; {mode} {dict(seen)}"


def _table(results: deepspeed_door.Results, mode: str) -> str:
    """What passes in both, and each reason for which a test differs, with how many do."""
    both = [told for told in results.values() if told.get("stock", {}).get("outcome") == "passed" and mode in told]
    passed = [told for told in both if told[mode]["outcome"] == "passed"]
    with_block = [told for told in passed if any("layers" in made for made in told[mode]["engines"])]
    why = Counter(told[mode]["why"] for told in both if told[mode]["outcome"] != "passed")
    rows = [f"{len(both)} pass in stock, {len(passed)} of them in {mode}, {len(with_block)} of those with a block"]
    rows += [f"{count:4d}  {reason}" for reason, count in why.most_common()]
    return "\n".join(rows)


if __name__ == "__main__":
    typer.run(main)
