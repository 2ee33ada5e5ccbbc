"""`enable`: GRASS under a Hugging Face Trainer, a trainer of TRL, or a loop over Accelerate.

Six public functions of these libraries are wrapped, once, and `disable` puts them back:

- `deepspeed.initialize`, which Accelerate looks up when it prepares, becomes `grass_dist.initialize`.
- `accelerate.Accelerator.prepare` replaces the optimizer by a `GrassOptimizer`, without DeepSpeed.
- `transformers.Trainer.train` tells of its micro-batches: Trainer counts them itself and tells Accelerate of one.
  While it runs, a callback probes before its loop, tells of draws, and marks checkpoints (`write_marker`).
- `transformers.Trainer.create_optimizer` gives adapters (``grass.adapters``) a parameter group of their own.
- `transformers.Trainer.evaluation_loop` evaluates before `train` under ZeRO, too.
- `transformers.Trainer.log` adds the method's numbers to the logs.

A `TrainerCallback` alone cannot do it: a callback gets neither the trainer nor the wrapped model, the engine and the
DDP wrapper are made inside `Trainer.train` before ``on_train_begin``, and a user's ``on_log`` comes after
TensorBoard's.
"""

from __future__ import annotations

from collections.abc import Sequence

from grass_dist.config import GrassConfig
from grass_dist.events import Observer
from grass_dist.huggingface.adapters import create_with_adapters
from grass_dist.huggingface.logs import log_numbers
from grass_dist.huggingface.prepare import prepare_with_grass
from grass_dist.huggingface.switch import Switch, give_back_all, module_if_usable, unwrap_all, wrap
from grass_dist.huggingface.trainer import evaluate_with_grass, train_with_grass
from grass_dist.huggingface.zero import initialize_engine
from grass_dist.record import report_wanted


def enable(
    config: GrassConfig | None = None, *, observers: Sequence[Observer] = (), report: bool | None = None
) -> None:
    """Makes Hugging Face Trainer, TRL's trainers and Accelerate train by GRASS.

    Call it before the trainer or the accelerator is made, on every rank. ``config`` says how to train, or with
    DeepSpeed the block ``"grass"`` of the ds_config; an engine without an optimizer (a reference model, an evaluation)
    stays DeepSpeed's own. Where neither says it, the first `train` or `prepare` raises a `ConfigError`, unless the
    ds_config has ``"grass": false``.

    `Trainer.train` probes before its loop, on the first batches, which are trained on again: ``max_steps``, the
    learning rate schedule, evaluations and ``global_step`` count updates only. In a loop over Accelerate, and in
    trainers with a `train` of their own, the steps of the probe are steps of the loop.

    One line tells what the run is ("GRASS: 4 of 32 layers train at a time, ..."), and another one when the probe ends.
    A line for each switch is logged at INFO by the logger "grass_dist".

    The training logs of a Trainer (those with ``"loss"``) get, for the step to come, ``grass/round``, and
    ``grass/layers`` as text, such as "2 5 11 29". Each switch is logged, whatever ``logging_steps`` is. TensorBoard,
    Weights & Biases and trackio get importances and probabilities as histograms over the layers.

    Args:
        config: None under DeepSpeed with a block. A second call replaces it. If there is a block too, both must have
            the same settings.
        observers: called with each `Refreshed` and `Sampled` of every run from now on, on each rank.
        report: whether each `Trainer.train` adds a `GrassReport` to its callbacks, if there is none. Left out, it does
            where the environment variable GRASS_DIST_REPORT is 1.
    """
    Switch.on, Switch.config, Switch.observers = True, config, tuple(observers)
    Switch.report = report_wanted() if report is None else report
    if deepspeed := module_if_usable("deepspeed"):
        wrap(deepspeed, "initialize", initialize_engine)
    if accelerate := module_if_usable("accelerate"):
        wrap(accelerate.Accelerator, "prepare", prepare_with_grass)
    if transformers := module_if_usable("transformers"):
        wrap(transformers.Trainer, "train", train_with_grass)
        wrap(transformers.Trainer, "create_optimizer", create_with_adapters)
        wrap(transformers.Trainer, "evaluation_loop", evaluate_with_grass)
        wrap(transformers.Trainer, "log", log_numbers)


def disable() -> None:
    """Undoes `enable`, on every rank, and gives back the models that train by GRASS.

    They keep their weights, and what was trainable before is trainable again. Optimizers are detached and engines
    destroyed, so that training goes on with a new Trainer or a new optimizer.
    """
    Switch.on, Switch.config, Switch.observers, Switch.report = False, None, (), False
    unwrap_all()
    give_back_all()


def is_enabled() -> bool:
    """Returns whether `enable` was called, and not `disable` since."""
    return Switch.on
