"""Runs ``grass-dist plan``, from its options to tables, files and pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any, cast

from grass_dist.config import ROLES, Role
from grass_dist.errors import ConfigError, GrassError
from grass_dist.plan.choose import (
    USUAL_GAMMA,
    Choice,
    Estimate,
    candidates,
    check_weights,
    choose,
    estimate,
    nearest_to_fitting,
    remedies,
)
from grass_dist.plan.memory import Memory, states_of
from grass_dist.plan.runs import Method, PlannedRun, methods_of, trained_roles
from grass_dist.plan.scale import Point, assumptions, draw_scale, parse_scale, scale
from grass_dist.plan.schema import most_layers, plan_json
from grass_dist.plan.shape import ModelShape, parse_count, shape_of_model, shape_of_params
from grass_dist.plan.simulate import can_simulate, simulate
from grass_dist.plan.speeds import Speeds, check_speed, speeds_from_doctor
from grass_dist.plan.tables import show
from grass_dist.plan.write import write_config
from grass_dist.terminal import size

BUDGET_S = 40.0
"""Seconds after which no further method is simulated; the closed form answers for the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """The options of the command line; None is an option that was left out."""

    gpus: int
    seq_len: int
    model: str | None = None
    params: str | None = None
    layers: int | None = None
    hidden: int | None = None
    intermediate: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    vocab: int = 32000
    gpus_per_host: int = 8
    gpu_bytes: float | None = None
    micro_batch: int = 1
    accumulation: int = 1
    backend: str | None = None
    replicate: int | None = None
    offload: str | None = None
    weights: str = "resident"
    checkpointing: bool | None = None
    logits: str = "whole"
    dtype: str = "bfloat16"
    always_active: str = ",".join(ROLES)
    sampling_interval: int = 50
    doctor: Path | None = None
    tflops: float | None = None
    host_bytes: float | None = None
    fast: bool = False
    write: Path | None = None
    scale: str | None = None
    plot: Path | None = None
    json_file: Path | None = None


def plan_run(options: PlanOptions, tell: Callable[[str], None]) -> None:
    """Plans, prints, and writes what was asked for.

    Args:
        tell: takes sentences about what is under way.

    Raises:
        ConfigError: an option has a value that cannot be used.
        GrassError: no settings fit, and a file of them was asked for.
    """
    speeds = _speeds(options)
    counts = parse_scale(options.scale) if options.scale else []
    if options.plot and not counts:
        raise ConfigError("--plot", str(options.plot), "it shows what --scale counts", "add e.g. --scale 8..4096")
    run, shape = _planned_run(options, speeds), _shape(options, tell)
    check_weights(shape, run)
    if run.logits == "chunked" and not shape.causal:
        raise ConfigError("--logits", "chunked", f"{shape.name} is no causal language model", "leave it out")
    if options.write and not shape.causal:
        problem = f"settings are written for causal language models, and {shape.name} is none"
        raise ConfigError("--write", str(options.write), problem, "leave it out, and take the settings from the plan")
    choice = plan(shape, run, speeds, options, tell)
    points, assumed = list[Point](), ""
    if counts:
        gamma = min(USUAL_GAMMA, shape.num_layers)
        method = choice.recommended.method if choice.recommended else Method("grass", gamma, choice.run.roles)
        points = scale(shape, choice.run, method, speeds, counts)
        assumed = assumptions(shape, choice.run, method, speeds)
    show(shape, choice, speeds, points, assumed)
    if points:
        plot = options.plot or Path("scale.png")
        draw_scale(points, assumed, plot)
        tell(f"{plot}: step time and efficiency over the number of GPUs")
    if options.json_file:
        _write_json(options.json_file, plan_json(shape, choice, speeds, points))
    if options.write:
        if choice.recommended is None:
            raise GrassError(f"--write={str(options.write)!r}: nothing fits, so there are no settings to write.")
        for file in write_config(options.write, shape, choice.recommended):
            tell(f"{file}: written")


def plan(
    shape: ModelShape, run: PlannedRun, speeds: Speeds, options: PlanOptions, tell: Callable[[str], None]
) -> Choice:
    """Plans every method under the settings that are given or, where they are left open, chosen."""
    runs = candidates(run, offload=options.offload is None, checkpointing=options.checkpointing is None)
    chosen, method = choose(shape, runs, speeds)
    if method is None:
        chosen = nearest_to_fitting(shape, runs, speeds).run
    rows: tuple[Estimate, ...] = ()
    recommended: Estimate | None = None
    taken = chosen
    # The simulation may find more than the closed form by which the first was chosen.
    for tried in [chosen, *runs[runs.index(chosen) + 1 :]]:
        first = method or Method("grass", 1, tried.roles)
        memories = {} if options.fast else _simulated(shape, tried, first, tell)
        found = tuple(estimate(shape, tried, m, speeds, memories.get(m)) for m in methods_of(shape, tried))
        recommended = _recommended(found)
        if recommended or not rows:
            taken, rows = tried, found
        if recommended or method is None:
            break
    sentences = _sentences(shape, runs, rows, recommended, speeds, options)
    if shape.pairs is not None:
        sentences = [*shape.pairs.sentences(taken.seq_len, taken.weight_bytes), *sentences]
    return Choice(taken, rows, recommended, tuple(sentences))


def _recommended(rows: tuple[Estimate, ...]) -> Estimate | None:
    """Returns GRASS with the usual γ if that fits, else with the largest smaller one that does."""
    fits = [row for row in rows if row.method.name == "grass" and row.fits]
    usual = [row for row in fits if row.method.active_layers <= USUAL_GAMMA] or fits[:1]
    return max(usual, key=lambda row: row.method.active_layers, default=None)


