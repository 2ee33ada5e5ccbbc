"""`transformers.Trainer.train` while GRASS is enabled: what it refuses before work, and what it tells at the end."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grass_dist.checkpoint.marker import MARKER, read_marker, write_marker
from grass_dist.errors import ConfigError, GrassError
from grass_dist.huggingface.adapters import load_base, ready_adapters, save_base
from grass_dist.huggingface.fsdp import end_loading, states_beside
from grass_dist.huggingface.logs import LayerLog, controller_of
from grass_dist.huggingface.probe import run_probe
from grass_dist.huggingface.report import GrassReport, reports_of
from grass_dist.huggingface.resume import check_resumed, weights_as_sharded
from grass_dist.huggingface.switch import RESUMED, TRAINING, Switch, configured
from grass_dist.huggingface.zero import check_recomputation
from grass_dist.method.controller import GrassController
from grass_dist.method.schedule import too_short_for
from grass_dist.ranks import say, world


def train_with_grass(stock: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
    folder = _resumed_folder(trainer, *args, **kwargs)
    check_switched_on(trainer.accelerator, folder)
    check_resumed(trainer, folder)
    check_recomputation(trainer)
    _free_engine(trainer)
    ready_adapters(trainer)
    if folder is not None:
        RESUMED[id(trainer)] = folder
    if Switch.report and not reports_of(trainer):
        trainer.add_callback(GrassReport())
    watcher = _watcher_class()(trainer)
    trainer.add_callback(watcher)
    TRAINING.append(trainer)
    try:
        with weights_as_sharded(trainer):
            result = stock(trainer, *args, **kwargs)
    finally:
        TRAINING.pop()
        RESUMED.pop(id(trainer), None)
        trainer.remove_callback(watcher)
        for report in reports_of(trainer):
            report.let_go()
    if (grass := controller_of(trainer)) is not None:
        layers = [grass.numbers[layer] for layer in grass.never_trained]
        if told := too_short_for(layers, len(grass.layers), grass.config.sampler):
            say(grass.backend.ranks, told)
    return result


def evaluate_with_grass(stock: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """`Trainer.evaluation_loop`, also before `train` at the ZeRO stages 1 and 2, which have whole weights.

    Trainer makes an engine for it, which DeepSpeed has for stage 3 alone.
    """
    if not trainer.is_deepspeed_enabled or trainer.is_in_train or trainer.model_wrapped is not trainer.model:
        return stock(trainer, *args, **kwargs)
    ds_config = trainer.accelerator.deepspeed_plugin.deepspeed_config
    if not _is_on(ds_config) or ds_config.get("zero_optimization", {}).get("stage", 0) == 3:
        return stock(trainer, *args, **kwargs)
    trainer.is_deepspeed_enabled = False
    try:
        return stock(trainer, *args, **kwargs)
    finally:
        trainer.is_deepspeed_enabled = True


def _free_engine(trainer: Any) -> None:
    """Ends the engine of an earlier `train` or `evaluate`, which Trainer would take for one that can go on.

    Raises:
        GrassError: the trainer was given its optimizer, which has trained.
    """
    accelerator = trainer.accelerator
    if accelerator.distributed_type != "DEEPSPEED" or not _is_on(accelerator.deepspeed_plugin.deepspeed_config):
        return
    given, engine = _GIVEN.setdefault(trainer, trainer.optimizer is not None), trainer.model_wrapped
    if engine is trainer.model:
        return
    if given:
        raise GrassError(
            "Under ZeRO the optimizer that this Trainer was given belongs to the engine of an earlier train() or "
            "evaluate(); make another Trainer with another optimizer."
        )
    engine.destroy()
    accelerator.free_memory()
    trainer.model_wrapped, trainer.deepspeed, trainer.optimizer, trainer.lr_scheduler = trainer.model, None, None, None


_GIVEN: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
"""Whether a trainer had an optimizer before its first `train`."""


def _is_on(ds_config: Mapping[str, Any]) -> bool:
    return isinstance(ds_config.get("grass"), Mapping) or (Switch.config is not None and "grass" not in ds_config)


def _resumed_folder(trainer: Any, resume_from_checkpoint: Any = None, *_: Any, **__: Any) -> Path | None:
    """The checkpoint that `Trainer.train` is to go on from, by its arguments."""
    if resume_from_checkpoint is True:
        from transformers.trainer_utils import get_last_checkpoint

        resume_from_checkpoint = get_last_checkpoint(trainer.args.output_dir)
    return Path(resume_from_checkpoint) if resume_from_checkpoint else None


def check_switched_on(accelerator: Any, resumed: Path | None) -> None:
    """Checks that something says how to train, before any work; a checkpoint of GRASS has its settings beside it.

    Raises:
        ConfigError: nothing does.
    """
    deepspeed = accelerator.distributed_type == "DEEPSPEED"
    written = accelerator.deepspeed_plugin.deepspeed_config.get("grass", ()) if deepspeed else ()
    if Switch.config is not None or isinstance(written, Mapping):
        return
    off = written is None or written is False
    if resumed is not None and read_marker(resumed) is not None:
        problem = f"{resumed} is a checkpoint of a GRASS run, and this run would train all layers"
        if not off:
            fix = f'give enable() a GrassConfig with the settings of "config" in its {MARKER}, or call disable()'
            raise ConfigError("enable(config)", None, problem, fix)
        say(world(), f'{problem}: the ds_config has "grass": {"null" if written is None else "false"}.')
    if not deepspeed:
        configured()


@functools.cache
def _watcher_class() -> type:
    """The class of the callback that a trainer has while it trains; transformers is imported by then."""
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    class Watcher(TrainerCallback):
        def __init__(self, trainer: Any) -> None:
            self._trainer = trainer
            self._grass: GrassController | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            end_loading(self._trainer)
            load_base(self._trainer, RESUMED.get(id(self._trainer)))
            self._grass = grass = controller_of(self._trainer)
            if grass is None:
                return
            run_probe(self._trainer, grass, kwargs["train_dataloader"], reports_of(self._trainer))
            trackers = self._trainer.callback_handler.callbacks if state.is_world_process_zero else ()
            self._layers = LayerLog(grass, trackers)
            self._layers.send(state.global_step)
            self._told = grass.round if state.global_step else None  # a run that begins tells of its first draw

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self._grass is None:
                return
            self._layers.send(state.global_step)
            if self._grass.round != self._told:
                self._told = self._grass.round
                control.should_log = control.should_log or args.logging_strategy != "no"

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            if (states := states_beside(self._trainer)) is not None:
                states.save(folder, self._trainer.lr_scheduler)
            if folder.is_dir():
                save_base(self._trainer, folder)
            if args.should_save and folder.is_dir() and self._grass is not None:
                write_marker(folder, self._grass)

    return Watcher
