"""Fine-tunes that are killed at a moment drawn at random, and how what goes on must equal what nobody disturbed."""

from __future__ import annotations

import json
import random
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from grass_dist.checkpoint import files
from grass_dist.checkpoint.folders import checkpoints_in, step_of
from grass_dist.checkpoint.loading import open_checkpoint
from grass_dist.errors import CheckpointError
from grass_dist.finetune.run_folder import LOCK
from integration_tests.support.mortal import RANKS, Ended, start, start_elastic
from integration_tests.support.program import make_config, make_data, make_model

STEPS = 60
COLLECTIVE = 20
"""Seconds, `train.timeout_seconds`."""
TIMES = re.compile(r"second|bytes_to|state_bytes|mfu")
"""In the record: what depends on when it was measured, or on where the states were when the run went on."""


@dataclass(frozen=True)
class Setting:
    """How a run trains and is saved; all but the number of steps."""

    backend: str
    dtype: str
    every: int
    background: bool
    mode: str
    accumulation: int
    more: tuple[str, ...] = ()

    def overrides(self, steps: int) -> list[str]:
        return [
            *(f"parallel={self.backend}", f"model.dtype={self.dtype}", f"grass.offload.mode={self.mode}"),
            *(f"train.max_steps={steps}", f"train.micro_batch_size={8 // RANKS // self.accumulation}"),
            *(f"train.timeout_seconds={COLLECTIVE}", f"train.checkpoint.every={self.every}", "train.eval_every=7"),
            *(f"train.checkpoint.async={str(self.background).lower()}", "train.checkpoint.keep=2", *self.more),
        ]

    def __str__(self) -> str:
        saves = f"{'async' if self.background else 'sync'} save every {self.every}"
        return f"{self.backend} {self.dtype}, {saves}, {self.mode}, {self.accumulation} micro-batches"


STREAM = ("grass.active_layers=3", "grass.offload.slots=2", "grass.sampling_interval=3", "grass.update_interval=5")
RECOMPUTE = ("model.activation_checkpointing=true", "grass.seed=1")
SETTINGS = (
    Setting("fsdp2", "float32", 4, True, "interval", 2),
    Setting("fsdp2", "bfloat16", 7, True, "stream", 1, STREAM),
    Setting("ddp", "float32", 5, False, "stream", 1, (*STREAM, "train.clip_grad_norm=null")),
    Setting("ddp", "bfloat16", 3, True, "none", 2),
    Setting("fsdp2", "bfloat16", 6, False, "interval", 1, (*RECOMPUTE, "train.checkpoint.on_save_error=stop")),
    Setting("ddp", "float32", 9, True, "interval", 1, ("grass.sampling_interval=5", "grass.update_interval=4")),
)


@dataclass(frozen=True)
class Death:
    """That rank ``rank`` dies at the ``count``-th passage of ``moment``."""

    moment: str
    count: int
    rank: int

    def environment(self, marker: Path) -> dict[str, str]:
        told = {"MORTAL_MOMENT": self.moment, "MORTAL_COUNT": str(self.count), "MORTAL_RANK": str(self.rank)}
        return {**told, "MORTAL_MARKER": str(marker)}


@dataclass(frozen=True)
class Case:
    """A run, its death, and how it goes on: by torchrun, or by another start, maybe with a second death on the way."""

    name: str
    setting: Setting
    death: Death
    elastic: bool = False
    again: float | None = None
    """Which second death, 0 to 1; None: it dies once."""

    def described(self, runs: Runs) -> str:
        death = self.death
        of = runs.passages(self.setting, death.moment, death.rank)
        by = "torchrun" if self.elastic else "another start" if self.again is None else "two more starts"
        return f"{self.setting}: {death.moment!r}, {death.count} of {of}, on rank {death.rank}, goes on by {by}"


AGAIN = (
    Death("evaluation", 1, 1),
    Death("the end: before the weights are gathered", 1, 0),
    Death("resume: while it is verified", 1, 1),
    Death("resume: half loaded", 3, 0),
)