def _simulated(shape: ModelShape, run: PlannedRun, first: Method, tell: Callable[[str], None]) -> dict[Method, Memory]:
    """Simulates as many methods as there is time for, those that matter most first."""
    steps: dict[Any, Memory] = {}
    found: dict[Method, Memory] = {}
    methods = [first, *sorted(methods_of(shape, run), key=lambda m: (m.name != "full", m.active_layers))]
    began, longest = monotonic(), 0.0
    for method in methods:
        key = method.active_layers, tuple(trained_roles(shape, method))
        if not can_simulate(run, method):
            continue
        if key in steps:  # the same step but for the states, which are there all the time
            found[method] = replace(steps[key], states=states_of(shape, run, method)[0])
            continue
        started = monotonic()
        if started - began + longest > BUDGET_S:
            continue
        if not steps:
            tell("simulating training steps ...")
        try:
            found[method] = steps[key] = simulate(shape, run, method)
        except GrassError as error:
            tell(f"{error} The closed form answers alone.")
            break
        longest = max(longest, monotonic() - started)
    return found


def _sentences(
    shape: ModelShape,
    runs: list[PlannedRun],
    rows: tuple[Estimate, ...],
    recommended: Estimate | None,
    speeds: Speeds,
    options: PlanOptions,
) -> list[str]:
    run = rows[0].run
    if recommended is None:
        near = nearest_to_fitting(shape, runs, speeds)
        short = near.memory.total - near.run.gpu_bytes
        lacking = f"{size(short)} more than there are" if short > 0 else f"{size(near.host_bytes)} pinned on each host"
        takes = f"{size(near.memory.total)} a GPU, {lacking}"
        first = f"Nothing fits. Nearest is {near.method.label} ({_named(near.run)}): {takes}."
        return [first, *remedies(shape, near, speeds)]
    time = recommended.time.total / rows[0].time.total
    most, gamma = most_layers(rows), recommended.method.active_layers
    others = [row.method.label for row in rows if row.method.name != "grass" and row.fits]
    also = f"; so {'do' if len(others) > 1 else 'does'} {', '.join(others)}" if others else ""
    opened = ["offload"] * (options.offload is None) + ["activation checkpointing"] * (options.checkpointing is None)
    by_choice = f" ({' and '.join(opened)} chosen)" if opened else ""
    return [
        f"GRASS fits with up to γ={most} of {shape.num_layers} layers at a time{also}.",
        f"Recommended: γ={gamma}, {_named(run)}{by_choice}: {size(recommended.memory.total)} of {size(run.gpu_bytes)} "
        f"a GPU, {size(recommended.host_bytes)} pinned on each host, {time:.2f} × the "
        "step time of full fine-tuning.",
    ]


def _named(run: PlannedRun) -> str:
    weights = ", weights on the host" if run.weights == "host" else ""
    return f"{run.backend}, offload {run.offload}{weights}, {run.named_checkpointing}"


def _speeds(options: PlanOptions) -> Speeds:
    speeds = Speeds()
    if options.tflops is not None:
        speeds = replace(speeds, flop_per_s=check_speed("--tflops", options.tflops) * 1e12)
    if options.doctor is not None:
        speeds = speeds_from_doctor(options.doctor, speeds)
    return replace(speeds, pinnable_bytes=options.host_bytes) if options.host_bytes is not None else speeds


def _planned_run(options: PlanOptions, speeds: Speeds) -> PlannedRun:
    gpu_bytes = options.gpu_bytes or speeds.device_bytes
    if gpu_bytes is None:
        fix = "write e.g. --gpu-memory 24GB, or give a report of GPUs by --from"
        raise ConfigError("--gpu-memory", None, "nobody says how much memory a GPU has", fix)
    backend = options.backend or ("single" if options.gpus == 1 else "fsdp2")
    hosts = -(-options.gpus // max(options.gpus_per_host, 1))
    replicate = options.replicate or (hosts if backend == "hsdp" else 1)
    if replicate > 1 and backend != "hsdp":
        raise ConfigError("--replicate", replicate, f"{backend} has no replicas to choose", "use --backend hsdp")
    same = ("gpus", "gpus_per_host", "seq_len", "micro_batch", "accumulation", "dtype", "sampling_interval")
    return PlannedRun(
        **{name: getattr(options, name) for name in same},
        gpu_bytes=gpu_bytes,
        backend=cast(Any, backend),
        replicate=replicate,
        offload=cast(Any, options.offload or "interval"),
        weights=cast(Any, options.weights),
        checkpointing=bool(options.checkpointing),
        logits=cast(Any, options.logits),
        roles=_roles(options.always_active),
    )


def _roles(text: str) -> tuple[Role, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["none"]:
        return ()
    if wrong := [name for name in names if name not in ROLES]:
        fix = f"use some of {','.join(ROLES)}, or none"
        raise ConfigError("--always-active", text, f"there is no role {wrong[0]}", fix)
    return tuple(role for role in ROLES if role in names)


def _shape(options: PlanOptions, tell: Callable[[str], None]) -> ModelShape:
    if (options.model is None) == (options.params is None):
        raise ConfigError("--model", options.model, "the model is given by --model or by --params", "give one of them")
    if options.model is not None:
        return shape_of_model(options.model, tell)
    assert options.params is not None
    sizes = ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocab")
    given = {name: getattr(options, name) for name in sizes}
    return shape_of_params(parse_count("--params", options.params), **given)


def _write_json(path: Path, found: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        problem = f"it cannot be written ({error.strerror})"
        raise ConfigError("--json", str(path), problem, "name a file in a folder of yours") from None
