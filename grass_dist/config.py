"""`GrassConfig`: every setting of the method, under the names of the paper's symbols (docs/method.md)."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from grass_dist.errors import ConfigError

Role = Literal["embeddings", "final_norm", "lm_head", "others"]
ROLES: tuple[Role, ...] = get_args(Role)
ADAPTERS = "adapters"
"""The role of what adapters add to a model. It trains at every step where it is asked for."""


class StrictModel(BaseModel):
    """Frozen and strict; an unknown key or a wrong type is a `ConfigError` of one sentence."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, use_attribute_docstrings=True
    )

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _one_sentence(error, type(self)) from None


OffloadMode = Literal["interval", "stream", "none", "auto"]


IN_BLOCKS = ("cyclic", "random-cyclic", "without-replacement", "middle", "fixed")
"""Samplers that take blocks of `active_layers` layers."""


class OffloadConfig(StrictModel):
    """Where the optimizer states and the weights of the layers are, and when they move (docs/offload.md).

    The trajectory is the same to the bit in every mode and with every setting here but ``host_dtype``.

    Raises:
        ConfigError: a field that cannot work; the message names the field, the value and the fix.
    """

    mode: OffloadMode | None = None
    """`interval`: the states of the active layers are on the device from one switch to the next, those of all other
    layers are in host memory. `stream`: the states of `slots` layers at a time are on the device, in the order of the
    updates. `none`: every state stays on the device. `auto`: the first of `none`, `interval` and `stream` whose states
    fit into a quarter of the free device memory. null: `interval`; or `none` with an optimizer whose states cannot
    move, which refuses `interval` and `stream`."""

    prefetch_steps: int = Field(default=1, ge=0)
    """For `interval`: how many steps before a switch the state of the first new layer comes to the device, into a slot
    that is kept for it. 0: none comes early, and there is no such slot. More than `draw_ahead` has no effect."""

    slots: int = Field(default=3, ge=2)
    """For `stream`: number of layers whose states are on the device at a time."""

    update_in_backward: bool | None = None
    """Updates a layer within the backward, as soon as its gradient is final, and frees the gradient. It needs training
    without clipping and with one forward for each micro-batch, and it is refused under DeepSpeed, which updates after
    the norm. null: the training program does so with `mode: stream` where nothing is clipped, except under DeepSpeed;
    all else does not."""

    host_dtype: Literal["bfloat16"] | None = None
    """For `interval` only: rounds fp32 moments to this dtype whenever they go to the host, which halves their bytes
    there. Masters stay exact. null: nothing is rounded."""

    folder: str | None = None
    """A folder on a fast local disk that is the host tier in place of memory: it holds a memory-mapped file for each
    layer of each rank, which is gone when the process ends."""

    weights: Literal["resident", "host"] = "resident"
    """`host`: the weights of layers that do not train now rest in host memory, pinned on a GPU, and come to the device
    for their forward and their backward. Those of the active layers and of all that is outside the layers stay on the
    device. For one process and DDP; under FSDP2 and DeepSpeed it is refused, with what does the same there. `resident`:
    every weight stays where the model has it (docs/offload.md#weights-on-the-host)."""

    weight_slots: int = Field(default=2, ge=2)
    """For `weights: host`: number of layers that do not train whose weights are on the device at a time. One computes
    while the next ones come."""

    chaos: int | None = Field(default=None, ge=0)
    """For tests on the CPU: seed by which copies are delayed and reordered wherever nothing orders them, and undefined
    memory is filled with NaN."""

    @model_validator(mode="after")
    def _fields_fit_together(self) -> OffloadConfig:
        if self.host_dtype is not None and self.mode not in ("interval", None):
            raise ConfigError(
                "host_dtype",
                self.host_dtype,
                "rounds the moments whenever they go to the host: with mode='none' that is never, and with 'stream', "
                f"which 'auto' may choose, at every step, so that exp_avg_sq stands still; mode={self.mode!r}",
                "use mode='interval' or leave host_dtype out",
            )
        if self.weights == "host" and self.mode in ("none", "auto"):
            raise ConfigError(
                "weights",
                self.weights,
                "rests weights in host memory to save memory of the device, and optimizer states, which take more, "
                f"would {'stay there' if self.mode == 'none' else 'perhaps stay there'} with mode={self.mode!r}",
                "use mode='interval' or 'stream'",
            )
        return self


