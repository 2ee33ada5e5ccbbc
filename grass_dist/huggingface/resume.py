"""What `Trainer.train` can go on from, said before any work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grass_dist.backends.dtensors import placed_as
from grass_dist.errors import ConfigError
from grass_dist.huggingface.fsdp import check_folder, sharded_at_load
from grass_dist.huggingface.switch import Switch
from grass_dist.ranks import say, together, world


def check_resumed(trainer: Any, folder: Path | None) -> None:
    """Checks the checkpoint that a trainer goes on from, and says if it has weights alone.

    Raises:
        ConfigError: what wraps the model here cannot load it.
    """
    if folder is not None:
        together(world(), lambda: _check(trainer, folder))


def _check(trainer: Any, folder: Path) -> None:
    if not folder.is_dir():
        return  # transformers says so
    if (kind := trainer.accelerator.distributed_type) == "FSDP":
        check_folder(trainer.accelerator, folder)
    if any(file.name.startswith(("optimizer", "global_step")) for file in folder.iterdir()):
        return
    if kind == "DEEPSPEED":
        raise ConfigError(
            "resume_from_checkpoint",
            str(folder),
            "it has no folder of DeepSpeed (global_step...), as one that save_only_model left",
            "start from its weights, by from_pretrained(folder), and do not resume",
        )
    if Switch.config is not None:
        told = f"{folder} has no optimizer states, as save_only_model leaves it: its weights are taken over. "
        say(world(), told + start_again(Switch.config.probe_steps))


def start_again(probe_steps: int | None) -> str:
    """What happens without saved states; None: the length of the probe follows from the other settings."""
    probe = "a probe" if probe_steps is None else f"a probe of {probe_steps} steps"
    return "Moments start again." if probe_steps == 0 else f"Moments start again, after {probe}."


@contextmanager
def weights_as_sharded(trainer: Any) -> Iterator[None]:
    """Lets a model that was sharded at load take the whole tensors that Trainer reads from a checkpoint."""
    if not sharded_at_load(trainer):
        yield
        return

    def shard(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for name, param in module.named_parameters(recurse=False):
            given = state_dict.get(prefix + name)
            if given is not None:
                state_dict[prefix + name] = placed_as(param, given)

    handles = [module.register_load_state_dict_pre_hook(shard) for module in trainer.model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