class Runs:
    """The folder of all runs, with their model and data, and the undisturbed runs that have been made."""

    def __init__(self, folder: Path, steps: int = STEPS) -> None:
        self.folder, self.steps = folder, steps
        model = make_model(folder / "model")  # makes the folder
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
        self.config = make_config(folder, model, make_data(folder / "data.jsonl"))
        self._undisturbed: dict[Setting, Path] = {}
        self._passages: dict[Setting, list[dict[str, int]]] = {}

    def arguments(self, setting: Setting, name: str) -> list[str]:
        return ["--config", str(self.config), "--resume", "auto", f"name={name}", *setting.overrides(self.steps)]

    def run_folder(self, name: str) -> Path:
        return self.folder / "runs" / name

    def undisturbed(self, setting: Setting) -> Path:
        if setting not in self._undisturbed:
            name = f"undisturbed-{len(self._undisturbed)}"
            counts = self.folder / f"{name}.counts"
            counts.mkdir()
            ended = start(self.arguments(setting, name), {"MORTAL_COUNTS": str(counts)}, self.folder / f"{name}.out")
            assert [rank.code for rank in ended] == [0] * RANKS, [rank.err for rank in ended]
            self._passages[setting] = [json.loads((counts / f"{rank}.json").read_text()) for rank in range(RANKS)]
            self._undisturbed[setting] = self.run_folder(name)
        return self._undisturbed[setting]

    def passages(self, setting: Setting, moment: str, rank: int) -> int:
        """How often a rank of the undisturbed run passes a moment."""
        self.undisturbed(setting)
        return self._passages[setting][rank].get(moment, 0)

    def moments(self) -> list[str]:
        """All that are passed in any of the settings."""
        return sorted({m for s in SETTINGS if self.undisturbed(s) for rank in self._passages[s] for m in rank})


def drawn(runs: Runs, seed: int, number: int) -> Case:
    """Case ``number``: the moments take turns, all else is random."""
    rng, moments = random.Random(f"{seed}/{number}"), runs.moments()
    random.Random(seed).shuffle(moments)
    moment = moments[number % len(moments)]
    able = [(s, rank) for s in SETTINGS for rank in range(RANKS) if runs.passages(s, moment, rank)]
    setting, rank = rng.choice(able)
    death = Death(moment, rng.randint(1, runs.passages(setting, moment, rank)), rank)
    elastic = number % 5 == 4
    return Case(f"case-{number}", setting, death, elastic, None if elastic or rng.random() > 0.4 else rng.random())


def play(runs: Runs, case: Case) -> list[str]:
    """The run that is killed and goes on; what is wrong with it."""
    arguments, out = runs.arguments(case.setting, case.name), runs.folder / f"{case.name}.out"
    run, wanted = runs.run_folder(case.name), runs.undisturbed(case.setting)
    marker = runs.folder / f"{case.name}.died"
    if case.elastic:
        out.mkdir()
        code, left = start_elastic(arguments, case.death.environment(marker), out)
        found = [] if (code, left) == (0, 0) else [f"torchrun ended with {code} and left {left} processes"]
    else:
        found = killed(start(arguments, case.death.environment(marker), out / "first"), case.death)
        if case.again is not None:
            found += killed_again(runs, case, case.again)
        saved = checkpoints_in(run / "checkpoints")
        ended = start(arguments, {}, out / "last")
        found += [f"rank {r} then ended with {e.code}: {e.err[-600:]}" for r, e in enumerate(ended) if e.code != 0]
        if saved and f"step {step_of(saved[0])}: goes on from" not in ended[0].out:
            found.append(f"it did not go on from {saved[0].name}")
    if not marker.exists():
        found.append("the kill never happened")
    return found + differences(run, wanted)


