"""What the main process writes into ``output_dir`` when the record of a Trainer's run begins."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grass_dist.errors import GrassError
from grass_dist.method.controller import GrassController
from grass_dist.model.adapters import layers_of
from grass_dist.model.discovery import LayerMap
from grass_dist.record.about import about_run, what_trains
from grass_dist.record.writers import JsonLines, length_until
from grass_dist.regular_files import read_regular, replace_file

RECORDED_BY = "grass_dist.GrassReport"
"""The value of ``recorded_by`` in run.json, by which the next run knows that it may replace the record."""

_FIRST_LINE = "# written by grass_dist.GrassReport\n"
_LARGEST = 2**24

TELLING = (
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "optim", "optim_args", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha"),
    *("bf16", "fp16", "tf32", "gradient_checkpointing", "torch_compile", "deepspeed", "fsdp", "fsdp_config"),
    *("seed", "data_seed", "full_determinism", "group_by_length", "max_length", "packing", "logging_steps"),
    *("eval_strategy", "eval_steps", "save_strategy", "save_steps", "load_best_model_at_end"),
)
"""The fields of TrainingArguments that config.yaml has, and some of TRL's, where they are set."""


def describe(
    grass: GrassController, args: Any, state: Any, kwargs: Mapping[str, Any]
) -> tuple[LayerMap, dict[str, Any]]:
    """Returns the layers of the model, and the content of run.json.

    Args:
        args: `transformers.TrainingArguments`.
        kwargs: what Trainer gives its callbacks.
    """
    import transformers

    model, backend = kwargs["model"], grass.backend
    assert grass.started is not None  # as it is once the method has been made
    # What is frozen now says nothing of the stacks.
    found = layers_of(model, grass.config.model_copy(update={"layers": grass.started.stacks}))
    competing = {unit.number: unit.params for unit in grass.layers}
    stage = getattr(backend, "stage", None)
    settings = _telling(args)
    about = about_run(
        grass.config,
        [dataclasses.replace(unit, params=competing.get(unit.number, unit.params)) for unit in found.layers],
        grass.roles,
        params_total=found.numel,
        device=args.device,
        dtype=next(model.parameters()).dtype,
        versions={"transformers": transformers.__version__},
        name=Path(getattr(args, "run_name", None) or args.output_dir).resolve().name,
        model=getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__,
        backend=backend.name if stage is None else f"DeepSpeed ZeRO-{stage}",
        world_size=args.world_size,
        frozen_layers=[unit.number for unit in found.layers if unit.number not in competing],
        train={**settings, "max_steps": state.max_steps + grass.schedule.probe_steps},  # as steps are counted there
        data=_data(kwargs.get("train_dataloader")),
        recorded_by=RECORDED_BY,
        trains=what_trains(grass.started),
    )
    return found, about


def begin_record(folder: Path, about: dict[str, Any], args: Any, step: int | None) -> JsonLines:
    """Writes run.json and config.yaml, and opens metrics.jsonl.

    Args:
        step: with which the run goes on; what an earlier record has of later steps is cut off. None: it begins.

    Raises:
        GrassError: the folder has a record of another program.
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines, before = folder / "metrics.jsonl", _earlier(folder)
    same = before is not None and before.get("layer_names") == about["layer_names"]
    keep = length_until(lines, step) if same and step is not None else 0
    replace_file(folder / "run.json", json.dumps(about, indent=1).encode())
    _write_config(folder / "config.yaml", about, args)
    if lines.is_symlink():
        lines.unlink()
    return JsonLines(lines, keep)


def _earlier(folder: Path) -> dict[str, Any] | None:
    """The run.json of a record that may be replaced; None if there is none.

    Raises:
        GrassError: the folder has files of those names that are not of a `GrassReport`.
    """
    there = [name for name in ("run.json", "metrics.jsonl") if os.path.lexists(folder / name)]
    if not there:
        return None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        about = json.loads(read_regular(folder / "run.json", _LARGEST))
        if isinstance(about, dict) and about.get("recorded_by") == RECORDED_BY:
            return about
    raise GrassError(f"its {there[0]} is of another program; choose another output_dir, or remove it")


def _write_config(path: Path, about: dict[str, Any], args: Any) -> None:
    """Writes config.yaml, unless the folder has one of the user's."""
    import yaml

    with contextlib.suppress(FileNotFoundError):
        try:
            if not read_regular(path, _LARGEST).startswith(_FIRST_LINE.encode()):
                return
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
            return
    settings = {"grass": about["grass"], "train": _telling(args)}
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    replace_file(path, (_FIRST_LINE + text).encode())


def _telling(args: Any) -> dict[str, Any]:
    given = {name: value for name in TELLING if (value := getattr(args, name, None)) is not None}
    return json.loads(json.dumps(given, default=lambda value: getattr(value, "value", None) or str(value)))


def _data(loader: Any) -> dict[str, Any]:
    dataset = getattr(loader, "dataset", None)
    known: dict[str, Any] = {}
    if isinstance(name := getattr(getattr(dataset, "info", None), "dataset_name", None), str):
        known["name"] = name
    with contextlib.suppress(TypeError, NotImplementedError):  # a stream has no length
        known["train_examples"] = len(dataset)  # type: ignore[arg-type]
    return known