class EffectiveLayers(StrictModel):
    """A temperature by what it does. It is solved for at each refresh."""

    effective_layers: float = Field(ge=1)
    """Draws are as uneven as uniform ones among so many layers: exp of the entropy (in nats) of the softmax. At most
    the number of layers that compete, at which draws are uniform."""

    @field_validator("effective_layers", mode="before")
    @classmethod
    def _finite_number(cls, value: Any) -> Any:
        return _finite(value)


class AdapterConfig(StrictModel):
    """LoRA on the linear weights of the layers, which trains at every step beside the layers that are drawn."""

    rank: int = Field(ge=1)
    """Rank of each adapter (r), at most the smaller dimension of every weight that gets one."""

    alpha: float = Field(gt=0)
    """What an adapter adds is multiplied by alpha / rank."""

    target: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """`all-linear`: every linear weight of the layers. Or a list: names of modules in a layer (`q_proj`,
    `self_attn.q_proj`), or patterns with `*`. The head and the embeddings get no adapter."""

    learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of the adapters, on which a schedule works as on any other. null: that of their parameter
    group."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of what goes into an adapter, while the model trains."""

    @field_validator("target", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("alpha", "learning_rate", "dropout", mode="before")
    @classmethod
    def _finite_number(cls, value: Any) -> Any:
        return _finite(value)


def _finite(value: Any) -> Any:
    """An int as a float, which it stands for; anything else is left to pydantic."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError("must be finite")
        return float(value)
    return value


class GrassConfig(StrictModel):
    """How many layers train, which, and when they change.

    Symbols in brackets are those of the paper (arXiv 2604.07808). Steps are optimizer steps, never
    micro-batches.

    Raises:
        ConfigError: a field that cannot work; the message names the field, the value and the fix.
    """

    active_layers: int = Field(default=4, ge=1)
    """Number of decoder layers that train at a time (γ), at most the layers of the model."""

    active_parameters: int | float | None = None
    """Most parameters of layers that train at a time, beside `active_layers`: a number, or below 1 a share of those of
    all layers that compete. The layers come in the order of the draw, and one that no longer fits is left out. It must
    have room for the largest layer, and the samplers that take blocks of `active_layers` layers refuse it (`cyclic`,
    `random-cyclic`, `without-replacement`, `middle`, `fixed`). null: no limit."""

    sampling_interval: int = Field(default=50, ge=1)
    """Steps between two draws of the active layers (T_s). The paper advises 25 to 50."""

    update_interval: int = Field(default=50, ge=1)
    """Steps between two refreshes of the importances and probabilities (T_u)."""

    draw_ahead: int | None = Field(default=None, ge=0)
    """How many steps before a switch its layers are drawn, and how many steps before a multiple of T_u the importances
    are refreshed (docs/method.md#the-clock). It must be below T_s and T_u. null: 2, or the largest number below both.
    0: at the switch, as in the paper."""

    probe_steps: int | None = Field(default=None, ge=0)
    """Steps at the start that measure every layer and update none (T_p). null: 8 for a sampler that uses gradient
    norms, 0 for the others."""

    temperature: float | EffectiveLayers = 1.0
    """Softmax temperature (τ), above 0 and finite. A higher one is nearer to uniform; one so low that a probability
    underflows is an error at the refresh or draw. `{effective_layers: n}`: τ is solved for at each refresh, so that a
    draw is as uneven as a uniform one among n layers (docs/method.md#probability)."""

    exploration: float = Field(default=0.0, ge=0, le=1)
    """Share of uniform draws that is mixed into the probabilities (ε), so that each layer has at least ε / L. 0 is the
    method of the paper."""

    ema_alpha: float = Field(default=0.5, gt=0, le=1)
    """Weight of the newest measurement in the moving average of a layer (α). 1 forgets the older ones."""

    sampler: str = "grass"
    """Name in the sampler registry: `grass`, `grass-static`, `uniform`, `cyclic`, `random-cyclic`,
    `without-replacement`, `weight-norm`, `middle`, `fixed`, or one that was added with `register_sampler`. It is
    checked when the optimizer is made."""

    importance_scale: Literal["mean", "none"] = "mean"
    """`mean` divides the importances by their mean over the layers before the softmax, so that τ does not depend on the
    scale of the model. `none` is the formula to the letter."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the draws. They depend on (seed, round) alone: not on the generators of torch, not on the rank."""

    adapters: AdapterConfig | None = None
    """LoRA on every layer, which trains at every step after the probe, while the drawn layers' own weights train too
    (docs/adapters.md). It needs `peft`. null: none."""

    always_active: tuple[str, ...] = ROLES
    """What trains at every step outside the layers: roles (`embeddings`, `final_norm`, `lm_head`, `others` for all
    that has none of these, such as a classifier, and `adapters` for those that a model of `peft` brings along,
    docs/adapters.md#a-model-that-has-adapters), FQNs of modules and parameters, and patterns with `*`, with or
    without the prefixes of wrappers. What is not listed is frozen. Without `embeddings` the backward stops at the
    lowest active layer. Tied embeddings train if `embeddings` or `lm_head` is listed. `others` may have as many
    elements as the `active_layers` largest layers; what is listed by name has no limit (docs/models.md#others)."""

    freeze: tuple[str, ...] = ()
    """What never trains, layers or not: FQNs of modules and parameters, and patterns with `*`, such as `*.router` or
    `*.mlp.gate` for the routers of a mixture of experts, with or without the prefixes of wrappers. It is as if you had
    set `requires_grad=False` there: the rest of a layer trains when the layer is drawn. A pattern may match nothing if
    another entry matches something, so one list serves several models."""

    fixed_layers: tuple[int, ...] = ()
    """The layers that the sampler `fixed` trains: `active_layers` different indices, from 0. Any other sampler refuses
    them."""

    layers: str | tuple[str, ...] | None = None
    """FQN of the `nn.ModuleList` or `nn.Sequential` that is the layer stack, e.g. `model.layers`, with or without the
    prefixes of wrappers; or a list of several, whose layers compete as one set in the order of the model. null: the
    stacks are found by their structure (docs/models.md#several-stacks)."""

    offload: OffloadConfig = OffloadConfig()
    """Where the optimizer states of the layers are, and when they move (docs/offload.md)."""

    @field_validator("always_active", "fixed_layers", "freeze", "layers", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("always_active", "freeze", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("active_parameters")
    @classmethod
    def _number_or_share(cls, value: int | float | None) -> int | float | None:
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError("must be an integer, or a share above 0 and below 1")
        if isinstance(value, int) and value < 1:
            raise ValueError("must be at least 1")
        return value

    @field_validator("ema_alpha", "exploration", mode="before")
    @classmethod
    def _finite_number(cls, value: Any) -> Any:
        return _finite(value)

    @field_validator("temperature", mode="before")
    @classmethod
    def _number_or_layers(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return EffectiveLayers(**{str(name): given for name, given in value.items()})
        if isinstance(value, EffectiveLayers):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError("must be a number or {effective_layers: n}")
        if _finite(value) <= 0:
            raise ValueError("must be above 0")
        return float(value)

    @property
    def trains_adapters(self) -> bool:
        """Whether adapters are a role, which trains at every step, and base weights alone are what is drawn."""
        return self.adapters is not None or ADAPTERS in self.always_active

    @property
    def lead(self) -> int:
        """`draw_ahead`, with its default filled in."""
        shortest = min(self.sampling_interval, self.update_interval)
        return min(2, shortest - 1) if self.draw_ahead is None else self.draw_ahead

    @model_validator(mode="after")
    def _fields_fit_together(self) -> GrassConfig:
        shortest = min(self.sampling_interval, self.update_interval)
        if self.lead >= shortest:
            raise ConfigError(
                "draw_ahead",
                self.draw_ahead,
                f"is not below sampling_interval={self.sampling_interval} and update_interval={self.update_interval}",
                (f"use 0 to {shortest - 1}" if shortest > 1 else "use 0") + ", or leave it out",
            )
        for field, names in (("always_active", self.always_active), ("freeze", self.freeze)):
            if len(set(names)) != len(names):
                raise ConfigError(field, names, "a name is listed twice", "list each once")
            if "" in names:
                raise ConfigError(field, names, "a name is empty", "leave it out")
        # What is always active by default gives way; only a list of the user's own contradicts another.
        if self.always_active != ROLES and (both := sorted({*self.freeze} & {*self.always_active})):
            raise ConfigError("freeze", both, "it is in always_active, too", "list it in one of them")
        if self.layers == ():
            raise ConfigError("layers", [], "it names no stack", "name one, or leave it out")
        if self.active_parameters is not None and self.sampler in IN_BLOCKS:
            raise ConfigError(
                "active_parameters",
                self.active_parameters,
                f"sampler={self.sampler!r} takes blocks of active_layers layers, whatever their size",
                "leave it out, or use another sampler, such as 'grass' or 'uniform'",
            )
        if self.sampler == "fixed":
            if len(self.fixed_layers) != self.active_layers or len(set(self.fixed_layers)) != self.active_layers:
                raise ConfigError(
                    "fixed_layers",
                    self.fixed_layers,
                    f"sampler='fixed' needs active_layers={self.active_layers} different layers",
                    "list that many layer indices, or change active_layers",
                )
        elif self.fixed_layers:
            raise ConfigError(
                "fixed_layers",
                self.fixed_layers,
                f"is read by sampler='fixed' only, and sampler={self.sampler!r}",
                "set sampler='fixed' or leave fixed_layers out",
            )
        return self


def as_config(given: Any) -> GrassConfig:
    """A `GrassConfig`, from one or from a mapping of its settings.

    Raises:
        ConfigError: it is something else, or a setting cannot work.
    """
    if isinstance(given, GrassConfig):
        return given
    if isinstance(given, Mapping):
        return GrassConfig(**{str(name): value for name, value in given.items()})
    problem = "it is neither a GrassConfig nor a dict of its settings"
    raise ConfigError(
        "config", type(given).__name__, problem, 'pass GrassConfig(active_layers=2) or {"active_layers": 2}'
    )


def check_competing(config: GrassConfig, numbers: Sequence[int], num_layers: int) -> None:
    """Checks what can only be known with the layers that compete at hand.

    Args:
        numbers: of these, in the stack of ``num_layers`` layers.

    Raises:
        ConfigError: γ is larger than their number, or a fixed layer is not among them.
    """
    check_effective(config, len(numbers))
    if config.active_layers > len(numbers):
        raise ConfigError(
            "active_layers",
            config.active_layers,
            f"{len(numbers)} of the model's {num_layers} layers compete, and the others are frozen",
            f"use 1 to {len(numbers)}, or leave requires_grad on in more layers and pass them to the optimizer",
        )
    if frozen := [i for i in config.fixed_layers if i not in numbers]:
        raise ConfigError(
            "fixed_layers",
            frozen,
            "these layers are frozen, or not in the optimizer",
            f"list layers that train: {', '.join(map(str, numbers))}",
        )


def check_effective(config: GrassConfig, competing: int) -> None:
    """
    Raises:
        ConfigError: the draws are to be as among more layers than compete.
    """
    if isinstance(wanted := config.temperature, EffectiveLayers) and wanted.effective_layers > competing:
        raise ConfigError(
            "temperature.effective_layers",
            wanted.effective_layers,
            f"{competing} layers compete",
            f"use a number from 1 to {competing}, at which draws are uniform",
        )


def parameter_budget(config: GrassConfig, sizes: Sequence[int]) -> int | None:
    """Returns `active_parameters` as a number of parameters, or None if there is no limit.

    Args:
        sizes: parameters of each layer that competes.

    Raises:
        ConfigError: the largest layer does not fit, so it could never train.
    """
    given = config.active_parameters
    if given is None:
        return None
    budget = int(given * sum(sizes)) if given < 1 else int(given)
    if budget < max(sizes):
        share = math.ceil(1e4 * max(sizes) / sum(sizes)) / 1e4
        raise ConfigError(
            "active_parameters",
            given,
            f"the largest layer has {max(sizes):,} parameters, so it could never train",
            f"use {max(sizes)} or more ({share:.2%} of those of all layers), or leave it out",
        )
    return budget


def among_competing(config: GrassConfig, numbers: Sequence[int]) -> GrassConfig:
    """``config`` with the fixed layers by their positions in ``numbers``, after `check_competing`."""
    fixed = tuple(numbers.index(i) for i in config.fixed_layers)
    return config.model_copy(update={"fixed_layers": fixed})


def check_num_layers(config: GrassConfig, num_layers: int) -> None:
    """Checks what can only be known with the model at hand: its number of layers.

    Raises:
        ConfigError: γ is larger than the number of layers, or a fixed layer does not exist.
    """
    check_effective(config, num_layers)
    if config.active_layers > num_layers:
        raise ConfigError(
            "active_layers",
            config.active_layers,
            f"the model has {num_layers} layers",
            f"use 1 to {num_layers} ({num_layers} trains them all)",
        )
    outside = [i for i in config.fixed_layers if not 0 <= i < num_layers]
    if outside:
        raise ConfigError(
            "fixed_layers", outside, f"the model has layers 0 to {num_layers - 1}", "list indices in that range"
        )


def _one_sentence(error: ValidationError, model: type[BaseModel]) -> ConfigError:
    """The first problem of a pydantic error as a `ConfigError`; how many more there are is said with it."""
    details = error.errors(include_url=False)
    first = next((one for one in details if one["type"] != "missing"), details[0])  # a wrong name tells why one lacks
    field = ".".join(str(part) for part in first["loc"] if not str(part).startswith("function-"))
    more = f" (and {len(details) - 1} more such errors)" if len(details) > 1 else ""
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        found = cause.under(field) if field else cause
        return ConfigError(found.field, found.value, found.problem, found.fix + more)
    if first["type"] == "extra_forbidden":
        names = _fields_at(model, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), names, n=1)
        fix = f"did you mean {near[0]!r}?" if near else f"the known ones are {', '.join(names)}"
        return ConfigError(field, first["input"], "there is no such setting", fix.rstrip("?") + more)
    if first["type"] == "missing":
        return ConfigError(field, None, "this setting is required", "give it a value" + more)
    if cause is not None:
        return ConfigError(field, first["input"], f"it {cause}", "give it another value" + more)
    fix = first["msg"][:1].lower() + first["msg"][1:].replace("Input", "the value").replace("input", "the value")
    return ConfigError(
        field, first["input"], "this value cannot be used", fix.replace("input should", "it should") + more
    )


def _fields_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Field names of the (nested) model that stands at ``path`` below ``model``."""
    for part in path:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        options = [annotation, *get_args(annotation)]
        nested = [t for t in options if isinstance(t, type) and issubclass(t, BaseModel)]
        if not nested:
            break
        model = nested[0]
    return [field.alias or name for name, field in model.model_fields.items()]


def slot_count(config: GrassConfig, mode: OffloadMode, num_layers: int) -> int:
    """Slots on the device in a mode that moves states; "interval" has one more where layers come before the switch."""
    if mode == "stream":
        return min(config.offload.slots, config.active_layers)
    landing = 1 if min(config.offload.prefetch_steps, config.lead) else 0
    return min(config.active_layers + landing, num_layers)
