"""`RunConfig`: the one YAML file of a fine-tune, with dotted overrides, validated whole before anything is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from grass_dist.config import GrassConfig, StrictModel
from grass_dist.errors import ConfigError
from grass_dist.samplers import make_sampler, probe_steps
from grass_dist.training.data_config import DataConfig
from grass_dist.training.deepspeed_config import find_file, merge_grass, read_json


class ModelConfig(StrictModel):
    """Which model."""

    name: str = Field(min_length=1)
    """Hugging Face model name or folder, or "packaged:smollm2-135m"."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the weights. bfloat16 weights have fp32 masters in the state of their layer; their gradients are reduced in
    fp32 under fsdp2, in bfloat16 under ddp, and under deepspeed as its communication_data_type says (bfloat16 unless
    set). "auto": bfloat16 on a GPU, float32 on a CPU."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward."""
    trust_remote_code: bool = False
    """Allow code that comes with the model to run."""


class TrainConfig(StrictModel):
    """How it is trained."""

    max_steps: int = Field(ge=1)
    """Optimizer steps, those of the probe included."""
    global_batch_size: int = Field(default=8, ge=1)
    """Sequences of a step, over all ranks and micro-batches."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Sequences that a rank takes at a time; the steps of accumulation follow from the world size."""
    learning_rate: float = Field(default=1e-5, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Of the learning rate after the warm-up, down to `min_learning_rate_ratio`."""
    warmup_steps: int = Field(default=0, ge=0)
    """Of the steps that update; the probe does not count."""
    min_learning_rate_ratio: float = Field(default=0.0, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    """On matrices; not on norms and biases."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    clip_grad_norm: float | None = Field(default=1.0, gt=0)
    eval_every: int = Field(default=50, ge=0)
    """Steps between evaluations on the held-out examples; 0 evaluates at the start and the end only."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the order of the data and of dropout. The order depends on it and on the global batch size alone."""
    timeout_seconds: int = Field(default=600, ge=1)
    """After which a collective that a rank does not join ends the run."""

    @field_validator("learning_rate", "weight_decay", "eps", "clip_grad_norm", "min_learning_rate_ratio")
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        if value is not None and not math.isfinite(value):
            raise ValueError("must be finite")
        return value

    @field_validator("betas", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("betas")
    @classmethod
    def _betas_below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("must be two numbers from 0 to below 1")
        return value

    @model_validator(mode="after")
    def _steps_fit_together(self) -> TrainConfig:
        if self.global_batch_size % self.micro_batch_size:
            raise ConfigError(
                "global_batch_size",
                self.global_batch_size,
                f"it is no multiple of micro_batch_size={self.micro_batch_size}",
                "change one of them",
            )
        return self


class ParallelConfig(StrictModel):
    """How the ranks share the work. ``parallel: fsdp2`` is short for ``parallel: {backend: fsdp2}``."""

    backend: Literal["fsdp2", "ddp", "deepspeed", "single"] = "fsdp2"
    replicate: int = Field(default=1, ge=1)
    """fsdp2 only: number of replicas of the sharded model (HSDP); it must divide the number of ranks."""
    config: str | None = None
    """deepspeed only: path of its JSON, relative to the folder of the YAML file or else to the working directory."""

    @model_validator(mode="after")
    def _replicas_are_of_shards(self) -> ParallelConfig:
        if self.replicate > 1 and self.backend != "fsdp2":
            raise ConfigError("replicate", self.replicate, f"backend={self.backend} does not use it", "leave it out")
        return self

    @model_validator(mode="after")
    def _a_json_is_for_deepspeed(self) -> ParallelConfig:
        if self.backend == "deepspeed" and self.config is None:
            fix = "give the path of a DeepSpeed JSON, e.g. configs/zero2_grass.json"
            raise ConfigError("config", None, "backend=deepspeed needs one", fix)
        if self.backend != "deepspeed" and self.config is not None:
            raise ConfigError("config", self.config, f"backend={self.backend} reads no JSON", "leave it out")
        return self


class RunConfig(StrictModel):
    """A fine-tune."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's folder is ``output_dir/name``."""
    output_dir: str = "runs"
    overwrite: bool = False
    """Whether a folder of an earlier run by this name is written over."""
    save_model: bool = True
    """Write the fine-tuned model as a Hugging Face folder, ``model/`` in the run's folder."""
    sample_prompt: str | None = None
    """A prompt to answer before and after; left out, the first held-out one."""
    answer_tokens: int = Field(default=128, ge=0)
    """Tokens of that answer at most; 0 asks nothing."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    grass: GrassConfig
    parallel: ParallelConfig = ParallelConfig()

    @field_validator("parallel", mode="before")
    @classmethod
    def _name_of_a_backend(cls, value: Any) -> Any:
        return {"backend": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _updates_can_be_early(self) -> RunConfig:
        clip = self.train.clip_grad_norm
        if self.grass.offload.update_in_backward and clip is not None:
            problem = f"train.clip_grad_norm={clip} needs the norm of all gradients before any update"
            raise ConfigError("grass.offload.update_in_backward", True, problem, "set one of them to false or null")
        return self

    @model_validator(mode="after")
    def _something_trains(self) -> RunConfig:
        grass, steps = self.grass, self.train.max_steps
        try:
            sampler = make_sampler(grass, max((grass.active_layers, *(i + 1 for i in grass.fixed_layers))))
        except ConfigError as error:
            raise error.under("grass") from None
        if (probing := probe_steps(grass, sampler)) >= steps:
            fix = "use more steps or a smaller grass.probe_steps"
            raise ConfigError(
                "train.max_steps", steps, f"the probe takes {probing} steps and nothing would be trained", fix
            )
        if self.train.warmup_steps >= steps - probing:
            raise ConfigError(
                "train.warmup_steps",
                self.train.warmup_steps,
                f"only {steps - probing} steps update, so the learning rate would never be reached",
                "use fewer",
            )
        return self


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies overrides such as ``train.learning_rate=1e-5``.

    A name with dots in the file means the same: ``parallel: deepspeed`` and ``parallel.config: my.json``. The section
    ``grass`` may stand in the DeepSpeed JSON instead.

    Raises:
        ConfigError: the file, an override or a setting cannot be used.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(
            "--config", str(path), f"it cannot be read ({error.strerror})", "give an existing file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise ConfigError("--config", str(path), f"it is not YAML: {where}", "correct it there") from None
    if not isinstance(data, dict):
        raise ConfigError("--config", str(path), "it holds no settings", "see configs/ for examples")
    data = {str(key): value for key, value in data.items()}
    for key in [key for key in data if "." in key]:
        _put(data, key, data.pop(key))
    for override in overrides:
        _override(data, override)
    return RunConfig(**_with_json(data, path.parent))


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """Every setting by its dotted name."""

    def walk(at: Any, name: str) -> dict[str, Any]:
        if not isinstance(at, dict):
            return {name: at}
        return {k: v for key, below in at.items() for k, v in walk(below, f"{name}.{key}" if name else key).items()}

    return walk(config.model_dump(mode="json"), "")


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML whose 1e-5 is a number (YAML 1.2), where PyYAML's 1.1 wants 1.0e-5."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError("override", override, "it is not of the form section.field=value", "write it like that")
    try:
        value = yaml.load(text, _Loader) if text else None
    except yaml.YAMLError:
        raise ConfigError(key, text, "the value is not YAML", "quote it") from None
    _put(data, key, value)


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    """Sets ``value`` at a dotted name."""
    *path, last = key.split(".")
    at: dict[str, Any] = data
    for part in path:
        below: Any = at.get(part)
        if isinstance(below, str) and part == "parallel":  # parallel: ddp, then parallel.replicate=2
            below = {"backend": below}
        if below is None:
            below = {}
        if not isinstance(below, dict):
            raise ConfigError(key, value, f"{part} is {below!r} in the file, not a section", f"override {part} itself")
        at[part] = below
        at = below
    at[last] = value


def _with_json(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings with the path of their DeepSpeed JSON made absolute and its ``"grass"`` merged in."""
    parallel, grass = data.get("parallel"), data.get("grass")
    if not isinstance(parallel, dict) or parallel.get("backend") != "deepspeed":
        return data
    if not isinstance(name := parallel.get("config"), str) or not isinstance(grass, dict | None):
        return data  # refused where every other wrong type is
    file = find_file(name, folder)
    merged = merge_grass(read_json(file), grass)
    return {**data, "parallel": {**parallel, "config": str(file)}, **({} if merged is None else {"grass": merged})}
