"""Converts a checkpoint into one in DeepSpeed's own files, for a given number of ranks, by processes on the CPU.

DeepSpeed itself writes the files: as many processes as ranks build a run, load the checkpoint and save it at once.
"""

from __future__ import annotations

import datetime
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import nn

from grass_dist.checkpoint import files, folders
from grass_dist.checkpoint.deepspeed_save import DeepSpeedSnapshot
from grass_dist.checkpoint.loading import Checkpoint, open_checkpoint
from grass_dist.checkpoint.model import shapes_of
from grass_dist.checkpoint.saving import write_snapshot
from grass_dist.errors import CheckpointError, GrassError
from grass_dist.finetune.checkpoints import resume_run
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.run_deepspeed import DeepSpeed
from grass_dist.job.launchers import ProcessPlace, free_port
from grass_dist.job.world import World
from grass_dist.model.discovery import find_layers
from grass_dist.model.foreign import build, plain_config, read_settings
from grass_dist.ranks import Ranks

ATTENTION = "eager"
"""The attention that every model has; nothing is computed."""


def to_deepspeed(
    source: Path,
    out: Path,
    *,
    ranks: int,
    ds_config: Path,
    model: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Writes ``source`` in DeepSpeed's format to ``out/checkpoints``; returns the new checkpoint's folder.

    It takes the host memory of a run on ``ranks`` CPU processes. Nothing that comes with the checkpoint decides what is
    loaded: the model is transformers' own class, with the sizes of the checkpoint's ``model/config.json``, or the one
    that the caller names. All weights are the checkpoint's.

    Args:
        ranks: the number of ranks that will go on from it.
        ds_config: a JSON with the ZeRO stage and dtype of the new files.
        model: Hugging Face name or folder of a model that transformers does not know itself.
        trust_remote_code: allows code that comes with ``model`` to run.

    Raises:
        GrassError: the source is damaged or was not saved by a fine-tune, its model cannot be made, or the ranks cannot
            be run.
    """
    task = _Conversion(source.resolve(), out, ranks, ds_config.resolve(), model, trust_remote_code)
    checkpoint = open_checkpoint(source)
    _settings_of(checkpoint, task)
    if model is None:
        _own_config(checkpoint)
    made = out / folders.CHECKPOINTS / source.name
    if made.exists():
        raise CheckpointError(f"{made} exists already; give another folder.")
    context = mp.get_context("spawn")
    problems, port = context.Queue(), free_port()
    processes = [context.Process(target=_rank, args=(rank, port, task, problems)) for rank in range(ranks)]
    with _offline() if model is None else nullcontext():
        for process in processes:
            process.start()
    for process in processes:
        process.join()
    if not made.exists():
        codes = [process.exitcode for process in processes]
        raise GrassError(f"{made} was not written: the ranks ended {codes}." if problems.empty() else problems.get())
    return made


@dataclass(frozen=True, slots=True)
class _Conversion:
    """The arguments of `to_deepspeed`, for its processes."""

    source: Path
    out: Path
    ranks: int
    ds_config: Path
    model: str | None
    trust_remote_code: bool


def _rank(rank: int, port: int, task: _Conversion, problems: Any) -> None:
    place = ProcessPlace("grass-dist convert", rank, rank, task.ranks, "127.0.0.1", port)
    os.environ.update(place.variables(), CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    try:
        _save(World.join(datetime.timedelta(minutes=10)), task)
    except GrassError as error:
        if rank == 0 or not error.on_every_rank:
            problems.put(str(error))


def _save(world: World, task: _Conversion) -> None:
    ranks = Ranks(world.patient)
    checkpoint = open_checkpoint(task.source, ranks)
    config = world.together(lambda: _settings_of(checkpoint, task))
    parallel = world.together(lambda: DeepSpeed(config, world))
    if task.model is None:
        own = world.together(lambda: _own_config(checkpoint))

        def make(config: RunConfig, device: torch.device, _task: object) -> nn.Module:
            return build(own, getattr(torch, config.model.dtype), device, ATTENTION)

        model = world.together(partial(parallel.load, make=make))
    else:
        model = world.together(parallel.load)
    run = parallel.start(model, find_layers(model, config.grass.layers), [])
    resume_run(checkpoint, run, config.train.seed, world)

    def add_files(writing: Path) -> None:
        if (task.source / files.MODEL).is_dir():
            shutil.copytree(task.source / files.MODEL, writing / files.MODEL)

    stored = _stored_config(checkpoint) | {"parallel": config.parallel.model_dump(mode="json")}
    extra = {**checkpoint.state.run, "config": stored}
    snapshot = world.together(lambda: DeepSpeedSnapshot.take(run.holdings(), checkpoint.step, extra))
    write_snapshot(task.out / folders.CHECKPOINTS, snapshot, ranks, keep=10**9, add_files=add_files)
    run.close()
    world.leave()


def _stored_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The run's configuration in the checkpoint. It is copied; no name or path in it is used."""
    stored = checkpoint.state.run.get("config")
    if not isinstance(stored, dict) or not all(isinstance(stored.get(name), dict) for name in ("train", "grass")):
        raise CheckpointError(f"{checkpoint.folder} was not saved by a fine-tune: it has no configuration.")
    return stored


def _settings_of(checkpoint: Checkpoint, task: _Conversion) -> RunConfig:
    """The method and batches of the checkpoint, under DeepSpeed on the ranks of the task, in the dtype of its weights.

    Model, data and folders are not taken from the checkpoint's configuration, which anybody may have written.
    """
    stored = _stored_config(checkpoint)
    if (kind := stored.get("task", "causal-lm")) != "causal-lm":
        problem = f"{checkpoint.folder} is of task={files.printable(kind):.40}, and only causal-lm is converted"
        raise CheckpointError(f"{problem} to DeepSpeed's format; go on with it under another backend.")
    train = {key: value for key, value in stored["train"].items() if key != "checkpoint"}
    whole, micro = train.get("global_batch_size"), train.get("micro_batch_size")
    if not isinstance(whole, int) or not isinstance(micro, int) or whole < 1 or micro < 1:
        raise CheckpointError(f"{checkpoint.folder / files.STATE} is damaged: it does not say how large a batch is.")
    if whole % (task.ranks * micro):  # nothing is trained; any that fits will do
        train |= {"micro_batch_size": 1 if whole % task.ranks == 0 else micro}
    low = any(entry.dtype == "bfloat16" for entry in checkpoint.manifest.weights.values())
    return RunConfig(
        **{
            "model": {
                "name": task.model or str(checkpoint.folder / files.MODEL),
                "dtype": "bfloat16" if low else "float32",
                "attention": ATTENTION,
                "trust_remote_code": task.trust_remote_code,
            },
            "data": {"name": "none", "text": "text"},
            "train": train,
            "grass": {key: value for key, value in stored["grass"].items() if key != "offload"},
            "parallel": {"backend": "deepspeed", "config": str(task.ds_config)},
        }
    )


def _own_config(checkpoint: Checkpoint) -> Any:
    """The configuration of the checkpoint's model, if its weights are those of transformers' own class.

    Raises:
        CheckpointError: they are not, or there is no such class.
    """
    fix = "name the model by --model, and add --trust-remote-code if it has code that you trust"
    file = checkpoint.folder / files.MODEL / "config.json"
    try:
        config = plain_config(read_settings(file))
        find_layers(like := build(config, torch.float32, "meta"))
    except Exception as error:  # whatever a class makes of values that nobody has checked
        raise CheckpointError(
            f"{file}: no model can be made of it: {files.printable(error).rstrip('.')}; {fix}."
        ) from None
    shapes = {name: tuple(entry.shape) for name, entry in checkpoint.manifest.weights.items()}
    if odd := sorted(set(shapes.items()) ^ set(shapes_of(like).items()), key=str):
        raise CheckpointError(f"{file} is not of the model whose weights are saved: {odd[0][0]!r:.80} differs; {fix}.")
    return config


@contextmanager
def _offline() -> Iterator[None]:
    """Inside the block, processes are started that do not connect to the Hub."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    before = dict(os.environ)
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
