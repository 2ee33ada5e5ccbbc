"""A checkpoint made into one in DeepSpeed's own files, for as many ranks as those are to be: by ranks on the CPU.

DeepSpeed itself writes the files, so a run of that many processes is made, is put where the checkpoint is, and is saved
at once.
"""

from __future__ import annotations

import datetime
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

from grass_dist.backends.base import Ranks
from grass_dist.checkpoint import files, folders
from grass_dist.checkpoint.loading import open_checkpoint
from grass_dist.checkpoint.saving import Saver
from grass_dist.discovery import find_layers
from grass_dist.errors import CheckpointError, GrassError
from grass_dist.training.checkpoints import resume_run
from grass_dist.training.config import RunConfig
from grass_dist.training.parallel import choose_parallelism
from grass_dist.training.world import World


def to_deepspeed(source: Path, out: Path, *, ranks: int, ds_config: Path) -> Path:
    """Writes ``source`` in DeepSpeed's format to ``out/checkpoints``; gives the new checkpoint's folder.

    Takes the host memory of a run on ``ranks`` CPU processes, and the model that the run began with.

    Args:
        ranks: that are to go on from it.
        ds_config: JSON whose ZeRO stage and dtype the files are for.

    Raises:
        GrassError: the source is damaged or was not saved by a fine-tune, or the ranks cannot be run.
    """
    checkpoint = open_checkpoint(source)
    if not isinstance(checkpoint.state.run.get("config"), dict):
        raise CheckpointError(f"{source} was not saved by a fine-tune: it has no configuration.")
    made = out / folders.CHECKPOINTS / source.name
    if made.exists():
        raise CheckpointError(f"{made} exists already; give another folder.")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    problems = context.Queue()
    arguments = (ranks, port, str(source.resolve()), str(out), str(ds_config.resolve()), problems)
    processes = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if not made.exists():
        codes = [process.exitcode for process in processes]
        raise GrassError(f"{made} was not written: the ranks ended {codes}." if problems.empty() else problems.get())
    return made


def _rank(rank: int, size: int, port: int, source: str, out: str, ds_config: str, problems: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    try:
        _save(World.join(datetime.timedelta(minutes=10)), Path(source), Path(out), ds_config)
    except GrassError as error:
        if rank == 0 or not error.on_every_rank:
            problems.put(str(error))


def _save(world: World, source: Path, out: Path, ds_config: str) -> None:
    ranks = Ranks(world.patient)
    checkpoint = open_checkpoint(source, ranks)
    settings = checkpoint.state.run["config"]
    config = world.together(lambda: RunConfig(**_under(settings, ds_config, world.size)))
    parallel = world.together(lambda: choose_parallelism(config, world))
    model = world.together(parallel.load)
    run = parallel.start(model, find_layers(model, config.grass.layers), [])
    resume_run(checkpoint, run, config.train.seed, world)

    def add_files(writing: Path) -> None:
        if (source / files.MODEL).is_dir():
            shutil.copytree(source / files.MODEL, writing / files.MODEL)

    def take(step: int, extra: Any, copy: Any) -> Any:
        return run.snapshot("deepspeed")(ranks, step, extra, copy)

    saver = Saver(out / folders.CHECKPOINTS, ranks, take, keep=10**9, background=False, add_files=add_files)
    saver.save(checkpoint.step, {**checkpoint.state.run, "config": config.model_dump(mode="json")})
    outcome = saver.outcome()
    assert outcome is not None
    if outcome.error:
        raise outcome.error
    run.close()
    world.leave()


def _under(settings: dict[str, Any], ds_config: str, size: int) -> dict[str, Any]:
    """The run's settings, under DeepSpeed on ``size`` ranks, in the dtype that it was saved in."""
    train = settings["train"]
    whole, micro = train["global_batch_size"], train["micro_batch_size"]
    if whole % (size * micro):  # nothing is trained; any that fits will do
        train = {**train, "micro_batch_size": 1 if whole % size == 0 else micro}
    return {**settings, "train": train, "parallel": {"backend": "deepspeed", "config": ds_config}}
