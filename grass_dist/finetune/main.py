"""Fine-tunes a model with GRASS; the one program that every launcher starts.

What happens, in order: the configuration is checked, with --resume a checkpoint too, model and data are loaded and the
model is put on its ranks (each of these on all ranks or on none); then the steps run, and are saved now and then; then
the model is written and the report is made.
"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from grass_dist.checkpoint.loading import Checkpoint
from grass_dist.checkpoint.saving import Saved
from grass_dist.errors import ConfigError, GrassError
from grass_dist.finetune import setup
from grass_dist.finetune.checkpoints import (
    Checkpoints,
    Position,
    check_settings,
    checkpoint_to_resume,
    position_of,
    record_of,
    resume_run,
    was_rewritten,
)
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.config_file import flat_settings, load_config
from grass_dist.finetune.data.config import check_packing
from grass_dist.finetune.data.loading import Data, Stream, load_data
from grass_dist.finetune.data.stream_identity import written_at
from grass_dist.finetune.export import write_model_files
from grass_dist.finetune.identity import data_identity, model_identity, versions
from grass_dist.finetune.loop import Loop
from grass_dist.finetune.metrics import Later, MetricsLog, describe_run
from grass_dist.finetune.parallel import Parallelism
from grass_dist.finetune.progress import Reporter
from grass_dist.finetune.questions import answer_after, answer_before
from grass_dist.finetune.run_folder import MODEL, RunFolder
from grass_dist.finetune.tasks.base import Task
from grass_dist.finetune.tasks.choose import task_of
from grass_dist.job.guard import Guard, steady_streams
from grass_dist.job.launchers import warning_of
from grass_dist.job.output import Output, record_for_launcher
from grass_dist.job.peers import lost_peer
from grass_dist.job.signals import LeaveSignals, exit_code
from grass_dist.job.world import World
from grass_dist.method.schedule import too_short_for
from grass_dist.model.adapters import adapter_config, layers_of
from grass_dist.record.about import what_trains
from grass_dist.record.speed import Speed, work_of

RESUME = "the run can go on with --resume auto"
"""End of a sentence about a lost rank."""


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the command line, ``sys.argv`` if it is None, and fine-tunes; returns the exit code of this rank."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see configs/ and docs/configuration.md")
    parser.add_argument(
        "--resume", metavar="auto|PATH", help="go on with this run's newest good checkpoint, or with one that is named"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings that replace the file's")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed passes it, and LOCAL_RANK too
    args = parser.parse_intermixed_args(argv)
    return train(args.config, args.overrides, args.resume)


def train(path: Path, overrides: Sequence[str] = (), resume: str | None = None) -> int:
    """Fine-tunes as the file at ``path`` says, on all ranks that the launcher has started; the exit code of this one.

    Args:
        overrides: settings that replace the file's, as "section.field=value".
        resume: "auto", or the folder of a checkpoint or run to go on with.
    """
    steady_streams()
    with LeaveSignals() as signals:
        return _join(path, overrides, resume, signals)


def _join(path: Path, overrides: Sequence[str], resume: str | None, signals: LeaveSignals) -> int:
    """Joins the other ranks for one fine-tune; the exit code. However it ends, it says why and waits for nobody."""
    try:
        timeout = load_config(path, overrides).train.timeout_seconds
    except ConfigError:  # ranks join first, and fail together
        timeout = 60
    try:
        world = World.join(datetime.timedelta(seconds=timeout))
    except GrassError as error:
        record_for_launcher(str(error))
        if not error.on_every_rank or os.environ.get("RANK") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    guard = Guard()
    output = Output(world, guard)

    def give_up(lost: GrassError) -> None:
        output.lost(lost)
        world.abandon(1)  # the others may be inside a collective, which a teardown would wait for

    world.peers.guard(give_up, RESUME)
    signals.meet(world.peers)
    code = 1
    try:
        config = world.together(lambda: load_config(path, overrides))
        same = {"--resume": resume, **versions(deepspeed=config.parallel.backend == "deepspeed")}
        world.together(lambda: None, **flat_settings(config), **same)
        asked = finetune(config, world, output, resume, signals, guard)
        code = exit_code(asked) if asked else 0
        with world.during("the end of the run"):
            world.leave()
    except GrassError as error:
        if not error.on_every_rank:
            output.own_error(error)
            world.abandon(code)
        output.shared_error(error)
        world.close()
    except BaseException as error:
        if (lost := lost_peer(world.peers, error, RESUME)) is None:
            output.own_error(error)
            traceback.print_exc()
            world.abandon(1)
        give_up(lost)
    return code


def choose_parallelism(config: RunConfig, world: World) -> Parallelism:
    """The one of ``config.parallel``.

    Raises:
        ConfigError: settings that cannot work on these ranks.
    """
    if config.parallel.backend == "deepspeed":
        from grass_dist.finetune.run_deepspeed import DeepSpeed

        return DeepSpeed(config, world)
    from grass_dist.finetune.run_torch import Torch

    return Torch(config, world)


def finetune(
    config: RunConfig, world: World, output: Output, resume: str | None, signals: LeaveSignals, guard: Guard
) -> int | None:
    """One fine-tune, from its configuration to its report; the signal by which it left before that, if it did."""
    torch.manual_seed(config.train.seed)
    transformers.logging.disable_progress_bar()
    parallel = world.together(lambda: choose_parallelism(config, world))
    say = print if world.is_main else lambda *_: None
    if told := warning_of(os.environ):
        say(told)
    if config.model.trust_remote_code:
        say(f"the code that comes with {config.model.name} may run: model.trust_remote_code is true")
    with RunFolder(config, world, resume) as folder:
        checkpoint = checkpoint_to_resume(config, resume, world, say)
        folder.check(checkpoint)
        tokenizer = world.in_turn(lambda: setup.load_tokenizer(config.model))
        task = world.in_turn(lambda: task_of(config, tokenizer))
        data = world.together(lambda: _load_data(config, task))
        data_is, written = world.together(lambda: (data_identity(data.train), written_at(config.data)))
        model = world.together(partial(parallel.load, task))
        padding = world.together(partial(task.fit, model, data))
        world.together(lambda: task.set_padding(*padding))
        world.together(lambda: None, **data_is, **world.together(partial(model_identity, model)))
        start = world.together(lambda: _start(config, checkpoint, data_is, written, say))
        layers = layers_of(model, config.grass)
        work = work_of(model, layers, recomputed=config.model.activation_checkpointing)
        speed = Speed(work, world.device, next(model.parameters()).dtype, world.size)
        about = describe_run(config, world, parallel.name, layers, data, model)
        about["example"] = task.shown(data.first)
        record, answer = record_of(checkpoint) if checkpoint else (0, None)
        if checkpoint is None:
            asks = partial(answer_before, task, data.held_out_rows, parallel, model)
            answer = world.together(lambda: asks() if world.is_main else None)

        torch.manual_seed(config.train.seed + 1 + world.rank)  # dropout differs on the ranks
        reporter = Reporter(config.train.max_steps, len(layers.layers), speaks=world.is_main, guard=guard)
        for sentence in [*data.told(), *task.told(), *([padding.told] if padding.told else [])]:
            reporter.say(sentence)
        run = parallel.start(model, layers, [later := Later()])
        if run.grass.started is not None:
            about["trains"] = what_trains(run.grass.started)
        settings, adapter = model.config, adapter_config(model)
        del model, layers  # the run has what it needs of them
        exact = resume_run(checkpoint, run, config.train.seed, world) if checkpoint else True
        # All input is good: now may files go.
        folder.begin(checkpoint, start.step)
        world.together(lambda: output.to_file(folder.path))
        keep = record if folder.goes_on(checkpoint) else 0
        log = world.together(
            lambda: MetricsLog(folder.path, about, keep=keep, step=start.step, guard=guard) if world.is_main else None
        )
        if checkpoint:
            checkpoint.close()
            reporter.resumed(start.step, str(checkpoint.folder), exact)
        elif log and answer:
            log.write("answer", 0, when="before", **answer)
        later.begin([reporter.observe, *([log.observe] if log else [])], going_on=checkpoint is not None)

        def state() -> dict[str, Any]:
            record = log.nbytes if log else 0
            about = {"config": config.model_dump(mode="json"), "data": data_is, "data_written": written}
            return {**about, "answer": answer, "record": record}

        def tell(saved: Saved) -> None:
            reporter.saved(saved)
            if log:
                log.saved(saved)

        add_model = partial(write_model_files, settings, task.processor, adapter)
        checkpoints = Checkpoints(config, world, run, folder.path, add_model, tell, start.step)
        loop = Loop(config, world, run, data, task, reporter, log, speed, checkpoints, signals, state)
        return _train(loop, start, answer, folder.path, guard)


def _train(loop: Loop, start: Position, answer: dict[str, Any] | None, folder: Path, guard: Guard) -> int | None:
    """All steps after ``start``, then the model, then the report; the signal by which it left before that."""
    config, world, run, reporter, log = loop.config, loop.world, loop.run, loop.reporter, loop.log
    began = time.perf_counter()

    def leave(asked: int, why: str, then: str = "") -> int:
        left = f"leaving because of {signal.Signals(asked).name}{why}"
        reporter.say(left + then)
        record_for_launcher(left)
        return asked

    with reporter:
        asked = loop.train(start)
        for sentence in loop.data.train.told() if isinstance(loop.data.train, Stream) else ():
            reporter.say(sentence)
        if asked is not None:
            return leave(asked, "; --resume auto goes on")
    seconds = time.perf_counter() - began
    if untrained := too_short_for(
        [run.grass.numbers[i] for i in run.grass.never_trained], len(run.grass.layers), config.grass.sampler
    ):
        reporter.say(untrained)
    if config.save_model:
        with world.during("the writing of the model"):
            world.together(partial(run.save, loop.task.processor, folder / MODEL))
    if log:
        log.write("end", config.train.max_steps, seconds=seconds)
    with world.during("the end of the training"):
        asked = loop.signals.agreed(world.sum(*loop.signals.flags()))
    if asked is not None:
        return leave(asked, ": the run has ended", f", and grass-dist report {folder} makes its report")
    run.close()  # its memory is free for the model that answers
    if log:
        with guard.around("the answer of the model and the report", f"grass-dist report {folder} makes the report"):
            _conclude(loop, log, answer)
    return None


def _start(
    config: RunConfig,
    checkpoint: Checkpoint | None,
    data_is: dict[str, str],
    written: str,
    say: Callable[..., None],
) -> Position:
    """The position at which the run begins; warns of what has changed since the checkpoint was saved."""
    if checkpoint is None:
        return Position()
    for sentence in check_settings(config, checkpoint, data_is):
        say(f"warning: {sentence}; the run will not be the one that it would have been")
    if was_rewritten(checkpoint, written):
        say(
            f"warning: files of {config.data.name} have been written to since the run was saved; their names, sizes, "
            "first rows and a sample of the content are as they were, and no more of a stream is compared"
        )
    return position_of(checkpoint)


def _conclude(loop: Loop, log: MetricsLog, before: dict[str, Any] | None) -> None:
    """Writes the answer of the saved model, and the report; called on the main rank."""
    from grass_dist.report import build_report

    config, reporter = loop.config, loop.reporter
    if config.save_model and before:
        folder, device = str(log.folder / MODEL), loop.world.device
        text = answer_after(loop.task, loop.data.held_out_rows, folder, before["prompt"], device)
        log.write("answer", config.train.max_steps, when="after", **{**before, "text": text})
        reporter.say(f"\nquestion: {before['prompt']}\n\nbefore: {before['text']}\n\nafter: {text}\n")
    log.close()
    reporter.say(f"report: {build_report(log.folder)}")


def _load_data(config: RunConfig, task: Task) -> Data:
    try:
        if config.data.packing:
            check_packing(config.model.attention, config.train.micro_batch_size)
        return load_data(config.data, task.tokenizer, config.train.seed, task)
    except ConfigError as error:
        raise error if error.field.startswith(("data.", "model.")) else error.under("data") from None
