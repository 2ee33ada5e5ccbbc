"""Writes the recommended settings: a YAML file for launch/finetune.py, and for ZeRO the DeepSpeed JSON beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grass_dist.errors import ConfigError
from grass_dist.plan.choose import Estimate
from grass_dist.plan.memory import zero_settings
from grass_dist.plan.runs import grass_config
from grass_dist.plan.shape import ModelShape
from grass_dist.terminal import size

STEPS = 500


def write_config(path: Path, shape: ModelShape, row: Estimate) -> list[Path]:
    """Writes the settings of ``row``.

    Returns:
        The files that were written.

    Raises:
        ConfigError: a file is there already, or cannot be written.
    """
    files = {path: _yaml(path, shape, row)}
    if row.run.backend.startswith("zero"):
        files[path.with_suffix(".json")] = json.dumps(deepspeed_json(shape, row), indent=2) + "\n"
    for file, text in files.items():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("x", encoding="utf-8") as out:
                out.write(text)
        except FileExistsError:
            raise ConfigError("--write", str(path), f"{file} is there already", "remove it, or name another") from None
        except OSError as error:
            problem = f"it cannot be written ({error.strerror})"
            raise ConfigError("--write", str(path), problem, "name a file in a folder of yours") from None
    return list(files)


def deepspeed_json(shape: ModelShape, row: Estimate) -> dict[str, Any]:
    """Returns the DeepSpeed configuration whose buckets the plan has counted."""
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    auto = dict.fromkeys(names, "auto")
    low = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
    host = {"offload_param": {"device": "cpu", "pin_memory": True}} if row.run.weights == "host" else {}
    return {"zero_optimization": {**zero_settings(shape, row.run), **host}, **low, **auto}


def settings_of(path: Path, shape: ModelShape, row: Estimate) -> dict[str, Any]:
    """Returns the settings as nested sections; what is not planned is as in configs/."""
    run = row.run
    parallel: Any = {"single": "single", "ddp": "ddp", "fsdp2": "fsdp2"}.get(run.backend)
    if run.backend == "hsdp":
        parallel = {"backend": "fsdp2", "mesh": {"replicate": run.replicate}}
    elif parallel is None:
        parallel = {"backend": "deepspeed", "config": path.with_suffix(".json").name}
    given = Path(shape.name)
    name = str(given.parent) if given.suffix == ".json" else shape.name
    return {
        "name": "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in path.stem).lstrip("._-")
        or "planned",
        "model": {
            "name": name,
            "dtype": run.dtype,
            "activation_checkpointing": run.checkpointing,
            **({"logits": run.logits} if run.logits != "whole" else {}),
        },
        "data": {
            "name": "reasoning-gym:gsm_symbolic",
            "prompt": "question",
            "completion": "worked",
            "max_length": run.seq_len,
        },
        "train": {
            "max_steps": STEPS,
            "global_batch_size": run.gpus * run.micro_batch * run.accumulation,
            "micro_batch_size": run.micro_batch,
            "learning_rate": 1e-5,
            "warmup_steps": 10,
        },
        "grass": grass_config(run, row.method).model_dump(mode="json", exclude_unset=True),
        "parallel": parallel,
    }


def _yaml(path: Path, shape: ModelShape, row: Estimate) -> str:
    import yaml

    run = row.run
    text = yaml.safe_dump(settings_of(path, shape, row), sort_keys=False, allow_unicode=True)
    text = text.replace("  name: reasoning-gym:gsm_symbolic\n", "  name: reasoning-gym:gsm_symbolic # or yours\n")
    hosts = f"{run.num_hosts} hosts of {run.ranks_per_host}" if run.num_hosts > 1 else "one host"
    takes = f"{size(row.memory.total)} of {size(run.gpu_bytes)} on each, {size(row.host_bytes)} pinned on each host"
    on = f"{run.gpus} GPUs ({hosts})"
    return f"# Planned by grass-dist plan for {' '.join(shape.name.split())} on {on}:\n# {takes}.\n{text}"
