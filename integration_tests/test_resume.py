"""Trainings that are stopped and go on: to the bit on as many ranks, and the same run on others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import grass_dist
from integration_tests.support.ranks import refused, run_ranks
from integration_tests.support.resume import Setting, Training, leg
from integration_tests.support.resume_zero import ZeroTraining, setting_of

pytestmark = pytest.mark.timeout(300)

GRASS = {"active_layers": 3, "probe_steps": 3, "sampling_interval": 4, "update_interval": 6, "seed": 1}
"""Layers switch after 3, 7, 11, 15 steps and are drawn two steps before; importances are refreshed after 7 and 13."""

MOMENTS = {
    1: "in the probe",
    3: "at the first switch",
    4: "between two draws, with measurements that wait for a refresh",
    5: "after a draw, while the next states come",
    6: "in the last step of a round, whose states leave",
    7: "at a switch and a refresh",
    10: "after a refresh, with a draw that waits",
}
"""Steps after which the trainings are saved."""


def exact(rank: int, world_size: int, setting: Setting, steps: int, save_at: Sequence[int], folder: str) -> dict:
    """Steps at which a training that was resumed differs in a bit from one that was not; empty if all is well."""
    parent = Path(folder)
    whole = Training(rank, world_size, setting).run(steps, save_at, parent)
    wanted, drawn = whole.params(), whole.active
    undisturbed = Training(rank, world_size, setting).run(steps).params()
    odd: dict[Any, Any] = {}
    if differ := _differing(wanted, undisturbed):
        odd["saving disturbed"] = differ[:3]
    for step in save_at:
        resumed = Training(rank, world_size, setting).load(parent / f"step-{step:06d}").run(steps)
        if differ := _differing(wanted, resumed.params()):
            odd[step] = differ[:3]
        if resumed.active != drawn[step:]:
            odd[f"draws after {step}"] = resumed.active
        if resumed.events != [(at, event) for at, event in whole.events if at > step]:
            odd[f"importances after {step}"] = resumed.events
    return odd


def _differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize(
    ("ranks", "setting", "save_at"),
    [
        (2, Setting("fsdp2", GRASS, accumulation=2), list(MOMENTS)),
        (
            2,
            Setting("ddp", {**GRASS, "offload": {"mode": "stream", "slots": 2, "chaos": 3}}, torch.bfloat16),
            [1, 5, 7],
        ),
        pytest.param(
            *(4, Setting("hsdp", {**GRASS, "offload": {"mode": "none"}}, background=False), [4, 10]),
            marks=pytest.mark.long,
        ),
        pytest.param(
            *(1, Setting("single", {**GRASS, "offload": {"mode": "stream", "slots": 2}}, accumulation=3)),
            list(MOMENTS),
            marks=pytest.mark.integration,
        ),
    ],
    ids=["fsdp2 interval", "ddp stream bf16", "hsdp none", "single stream"],
)
def test_it_goes_on_to_the_bit(ranks, setting, save_at, tmp_path):
    for odd in run_ranks(ranks, exact, setting, 16, save_at, str(tmp_path), timeout=200):
        assert not odd
    assert not list(tmp_path.glob(".*"))


def test_it_goes_on_on_other_ranks_and_under_another_backend(tmp_path):
    """4 → 2 → 3 → 1 ranks, FSDP2 → DDP → FSDP2 → one process, each saved in another phase of the method."""
    legs = [
        (4, Setting("hsdp", GRASS), 2),
        (2, Setting("ddp", GRASS), 6),
        (3, Setting("fsdp2", {**GRASS, "offload": {"mode": "stream", "slots": 2}}), 10),
        (1, Setting("single", {**GRASS, "offload": {"mode": "none"}}), 13),
        (2, Setting("fsdp2", GRASS), 29),
    ]
    [alone] = run_ranks(1, leg, Setting("single", GRASS), None, 30, 30, str(tmp_path / "alone"))
    source, at, drawn = None, 0, []
    for number, (ranks, setting, save_at) in enumerate(legs):
        folder = tmp_path / str(number)
        found = run_ranks(ranks, leg, setting, source, save_at + 1, save_at, str(folder), timeout=150)
        assert all(other["active"] == found[0]["active"] for other in found)
        drawn += found[0]["active"][: save_at - at]
        source, at = str(folder / f"step-{save_at:06d}"), save_at
    assert drawn == alone["active"][:29]
    assert found[0]["active"][-1] == alone["active"][29]
    worst = max((found[0]["params"][n] - p).abs().max().item() for n, p in alone["params"].items())
    print(f"worst difference after 30 steps on 4, 2, 3, 1 and 2 ranks: {worst:.2g}")
    assert worst < 1e-6


def in_loops_of_ones_own(rank: int, world_size: int, parent: str) -> dict[str, list[str]]:
    """What is wrong with what `AsyncCheckpointer` has saved beside the steps of FSDP2 and of ZeRO-2."""
    fsdp2, zero2 = Setting("fsdp2", GRASS), setting_of(2, "bf16", "interval", "dcp")
    makers = {
        "fsdp2": lambda: Training(rank, world_size, fsdp2),
        "zero2": lambda: ZeroTraining(rank, world_size, zero2),
    }
    return {name: beside_the_steps(make, Path(parent, name)) for name, make in makers.items()}


def beside_the_steps(make: Callable[[], Training], folder: Path) -> list[str]:
    undisturbed, whole, resumed = make().run(9).params(), make(), make()
    with grass_dist.AsyncCheckpointer(folder, trained(whole), keep=2) as checkpointer:
        for step in (2, 4, 6):
            whole.run(step)
            checkpointer.save(step, extra={"step": step})
        whole.run(9)
    newest, kept = checkpointer.latest(), sorted(path.name for path in folder.iterdir())
    odd = [] if newest == folder / "step-000006" and kept == ["step-000004", "step-000006"] else [str(newest), *kept]
    found = grass_dist.load_checkpoint(folder, trained(resumed))
    odd += [] if found == (6, {"step": 6}) else [f"{found} was loaded"]
    resumed.done = 6
    odd += [f"{name} of the run that was saved" for name in _differing(undisturbed, whole.params())]
    odd += [f"{name} of the run that went on" for name in _differing(undisturbed, resumed.run(9).params())]
    return odd + unwritten(folder, trained(resumed))


def trained(training: Training) -> Any:
    """What a loop of one's own gives to `AsyncCheckpointer`."""
    return training.engine if isinstance(training, ZeroTraining) else training.optimizer


def unwritten(folder: Path, optimizer: Any) -> list[str]:
    """Rank 0 cannot write; the next save tells all ranks, and nothing is left."""

    def no_room(writing: Path) -> None:
        raise OSError(28, "no room", str(writing))

    checkpointer = grass_dist.AsyncCheckpointer(folder, optimizer, add_files=no_room)
    checkpointer.save(8)
    told = refused(lambda: checkpointer.save(9))
    dist.barrier()  # until rank 0, which removes what there is of it, has been told too
    names = sorted(path.name for path in folder.iterdir())
    good = told.startswith("CheckpointError: The checkpoint of step 8 was not written: rank 0: ") and "no room" in told
    return [] if good and names == ["step-000004", "step-000006"] else [told, *names]


@pytest.mark.integration
def test_a_loop_of_ones_own_saves_beside_its_steps_to_the_bit(tmp_path):
    pytest.importorskip("deepspeed")
    told = run_ranks(2, in_loops_of_ones_own, str(tmp_path), timeout=200)
    assert told == [{"fsdp2": [], "zero2": []}] * 2
