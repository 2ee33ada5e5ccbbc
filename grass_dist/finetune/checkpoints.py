"""The checkpoints of a fine-tune: when it is saved, what it goes on from, and what may have changed meanwhile."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import torch

from grass_dist.checkpoint import files, folders
from grass_dist.checkpoint.loading import Checkpoint, load, newest_good, open_checkpoint
from grass_dist.checkpoint.saving import Saved, Saver
from grass_dist.errors import CheckpointError, ConfigError, GrassError, shorten
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.config_file import as_yaml, flatten
from grass_dist.finetune.parallel import Run
from grass_dist.job.peers import of_collective
from grass_dist.job.world import World
from grass_dist.ranks import Ranks

_FIXED = ("task", "data.", "grass.", "train.global_batch_size", "train.seed")
_FREE = (
    *("name", "output_dir", "overwrite", "save_model", "sample_prompt", "answer_tokens", "parallel."),
    *("model.activation_checkpointing", "model.trust_remote_code", "model.allow_missing_weights"),
    *("data.on_bad_line", "data.prefetch_steps", "grass.offload."),
    *("train.micro_batch_size", "train.eval_every", "train.timeout_seconds", "train.max_bad_steps", "train.checkpoint"),
)
"""Settings that a run cannot change when it goes on, and settings that do not change what is trained. If any other
setting has changed, the run says so."""
_BEFORE = {"task": "causal-lm", "data.group_by_length": False}
"""What a setting was before there was one, which older checkpoints do not name."""
_SAID = ("data.name", "grass.offload.host_dtype")
"""Exceptions from both: the run may change them, and says so."""


@dataclass(frozen=True)
class Position:
    """The position of a run, at the end of a step."""

    step: int = 0
    """The number of global batches that it was trained on."""
    updates: int = 0
    """Steps of the learning-rate schedule."""
    bad_steps: int = 0
    """Steps in a row, up to now, that were not finite."""


def check_shared(config: RunConfig, folder: Path, world: World) -> None:
    """Checks that all hosts see what rank 0 writes into the run's folder, if checkpoints go there.

    Raises:
        ConfigError: on every rank: a host does not.
    """
    if config.train.checkpoint is None or len(set(world.peers.hosts)) == 1:
        return
    # A new name, so that no host remembers that there is no such file.
    name: list[Any] = [f".{uuid.uuid4().hex}"]
    torch.distributed.broadcast_object_list(name, group=world.patient)
    file = folder / name[0]

    def look() -> None:
        if not file.exists():
            problem = f"host {world.peers.hosts[world.rank]} does not see what rank 0 writes there"
            fix = "name a folder on a file system that all hosts share, or set train.checkpoint to null"
            raise ConfigError("output_dir", config.output_dir, problem, fix)

    world.together(lambda: file.touch() if world.is_main else None)
    try:
        world.together(look)
    finally:
        if world.is_main:
            file.unlink(missing_ok=True)


def checkpoint_to_resume(
    config: RunConfig, resume: str | None, world: World, say: Callable[[str], None]
) -> Checkpoint | None:
    """Opens and checks the checkpoint that ``--resume`` means; None if the run begins at step 0.

    Args:
        resume: "auto" is the newest good checkpoint of this run, if it has any. A path is that of a checkpoint, or of
            a run, whose newest good checkpoint is taken.

    Raises:
        CheckpointError: on every rank: the path holds no good checkpoint.
    """
    ranks = Ranks(world.patient)
    if resume is None:
        return None
    if resume == "auto":
        parent = Path(config.output_dir) / config.name / folders.CHECKPOINTS
        found = newest_good(parent, ranks, say)
        if found is None and world.together(lambda: bool(folders.checkpoints_in(parent)) if world.is_main else False):
            fix = "would begin at step 0 and throw them away; look at them, or set overwrite=true without --resume"
            said = f"None of the checkpoints in {parent} is good, and --resume auto {fix}."
            raise CheckpointError(said).everywhere()
        return found
    path = Path(resume)
    if not (path / folders.CHECKPOINTS).is_dir():
        return open_checkpoint(path, ranks)
    found = newest_good(path / folders.CHECKPOINTS, ranks, say)
    if found is None:
        raise CheckpointError(f"--resume {resume}: none of its checkpoints is good.").everywhere()
    return found


def check_settings(config: RunConfig, checkpoint: Checkpoint, data: Mapping[str, Any]) -> list[str]:
    """Compares the settings with those of the checkpoint; one sentence for each change that changes the training.

    Args:
        data: what `grass_dist.finetune.identity.data_identity` returned.

    Raises:
        ConfigError: a setting has changed that must not change within a run.
        CheckpointError: the checkpoint was trained on other examples, or not saved by this program.
    """
    run = checkpoint.state.run
    if not isinstance(saved := run.get("config"), dict) or not _is_flat(saved) or len(flatten(saved)) > 1000:
        raise CheckpointError(f"{checkpoint.folder} was not saved by a fine-tune: it has no configuration.")
    before, now = (_with_temperature(flatten(of)) for of in (saved, config.model_dump(mode="json")))
    changed = []
    for name in sorted(set(before) | set(now)):
        old, new = before.get(name, _BEFORE.get(name)), now.get(name)
        if old == new or (name.startswith(_FREE) and name not in _SAID):
            continue
        if name == "grass.always_active" and _without_others(old) == _without_others(new):
            continue  # an older release had no such role; loading compares it where there is something in it
        if name.startswith(_FIXED) and name not in _SAID:
            fix = f"set it to {_shown(old)}, or begin a new run from the exported model"
            raise ConfigError(name, new, f"the run that it goes on with has {_shown(old)}", fix)
        changed.append(f"{name} is {_shown(new)}, and was {_shown(old)} when the run was saved")
    if (known := run.get("data")) and dict(data) != known:
        names = [name for name in data if not isinstance(known, dict) or known.get(name) != data[name]]
        differ = f" ({', '.join(names)} differ{'s' * (len(names) == 1)})" if names else ""
        raise CheckpointError(
            f"{checkpoint.folder} was trained on other examples than {config.data.name} has now{differ}: a run goes on "
            "with its own data only."
        )
    return changed


def _with_temperature(flat: dict[str, Any]) -> dict[str, Any]:
    """The settings with ``grass.temperature`` as one value, of either form."""
    name = "grass.temperature.effective_layers"
    return {**flat, "grass.temperature": {"effective_layers": flat.pop(name)}} if name in flat else flat


def _without_others(roles: Any) -> Any:
    return [role for role in roles if role != "others"] if isinstance(roles, list) else roles


def was_rewritten(checkpoint: Checkpoint, written: str) -> bool:
    """Says whether the files of a stream were written to after the save, by `written_at` then and now."""
    before = checkpoint.state.run.get("data_written")
    return bool(before) and before != written


def _shown(value: Any) -> str:
    """A value as in the YAML file, cut to a length: what a checkpoint holds may be of any size and depth."""
    if isinstance(value, list | dict):
        return f"{brief(value):.100}"
    text = shorten(as_yaml(shorten(value, 100) if isinstance(value, str) else value), 100)
    return "".join(c if c.isprintable() else "?" for c in text)


def _is_flat(settings: Mapping[str, Any], depth: int = 6) -> bool:
    """Says whether these can be settings of a configuration. Long names in deep levels would fill the memory."""
    below = [value for value in settings.values() if isinstance(value, dict)]
    named = len(settings) <= 1000 and all(len(name) <= 100 and name.isprintable() for name in settings)
    return named and (not below or (depth > 0 and all(_is_flat(value, depth - 1) for value in below)))


def position_of(checkpoint: Checkpoint) -> Position:
    """The position of the run that saved the checkpoint.

    Raises:
        CheckpointError: state.json does not have it, or contradicts checkpoint.json.
    """
    run, step = checkpoint.state.run, checkpoint.step
    numbers = [run.get(name) for name in ("step", "updates", "bad_steps")]
    whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= step for n in numbers)
    if not whole or numbers[0] != step:
        raise CheckpointError(f"{checkpoint.folder / files.STATE} is damaged: it does not say where the run is.")
    return Position(*numbers)  # type: ignore[arg-type]


def record_of(checkpoint: Checkpoint) -> tuple[int, dict[str, Any] | None]:
    """The bytes of metrics.jsonl at the save, and the first answer of the model; 0 and None if they are not there."""
    record, answer = (checkpoint.state.run.get(name) for name in ("record", "answer"))
    if not isinstance(answer, dict) or not all(isinstance(answer.get(name), str) for name in ("prompt", "text")):
        answer = None
    return (record if isinstance(record, int) and record > 0 else 0), answer


def resume_run(checkpoint: Checkpoint, run: Run, seed: int, world: World) -> bool:
    """Loads the checkpoint into ``run``. The parameter groups keep the settings of the configuration.

    Returns:
        Whether the run goes on to the bit. If not, the generators of the ranks get new seeds.
    """
    built = [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups]
    exact = load(checkpoint, run.holdings())
    for group, own in zip(run.optimizer.param_groups, built, strict=True):
        group.update(own)
    if not exact:
        torch.manual_seed((seed + 1 + world.rank + 1_000_003 * checkpoint.step) % 2**63)
    return exact


class Checkpoints:
    """Saves a run. Every method is called on every rank, at the same steps.

    Args:
        folder: the folder of the run.
        add_model: writes the files of a Hugging Face folder besides the weights.
        tell: called with each outcome.
        start_step: the step after which the run begins.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        run: Run,
        folder: Path,
        add_model: Callable[[Path], None],
        tell: Callable[[Saved], None],
        start_step: int = 0,
    ) -> None:
        settings = config.train.checkpoint
        self._settings, self._world, self._tell = settings, world, tell
        self._last_step = config.train.max_steps
        self._saver: Saver | None = None
        if settings is None:
            return
        world.together(lambda: folders.sweep(folder / folders.CHECKPOINTS, start_step) if world.is_main else None)
        self._saver = Saver(
            folder / folders.CHECKPOINTS,
            run.holdings(),
            Ranks(world.background),
            keep=settings.keep,
            background=settings.background,
            format=settings.format,
            add_files=lambda writing: add_model(writing / files.MODEL),
        )

    def due(self, step: int) -> bool:
        """Says whether the run is saved at the end of ``step``; at the end of the last step it always is."""
        every = self._settings.every if self._settings else 0
        return self._settings is not None and (step == self._last_step or bool(every and step % every == 0))

    def flag(self) -> float:
        """1 if this rank knows the outcome of the save under way, else 0. Its sum over the ranks goes to `poll`."""
        return float(self._saver is not None and self._saver.done)

    def poll(self, flags: float) -> None:
        """Takes the outcome if all ranks know it."""
        if flags == self._world.size:
            self.wait()

    def save(self, step: int, state: Mapping[str, Any], *, leaving: bool = False) -> None:
        """Begins a save, after waiting for an earlier one. If the run is ``leaving``, it waits for this one too.

        Raises:
            CheckpointError: on every rank, if ``on_save_error`` is stop: this or the earlier save has failed.
        """
        if self._saver is None:
            return
        self.wait()
        self._saver.save(step, state)
        if leaving or not self._saver.background:
            self.wait()

    def wait(self) -> None:
        """Waits for the save that is under way, and tells its outcome. Raises as `save`."""
        if self._saver is None or (outcome := self._saver.outcome()) is None:
            return
        self._tell(outcome)
        if outcome.error and self._settings and self._settings.on_save_error == "stop":
            if of_collective(outcome.error):  # a rank is lost, and each of the others says so for itself
                raise outcome.error.__cause__ or outcome.error
            raise outcome.error.everywhere()

    def close(self) -> None:
        """Waits as `wait`, and lets go of the run's tensors and of their copies; nothing is saved after it."""
        self.wait()
        self._saver = None


def check_bad_steps(bad_steps: int, config: RunConfig, step: int) -> None:
    """Ends a run that does not update any more.

    Raises:
        GrassError: on every rank: so many steps in a row were not finite.
    """
    if bad_steps < config.train.max_bad_steps:
        return
    error = GrassError(
        f"The loss or a gradient was not finite in each of the last {bad_steps} steps, up to step {step}: the run ends "
        f"(train.max_bad_steps={config.train.max_bad_steps}). The weights are those of step {step - bad_steps}; go on "
        "from a checkpoint with a smaller train.learning_rate, or look at the data."
    )
    error.on_every_rank = True
    raise error
