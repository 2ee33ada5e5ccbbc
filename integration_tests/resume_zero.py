"""The same as resume.py under DeepSpeed ZeRO: engines that stop, and go on from a checkpoint."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import grass_dist
from grass_dist.checkpoint.deepspeed_save import DeepSpeedSnapshot
from grass_dist.checkpoint.loading import Checkpoint, State, load, open_checkpoint
from grass_dist.checkpoint.saving import Format, Saver, write_snapshot
from grass_dist.checkpoint.zero_run import ZeroHoldings
from grass_dist.ranks import Ranks
from integration_tests.model import ADAMW, decay_groups, global_batch, schedule, small_llama
from integration_tests.ranks import refused
from integration_tests.resume import BATCH, Setting, Training
from integration_tests.zero import ds_config, full

GRASS = {
    "active_layers": 2,
    "sampling_interval": 4,
    "update_interval": 4,
    "probe_steps": 3,
    "draw_ahead": 2,
    "ema_alpha": 0.5,
    "temperature": 0.5,
    "seed": 3,
}
STEPS = 9
"""The last one refreshes the importances and draws once more."""
EVERYWHERE = (1, 2, 3, 4, 6, 7)
"""In the probe, before its last step; at a switch, in an interval, between a draw and its switch, at a switch."""


@dataclass(frozen=True)
class ZeroSetting(Setting):
    """``backend`` is zero1, zero2 or zero3."""

    kind: Format = "dcp"
    zero: dict[str, Any] = field(default_factory=dict)
    """Options of ``zero_optimization``."""


class ZeroTraining(Training):
    """`Training` on an engine."""

    def __init__(self, rank: int, world_size: int, setting: ZeroSetting) -> None:
        from grass_dist.deepspeed import initialize

        self.rank, self.world_size, self.setting, self._kind = rank, world_size, setting, setting.kind
        model = small_llama(setting.dtype)
        optimizer = torch.optim.AdamW(decay_groups(model), **ADAMW)
        config = ds_config(int(setting.backend[-1]), setting.grass, setting.accumulation, setting.dtype, setting.zero)
        self.engine, *_ = initialize(model=model, optimizer=optimizer, config=config)
        self.holdings = ZeroHoldings(self.engine)
        self.active: list[tuple[int, ...]] = []
        self.done = 0
        self._saver: Saver | None = None

    def save(self, folder: Path) -> None:
        if self._saver is None:
            ranks = Ranks(dist.new_group(backend="gloo"))
            self._saver = Saver(folder, self.holdings, ranks, keep=100, background=True, format=self._kind)
        elif (saved := self._saver.outcome()) and saved.error:
            raise saved.error
        self._saver.save(self.done, {})

    def load(self, folder: Path) -> ZeroTraining:
        return self.load_open(open_checkpoint(folder, self.holdings.ranks))

    def load_open(self, checkpoint: Checkpoint) -> ZeroTraining:
        self.to_the_bit = load(checkpoint, self.holdings)
        self.done = checkpoint.step
        self.active.clear()
        return self

    def params(self) -> dict[str, torch.Tensor]:
        return {n: full(p) for n, p in self.engine.module.named_parameters()}

    def _step(self) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = ADAMW["lr"] * schedule(self.done)
        x, accumulation = global_batch(self.done, BATCH), self.setting.accumulation
        per = BATCH // self.world_size // accumulation
        self.active.append(self.engine.grass.active_layers)
        for micro in range(accumulation):
            mine = x[(micro * self.world_size + self.rank) * per :][:per]
            self.engine.backward(self.engine(input_ids=mine, labels=mine).loss)
            self.engine.step()
        self.done += 1


def exact(rank: int, world_size: int, setting: ZeroSetting, save_at: Sequence[int], folder: Path) -> list[str]:
    """What differs in a bit between a training that was resumed and one that was not."""
    whole = ZeroTraining(rank, world_size, setting).run(STEPS, save_at, folder)
    undisturbed = ZeroTraining(rank, world_size, setting).run(STEPS)
    odd = [f"saving disturbed {what}" for what in differing(whole, undisturbed)]
    undisturbed.engine.destroy()
    for step in save_at:
        resumed = ZeroTraining(rank, world_size, setting)
        if step == save_at[-1]:
            resumed.run(5)  # it need not be a fresh one
        resumed.load(folder / f"step-{step:06d}")
        odd += [] if resumed.to_the_bit else [f"{step} was not loaded to the bit"]
        odd += [f"{step}: {unit} has a state" for unit in stateful(resumed) ^ drawn_before(whole, step)]
        resumed.run(STEPS)
        odd += [f"{what} differs after {step}" for what in differing(whole, resumed)]
        resumed.engine.destroy()
    whole.engine.destroy()
    return odd


def differing(a: ZeroTraining, b: ZeroTraining) -> list[str]:
    """Parameters, draws, and the method: its measurements too."""
    mine, theirs = a.params(), b.params()
    odd = [] if a.active[-len(b.active) :] == b.active else ["a draw"]
    odd += [] if repr(a.engine.grass.state_dict()) == repr(b.engine.grass.state_dict()) else ["the method"]
    return odd + [name for name in mine if not torch.equal(mine[name], theirs[name])]


def stateful(training: ZeroTraining) -> set[str]:
    """Units that have a state."""
    return {unit.name for unit in training.holdings.states()}


def drawn_before(training: ZeroTraining, step: int) -> set[str]:
    """Units that had been updated after ``step`` steps."""
    grass, probe = training.engine.grass, GRASS["probe_steps"]
    layers = {grass.layers[i].name for active in training.active[probe:step] for i in active}
    return layers | {unit.name for unit in grass.roles if step > probe}


CASES = {
    # stage, dtype, mode, kind: where it is saved, what else is set
    (1, "fp32", "interval", "dcp"): (EVERYWHERE, {}),
    (1, "bf16", "stream", "dcp"): ((1, 4, 6), {}),
    (2, "bf16", "interval", "dcp"): (EVERYWHERE, {"accumulation": 2, "zero": {"round_robin_gradients": True}}),
    (2, "fp32", "stream", "dcp"): ((2, 6, 7), {}),
    (2, "bf16", "none", "dcp"): ((4, 6), {}),
    (3, "fp32", "interval", "dcp"): ((1, 4, 6), {"zero": {"stage3_param_persistence_threshold": 100_000}}),
    (3, "bf16", "stream", "dcp"): ((2, 7), {}),
    (3, "fp32", "none", "dcp"): ((3, 6), {}),
    (1, "bf16", "none", "deepspeed"): ((1, 7), {"zero": {"round_robin_gradients": True}}),
    (2, "fp32", "interval", "deepspeed"): ((1, 2, 4, 6), {}),
    (3, "bf16", "interval", "deepspeed"): ((2, 6), {"grass": {"always_active": []}}),
}


def setting_of(stage: int, dtype: str, mode: str, kind: str, grass: dict | None = None, **more: Any) -> ZeroSetting:
    grass = {**GRASS, "offload": {"mode": mode}, **(grass or {})}
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return ZeroSetting(f"zero{stage}", grass, dtypes[dtype], kind=kind, **more)


def exactly(rank: int, world_size: int, parent: str) -> dict[str, list[str]]:
    """Every case of `CASES`, and what else two ranks can show; a list of what is wrong for each."""
    gc.freeze()  # ZeRO-3 has the collector run whenever it is constructed
    told = {}
    for case, (save_at, more) in CASES.items():
        name = "-".join(str(part) for part in case)
        told[name] = exact(rank, world_size, setting_of(*case, **more), save_at, Path(parent, name))
    told["a file that cannot be written"] = unwritable(rank, world_size, Path(parent, "unwritable"))
    told["changed formats"] = changed_formats(rank, world_size, Path(parent))
    told["states of another run"] = foreign(rank, world_size, Path(parent))
    told["without measurements"] = without_measurements(rank, world_size, Path(parent))
    return told


class Obstructed(DeepSpeedSnapshot):
    """A folder lies where a file of rank 1 goes."""

    def write_tensors(self, folder: Path, ranks: Ranks) -> None:
        (folder / "deepspeed/state/zero_pp_rank_1_mp_rank_00_optim_states.pt").mkdir(parents=True, exist_ok=True)
        dist.barrier()
        super().write_tensors(folder, ranks)


def unwritable(rank: int, world_size: int, folder: Path) -> list[str]:
    """All ranks are told, nothing is left, and the run goes on; the same in the background, where none could."""
    training = ZeroTraining(rank, world_size, setting_of(2, "fp32", "interval", "deepspeed")).run(1)
    ranks = Ranks(dist.new_group(backend="gloo"))
    snapshot = DeepSpeedSnapshot.take(training.holdings, 1)
    obstructed = Obstructed(**vars(snapshot))
    told = [refused(lambda: write_snapshot(folder, obstructed, ranks, 3))]
    with ThreadPoolExecutor(1) as thread:
        told.append(thread.submit(refused, lambda: write_snapshot(folder, snapshot, ranks, 3)).result())
    training.run(2)
    training.engine.destroy()
    problems = ("rank 1: ", "DeepSpeed's format cannot be written in the background")
    begin = "CheckpointError: The checkpoint of step 1 was not written: "
    good = all(sentence.startswith(begin + problem) for sentence, problem in zip(told, problems, strict=True))
    left = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return ([] if good else told) + left


def changed_formats(rank: int, world_size: int, parent: Path) -> list[str]:
    """What has been loaded and is saved at once in the other format holds the same."""
    odd = []
    cases = ((2, "bf16", "interval", "dcp"), (3, "fp32", "interval", "dcp"), (3, "bf16", "interval", "deepspeed"))
    for case in cases:
        source = open_checkpoint(parent / "-".join(str(part) for part in case) / "step-000006")
        other = "deepspeed" if case[3] == "dcp" else "dcp"
        training = ZeroTraining(rank, world_size, setting_of(*case[:3], other, **CASES[case][1])).load_open(source)
        folder = parent / "other" / f"{case[0]}"
        training.save(folder / other)
        training.run(training.done)
        training.engine.destroy()
        dist.barrier()
        again = open_checkpoint(folder / other / "step-000006")
        odd += [f"{case}: {key}" for key in unequal(source, again)]
    return odd


def in_loops_of_ones_own(rank: int, world_size: int, parent: str) -> dict[str, list[str]]:
    """What is wrong with what `AsyncCheckpointer` has saved beside the steps of FSDP2 and of ZeRO-2."""
    told = {}
    for name, make in {
        "fsdp2": lambda: Training(rank, world_size, Setting("fsdp2", GRASS)),
        "zero2": lambda: ZeroTraining(rank, world_size, setting_of(2, "bf16", "interval", "dcp")),
    }.items():
        folder, whole = Path(parent, name), make()
        with grass_dist.AsyncCheckpointer(folder, trained(whole), keep=2) as checkpointer:
            for step in (2, 4, 6):
                whole.run(step)
                checkpointer.save(step, extra={"step": step})
            whole.run(STEPS)
        newest, kept = checkpointer.latest(), sorted(path.name for path in folder.iterdir())
        resumed, undisturbed = make(), make().run(STEPS)
        found = grass_dist.load_checkpoint(folder, trained(resumed))
        resumed.done = 6
        resumed.run(STEPS)
        wanted = undisturbed.params()
        odd = [
            f"{key} of the run that was saved" for key, p in whole.params().items() if not torch.equal(p, wanted[key])
        ]
        odd += [
            f"{key} of the run that went on" for key, p in resumed.params().items() if not torch.equal(p, wanted[key])
        ]
        odd += (
            [] if newest == folder / "step-000006" and kept == ["step-000004", "step-000006"] else [str(newest), *kept]
        )
        told[name] = odd + ([] if found == (6, {"step": 6}) else [str(found)]) + unwritten(folder, trained(resumed))
    return told


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


def unequal(a: Checkpoint, b: Checkpoint) -> list[str]:
    """Keys under which two checkpoints hold something else."""
    mine, theirs = a.tensors(), b.tensors()
    odd = sorted(mine.tensors.keys() ^ theirs.tensors.keys())
    for key in mine.tensors.keys() & theirs.tensors.keys():
        (numel, dtype), other = mine.tensors[key], theirs.tensors[key]
        same = (numel, dtype) == other and torch.equal(
            *(reader.read(key, 0, torch.empty(numel, dtype=dtype)) for reader in (mine, theirs))
        )
        odd += [] if same else [key]
    state, other_state = (c.state.model_dump(exclude={"deepspeed"}) for c in (a, b))
    return odd + [key for key in state if state[key] != other_state[key]]


def foreign(rank: int, world_size: int, parent: Path) -> list[str]:
    """States and clocks of another run are refused, and nothing is changed."""
    source = open_checkpoint(parent / "2-fp32-interval-deepspeed/step-000006")
    training = ZeroTraining(rank, world_size, setting_of(2, "fp32", "interval", "dcp")).run(1)
    before, told = training.params(), []
    state = source.state.model_dump()
    later = {**state, "engine": {**state["engine"], "step": 9}}
    poorer = {**state, "units": {u: {n: {"step": s["step"]} for n, s in e.items()} for u, e in state["units"].items()}}
    for other in (later, poorer):
        checkpoint = Checkpoint(source.folder, source.manifest, State(**other))
        told.append(refused(lambda checkpoint=checkpoint: load(checkpoint, training.holdings)))
    after = training.params()
    training.engine.destroy()
    good = all(sentence.startswith("CheckpointError: ") for sentence in told) and "exp_avg" in told[1]
    return ([] if good else told) + [name for name in before if not torch.equal(before[name], after[name])]


def without_measurements(rank: int, world_size: int, parent: Path) -> list[str]:
    """The checks can fail: a training that lost what the probe has measured draws other layers."""
    setting = setting_of(1, "fp32", "interval", "dcp")
    source = open_checkpoint(parent / "1-fp32-interval-dcp/step-000001")
    with_, without = [], []
    for drawn, lost in ((with_, False), (without, True)):
        engine = source.state.engine
        measured = engine.measured.model_copy(update={"layers": []}) if lost else engine.measured
        state = source.state.model_copy(update={"engine": engine.model_copy(update={"measured": measured})})
        training = ZeroTraining(rank, world_size, setting)
        training.load_open(Checkpoint(source.folder, source.manifest, state)).run(12)
        drawn += training.active
        training.engine.destroy()
    return ["the same draws"] if with_ == without else []