def killed(ended: Sequence[Ended], death: Death) -> list[str]:
    """What is wrong with the ends of the ranks of which one has died."""
    if ended[death.rank].code != -signal.SIGKILL:
        return [f"rank {death.rank} was to die and ended with {ended[death.rank].code}: {ended[death.rank].err[-300:]}"]
    found = []
    for rank, own in enumerate(ended):
        said = [line for line in own.err.splitlines() if line.startswith("error: ")]
        if rank == death.rank:
            continue
        if own.code != 1:
            found.append(f"rank {rank} ended with {own.code} after the death of the other: {own.err[-300:]}")
        elif len(said) != 1 or f"rank {death.rank} (on host" not in said[0] or "Traceback" in own.err:
            found.append(f"rank {rank} said {own.err[-600:]!r}")
    return found


def killed_again(runs: Runs, case: Case, draw: float) -> list[str]:
    """A second death, of the run that goes on: soon, at a moment that it will certainly pass."""
    saved = checkpoints_in(runs.run_folder(case.name) / "checkpoints")
    able = [d for d in AGAIN if saved or not d.moment.startswith("resume")]
    death = able[int(draw * len(able))]
    marker, out = runs.folder / f"{case.name}.died-again", runs.folder / f"{case.name}.out" / "second"
    return killed(start(runs.arguments(case.setting, case.name), death.environment(marker), out), death)


def differences(run: Path, wanted: Path) -> list[str]:
    """In what a run that went on differs from the undisturbed one."""
    if not (run / "model" / "model.safetensors").exists():
        return ["there is no model"]
    found = [f"the weights differ: {odd}" for odd in [odd_tensors(run / "model", wanted / "model")] if odd]
    saved, expected = ([p.name for p in checkpoints_in(at / "checkpoints")] for at in (run, wanted))
    if saved != expected:
        found.append(f"its checkpoints are {saved} and not {expected}")
    for name in set(saved) & set(expected):
        try:
            open_checkpoint(run / "checkpoints" / name)
        except CheckpointError as error:
            found.append(str(error))
        if odd := odd_tensors(*(at / "checkpoints" / name / files.TENSORS for at in (run, wanted))):
            found.append(f"{name} differs: {odd}")
    if left := [path.name for at in (run / "checkpoints", run) for path in at.glob(".*") if path.name != LOCK]:
        found.append(f"left behind: {left}")
    return found + _odd_record(run, wanted)


def odd_tensors(folder: Path, wanted: Path) -> str:
    """What differs between the safetensors files of two folders, to the bit."""
    names = {file.name for at in (folder, wanted) for file in at.glob("*.safetensors")}
    odd = []
    for name in sorted(names):
        if not ((folder / name).exists() and (wanted / name).exists()):
            return f"{name} is in one of them"
        ours, theirs = load_file(folder / name), load_file(wanted / name)
        odd += ours.keys() ^ theirs.keys()
        odd += [key for key in ours.keys() & theirs.keys() if bits(ours[key]) != bits(theirs[key])]
    return f"{len(odd)} tensors, {min(odd)} for one" if odd else ""


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _odd_record(run: Path, wanted: Path) -> list[str]:
    try:
        ours, theirs = read_record(run), read_record(wanted)
    except ValueError as error:
        return [f"metrics.jsonl: {error}"]
    saves = [(e["step"], e["error"]) for e in ours if e["event"] == "checkpoint"]
    found = [] if saves == sorted({(step, None) for step, _ in saves}) else [f"saves in metrics.jsonl: {saves}"]
    ours, theirs = ([e for e in events if e["event"] != "checkpoint"] for events in (ours, theirs))
    for own, other in zip(ours, theirs, strict=False):
        if own != other:
            return [*found, f"metrics.jsonl has {own} and not {other}"]
    return found if len(ours) == len(theirs) else [*found, f"metrics.jsonl has {len(ours)} events, not {len(theirs)}"]


def read_record(run: Path) -> list[dict[str, Any]]:
    """The events of metrics.jsonl, without what was measured by a clock."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in event.items() if not TIMES.search(name)} for event in events]
