#!/usr/bin/env python
"""Fine-tunes a causal language model with GRASS; the one program that every launcher starts.

    torchrun --nproc-per-node 2 launch/finetune.py --config configs/fsdp2_grass.yaml train.learning_rate=1e-5
    deepspeed --num_gpus 2 launch/finetune.py --config configs/zero3_grass.yaml train.learning_rate=1e-5

What happens, in order: the configuration is checked, model and data are loaded and the model is put on its ranks (each
of these on all ranks or on none); then the steps run; then the model is saved and the report is made.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import grass_dist
from grass_dist.assembly import always_active_roles
from grass_dist.discovery import LayerMap, find_layers
from grass_dist.errors import ConfigError, GrassError
from grass_dist.training import setup
from grass_dist.training.answers import answer_from_folder
from grass_dist.training.batches import Examples, make_batches
from grass_dist.training.config import RunConfig, flat_settings, load_config
from grass_dist.training.data import Data, load_data, render_prompt
from grass_dist.training.data_config import check_packing, fill
from grass_dist.training.metrics import MetricsLog, StepCosts, make_run_folder
from grass_dist.training.parallel import Parallelism, Run, choose_parallelism
from grass_dist.training.progress import Reporter
from grass_dist.training.steps import evaluate, train_step
from grass_dist.training.world import World


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see configs/ and docs/configuration.md")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings that replace the file's")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed passes it, and LOCAL_RANK too
    args = parser.parse_args()
    config, problem = read_config(args.config, args.overrides)
    try:
        world = World.join(datetime.timedelta(seconds=config.train.timeout_seconds if config else 60))
    except GrassError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    try:
        config = world.together(lambda: config or _raise(problem))
        world.together(lambda: None, **flat_settings(config))
        finetune(config, world)
    except GrassError as error:
        if world.is_main or not error.on_every_rank:
            print(f"error: {error}", file=sys.stderr, flush=True)
        torch.distributed.destroy_process_group()
        return 1
    world.leave()
    return 0


def read_config(path: Path, overrides: list[str]) -> tuple[RunConfig | None, ConfigError | None]:
    """The configuration or what is wrong with it: ranks join first, and fail together."""
    try:
        return load_config(path, overrides), None
    except ConfigError as problem:
        return None, problem


def finetune(config: RunConfig, world: World) -> None:
    """One fine-tune, from its configuration to its report."""
    torch.manual_seed(config.train.seed)
    transformers.logging.disable_progress_bar()
    parallel = world.together(lambda: choose_parallelism(config, world))
    tokenizer = world.in_turn(lambda: setup.load_tokenizer(config.model))
    data = world.together(lambda: _load_data(config, tokenizer))
    model = world.together(parallel.load)
    layers = find_layers(model, config.grass.layers)
    folder = Path(config.output_dir) / config.name
    world.together(lambda: make_run_folder(config) if world.is_main else None)  # all input is good: now may files go
    about = _about(config, world, parallel.name, layers, data, model)
    log = world.together(lambda: MetricsLog(folder, about) if world.is_main else None)
    question = world.together(lambda: _question(config, data, tokenizer) if world.is_main else None)
    answer = world.together(partial(_answer_before, parallel, model, tokenizer, question))

    torch.manual_seed(config.train.seed + 1 + world.rank)  # dropout differs on the ranks
    reporter = Reporter(config.train.max_steps, len(layers.layers), speaks=world.is_main)
    if log and question:
        log.write("answer", 0, when="before", prompt=question["prompt"], text=answer, expected=question["expected"])
    if isinstance(data.train, Examples) and data.train.dropped:
        reporter.say(f"{data.train.dropped} examples have no token of their completion within max_length: left out")
    run = parallel.start(model, layers, [reporter.observe, *([log.observe] if log else [])])
    del model, layers  # the run has what it needs of them
    began = time.perf_counter()
    with reporter:
        train(config, world, run, data, tokenizer.pad_token_id, reporter, log)
    if log:
        log.write("end", config.train.max_steps, seconds=time.perf_counter() - began)
    if config.save_model:
        world.together(partial(run.save, tokenizer, folder / "model"))
    run.close()  # its memory is free for the model that answers
    world.together(lambda: _conclude(config, world, tokenizer, question, answer, reporter, log) if log else None)


def _answer_before(
    parallel: Parallelism, model: nn.Module, tokenizer: Any, question: dict[str, Any] | None
) -> str | None:
    """On the main rank, on its device for as long as it takes; the other ranks, without a question, wait."""
    if question is None:
        return None
    try:
        return parallel.answer(model, tokenizer, question["ids"])
    except torch.cuda.OutOfMemoryError:
        return "(the whole model does not fit on one device)"


def _conclude(
    config: RunConfig,
    world: World,
    tokenizer: Any,
    question: dict[str, Any] | None,
    before: str | None,
    reporter: Reporter,
    log: MetricsLog,
) -> None:
    """On the main rank: the answer of the saved model, and the report."""
    from grass_dist.report import build_report

    if config.save_model and question:
        try:
            text = answer_from_folder(
                str(log.folder / "model"),
                tokenizer,
                question["ids"],
                config.answer_tokens,
                world.device,
                trust_remote_code=config.model.trust_remote_code,
            )
        except torch.cuda.OutOfMemoryError:
            text = "(the whole model does not fit on one device)"
        about = {"prompt": question["prompt"], "text": text, "expected": question["expected"]}
        log.write("answer", config.train.max_steps, when="after", **about)
        reporter.say(f"\nquestion: {question['prompt']}\n\nbefore: {before}\n\nafter: {text}\n")
    log.close()
    reporter.say(f"report: {build_report(log.folder)}")


def train(
    config: RunConfig,
    world: World,
    run: Run,
    data: Data,
    pad_token_id: int,
    reporter: Reporter,
    log: MetricsLog | None,
) -> None:
    """All optimizer steps, with evaluations between them."""
    settings, grass = config.train, run.grass
    updates = settings.max_steps - grass.schedule.probe_steps
    scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, setup.learning_rate_factor(settings, updates))
    batches = make_batches(
        data.train,
        seed=settings.seed,
        global_batch_size=settings.global_batch_size,
        micro_batch_size=settings.micro_batch_size,
        rank=world.rank,
        world_size=world.size,
    )
    following, costs = iter(batches), StepCosts(run)
    for step in range(settings.max_steps + 1):
        last = step == settings.max_steps
        if len(data.held_out) and (step == 0 or last or (settings.eval_every and step % settings.eval_every == 0)):
            loss = evaluate(run.model, data.held_out, settings.micro_batch_size, pad_token_id, world)
            reporter.held_out(step, loss)
            if log:
                log.write("eval", step, loss=loss)
        if last:
            break
        # A row of a stream is read by one rank alone, and may be one that cannot be used.
        micro_batches = world.together(lambda: next(following)) if config.data.streaming else next(following)
        began = time.perf_counter()
        phase, active, rate = grass.phase, grass.active_layers, scheduler.get_last_lr()[0]
        result = train_step(run, micro_batches, pad_token_id, world)
        if phase == "train":
            scheduler.step()
        seconds = time.perf_counter() - began
        reporter.step(step + 1, phase, result.loss, seconds)
        spent = costs.of_step()
        if log:
            log.write(
                "step",
                step + 1,
                phase=phase,
                loss=result.loss,
                lr=rate if phase == "train" else 0.0,
                grad_norm=result.grad_norm,
                seconds=seconds,
                tokens=result.tokens,
                active_layers=active,
                **spent,
            )


def _raise(problem: ConfigError | None) -> RunConfig:
    raise problem or ConfigError("--config", None, "it was not read", "give a file")


def _load_data(config: RunConfig, tokenizer: Any) -> Data:
    try:
        if config.data.packing:
            check_packing(config.model.attention, config.train.micro_batch_size)
        return load_data(config.data, tokenizer, config.train.seed)
    except ConfigError as error:
        raise error if error.field.startswith("data.") else error.under("data") from None


def _question(config: RunConfig, data: Data, tokenizer: Any) -> dict[str, Any] | None:
    """The prompt that is answered before and after, and the answer that the data gives, if it does."""
    if config.answer_tokens == 0:
        return None
    prompt, expected = config.sample_prompt, None
    if prompt is None:
        if config.data.prompt is None or config.data.completion is None or not data.held_out_rows:
            return None
        row = data.held_out_rows[0]
        prompt, expected = fill(config.data.prompt, row, "prompt"), fill(config.data.completion, row, "completion")
    ids = render_prompt(tokenizer, prompt, config.data.chat_template)
    return {"prompt": prompt, "expected": expected, "ids": ids}


def _about(
    config: RunConfig, world: World, backend: str, layers: LayerMap, data: Data, model: nn.Module
) -> dict[str, Any]:
    """run.json: what does not change during the run."""
    always = always_active_roles(layers, config.grass)
    kind = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
    return {
        "name": config.name,
        "model": config.model.name,
        "backend": backend,
        "world_size": world.size,
        "device": kind,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "num_layers": len(layers.layers),
        "layer_names": [unit.name for unit in layers.layers],
        "layer_numel": [unit.numel for unit in layers.layers],
        "params_total": layers.numel,
        "params_always_active": sum(unit.numel for unit in always),
        "grass": config.grass.model_dump(mode="json"),
        "train": config.train.model_dump(mode="json"),
        "data": {
            "name": config.data.name,
            "train_examples": None if config.data.streaming else len(data.train),  # type: ignore[arg-type]
            "eval_examples": len(data.held_out),
        },
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"torch": torch.__version__, "grass_dist": grass_dist.__version__},
    }


if __name__ == "__main__":
    sys.exit(main())
