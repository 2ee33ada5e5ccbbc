"""Adapters (LoRA of `peft`) on the layers: adding them, finding them, their parameter groups, and merging them.

`peft` is imported where adapters are added. A model that has adapters already has imported it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from grass_dist.config import ADAPTERS, AdapterConfig, GrassConfig
from grass_dist.errors import ConfigError, GrassError, UnsupportedModel
from grass_dist.model.discovery import LayerMap, find_layers
from grass_dist.model.names import matches, near
from grass_dist.model.units import is_quantised

NAME = "grass"
"""Name of the adapter that `add_adapters` adds."""

_OF_PEFT = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "modules_to_save")
"""Children of a module of peft that hold what it adds."""


def add_adapters(model: nn.Module, config: GrassConfig) -> nn.Module:
    """Adds LoRA to the layers as ``config.adapters`` says, in place; without the section it does nothing.

    Call it on every rank before the model is wrapped (DDP, `fully_shard`) and before the optimizer is made. The
    adapters begin alike on all ranks: they depend on ``config.seed``, and add nothing at first. ``requires_grad`` of
    all other parameters stays as it is. A second call does nothing.

    Returns:
        The same model.

    Raises:
        ConfigError: the section does not fit the model, or the model has other adapters already.
        UnsupportedModel: the layers are quantised.
        GrassError: peft is not installed.
    """
    wanted = config.adapters
    if wanted is None:
        return model
    if names_of_adapters(model) == [NAME]:
        _check_added(adapter_config(model), wanted)
        return model
    peft = _peft()
    if names := names_of_adapters(model):
        raise ConfigError(
            "adapters",
            wanted.model_dump(),
            f"the model has adapters of peft already ({', '.join(names)})",
            "leave grass.adapters out and list adapters in always_active, or give the model without adapters",
        )
    targets = _targets(model, find_layers(model, config.layers), wanted)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    lora = peft.LoraConfig(
        r=wanted.rank, lora_alpha=wanted.alpha, lora_dropout=wanted.dropout, target_modules=_pattern(model, targets)
    )
    with torch.random.fork_rng({p.device.index for p in model.parameters() if p.device.type == "cuda"}):
        torch.manual_seed(config.seed)  # of all devices: peft makes adapters where the weights are
        peft.inject_adapter_in_model(lora, model, adapter_name=NAME)
    for param, flag in flags:
        param.requires_grad_(flag)
    dtypes = {id(layer): layer.get_base_layer().weight.dtype for _, layer in lora_layers(model)}
    for _, layer in lora_layers(model):  # peft makes them fp32, and wrappers want one dtype in a layer
        for _, param in _added_by(layer):
            param.data = param.data.to(dtypes[id(layer)])
    return model


def remove_adapters(model: nn.Module) -> None:
    """Takes off what `add_adapters` has added, without merging it."""
    for name, layer in list(lora_layers(model)):
        model.set_submodule(name, layer.get_base_layer())
    if "peft_config" in vars(model):
        del model.peft_config


def merge_adapters(model: nn.Module) -> nn.Module:
    """Adds the adapters that `add_adapters` has added to the weights, in place, and takes them off.

    The model is then an ordinary one, whose ``save_pretrained`` writes an ordinary folder. It must have whole weights:
    of one process or of DDP, not of FSDP2 or ZeRO-3.

    Returns:
        The same model.

    Raises:
        GrassError: a weight is sharded.
    """
    for name, layer in list(lora_layers(model)):
        if any(p.numel() == 0 or type(p.data) is not torch.Tensor for p in layer.parameters()):
            raise GrassError(
                f"{name} is sharded, and adapters are merged into whole weights: save a checkpoint and run "
                "grass-dist export, or gather the weights."
            )
        layer.merge()
    remove_adapters(model)
    return model


def layers_of(model: nn.Module, config: GrassConfig, params: Iterable[nn.Parameter] | None = None) -> LayerMap:
    """`find_layers` with what adapters add as a role, where ``config`` wants it to be one."""
    added = {id(p) for _, p in adapter_parameters(model)} if config.trains_adapters else ()
    return find_layers(model, config.layers, params, added=added)


def adapter_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What peft has added to a model, by FQN, in the model's order: adapters, and copies of modules to save."""
    added = {id(p) for module in _modules_of_peft(model) for _, p in _added_by(module)}
    return [(name, p) for name, p in model.named_parameters() if id(p) in added]


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The LoRA layers of a model, by FQN."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
            yield name, module


def adapter_config(model: nn.Module) -> Any:
    """The `LoraConfig` of what `add_adapters` has added; None where it has added nothing."""
    return next((configs[NAME] for configs in _configs(model) if NAME in configs), None)


def names_of_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that peft has added to a model."""
    found = [c for m in model.modules() if isinstance(c := getattr(m, "peft_config", None), Mapping)]
    return list(dict.fromkeys(str(name) for configs in found for name in configs))


def begin_adapters(model: nn.Module, config: GrassConfig) -> str | None:
    """Checks the adapters of a model that brings them along, where they are to be a role, and unfreezes base weights.

    peft has frozen all base weights. Those of the layers and of the roles in ``always_active`` get ``requires_grad``
    back, unless somebody has unfrozen weights of layers since. Call it before `freeze_named` and after `add_adapters`.

    Returns:
        A sentence on what was unfrozen, or None.

    Raises:
        ConfigError, UnsupportedModel: the model has no such adapters, or others than one LoRA.
    """
    if not config.trains_adapters:
        return None
    check_adapters(model)
    if names_of_adapters(model) == [NAME]:
        return None
    found = layers_of(model, config)
    replaced = {id(p) for m in _modules_of_peft(model) for p in _original(m)}
    layers = [p for unit in found.layers for _, p in unit.params if id(p) not in replaced]
    if any(p.requires_grad for p in layers):
        return None
    roles = [p for unit in found.roles if unit.name in config.always_active for _, p in unit.params]
    if "others" in config.always_active:
        roles += found.others
    woken = [p for p in (*layers, *roles) if p.is_floating_point() and id(p) not in replaced and not p.requires_grad]
    for param in woken:
        param.requires_grad_(True)
    return (
        f"adapters is in always_active, so the weights under the adapters train when their layer is drawn: "
        f"{len(woken)} parameters that peft had frozen have requires_grad again."
    )


def check_adapters(model: nn.Module) -> None:
    """
    Raises:
        ConfigError: the model has no adapters.
        UnsupportedModel: it has several, or some that are not LoRA, or its base is quantised.
    """
    names = names_of_adapters(model)
    if not names:
        raise ConfigError(
            "always_active",
            ADAPTERS,
            "the model has no adapters of peft",
            "give a PeftModel, or set grass.adapters={'rank': 16, 'alpha': 32}, which adds them",
        )
    if len(names) > 1:
        raise UnsupportedModel(
            f"The model has {len(names)} adapters ({', '.join(names)}), and one can be a role: delete the others "
            f"(model.delete_adapter({names[-1]!r})), or merge them first."
        )
    kinds = {str(getattr(c[names[0]].peft_type, "value", "")) for c in _configs(model)}
    if odd := sorted(kinds - {"LORA"}):
        raise UnsupportedModel(
            f"The adapter {names[0]} is {odd[0]}, and adapters that train beside the layers' own weights must be LoRA: "
            "use peft.LoraConfig (DoRA and rsLoRA too), or leave adapters out of always_active."
        )
    for name, layer in lora_layers(model):
        base = layer.get_base_layer()
        weight = getattr(base, "weight", None)
        if not torch.is_tensor(weight) or not weight.is_floating_point() or weight.dtype.itemsize == 1:
            of = weight.dtype if torch.is_tensor(weight) else type(base).__name__
            raise UnsupportedModel(
                f"The weights under the adapters are quantised ({name} is of {of}), and would train when their layer "
                "is drawn: load the model without quantization, or leave adapters out of always_active (and "
                "grass.adapters), so that adapters are all that trains."
            )


def split_groups(groups: Sequence[dict[str, Any]], model: nn.Module, config: GrassConfig) -> list[dict[str, Any]]:
    """Gives the adapters of ``config.adapters`` a parameter group of their own, at the end, with their learning rate.

    They are taken out of the groups that hold other parameters too, and keep the settings of these; those in no group
    get one, without settings. A group that holds adapters alone is left as it is.

    Args:
        groups: whose ``params`` are lists of parameters, or of pairs of name and parameter.
    """
    if config.adapters is None:
        return list(groups)
    rate = {} if config.adapters.learning_rate is None else {"lr": config.adapters.learning_rate}
    added = dict.fromkeys(id(p) for _, p in adapter_parameters(model))
    kept, apart, held = [], [], set()
    for group in groups:
        mine = [entry for entry in group["params"] if id(_tensor(entry)) in added]
        held.update(id(_tensor(entry)) for entry in mine)
        if not mine or len(mine) == len(group["params"]):
            kept.append(group)
            continue
        own = set(map(id, mine))
        kept.append({**group, "params": [entry for entry in group["params"] if id(entry) not in own]})
        apart.append({**group, **rate, "params": mine})
    if lacking := [p for _, p in adapter_parameters(model) if id(p) not in held]:
        named = any(isinstance(entry, tuple) for group in groups for entry in group["params"])
        names = {id(p): name for name, p in model.named_parameters()}
        apart.append({**rate, "params": [(names[id(p)], p) if named else p for p in lacking]})
    return [*kept, *apart]


def split_in(optimizer: torch.optim.Optimizer, model: nn.Module, config: GrassConfig) -> None:
    """Does in an optimizer what `split_groups` does, before it has a scheduler.

    Raises:
        ConfigError: it has a scheduler, which would not know of the groups.
    """
    split = split_groups(optimizer.param_groups, model, config)
    if len(split) == len(optimizer.param_groups):
        return
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise ConfigError(
            "adapters",
            config.adapters and config.adapters.model_dump(),
            "the optimizer has a scheduler already, which would know nothing of the parameter group of the adapters",
            "call grass_dist.add_adapters(model, config) first, and make the optimizer over "
            "grass_dist.adapter_groups(model, config)",
        )
    for group, left in zip(optimizer.param_groups, split, strict=False):
        group["params"] = left["params"]
    for group in split[len(optimizer.param_groups) :]:
        optimizer.add_param_group(group)


def adapter_groups(
    model: nn.Module, config: GrassConfig, params: Iterable[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer that is made before its scheduler, with the adapters in their own.

    Args:
        model: with adapters, see `add_adapters`.
        params: parameter groups; None is one group of all parameters.
    """
    given = [{"params": list(model.parameters())}] if params is None else params
    return split_groups([{**group, "params": list(group["params"])} for group in given], model, config)


def merged(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, *, transposed: bool = False
) -> torch.Tensor:
    """The weight that does what ``weight`` and its adapter do together: weight + scale · b @ a.

    Args:
        weight: (out, in), or (in, out) where ``transposed``.
        a: (rank, in).
        b: (out, rank).

    Returns:
        A tensor of the shape and dtype of ``weight``. 16-bit tensors are added in fp32.
    """
    delta = scale * (b.float() @ a.float())
    return (weight.float() + (delta.T if transposed else delta)).to(weight.dtype)


def merged_weights(model: nn.Module, whole: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of ``model`` with the adapters of `add_adapters` merged, under the names of the plain model.

    Args:
        whole: unsharded weights by FQN, or nothing on a rank that does not write.
    """
    if not whole:
        return {}
    left, renamed = dict(whole), dict[str, str]()
    for name, layer in lora_layers(model):
        a, b = left.pop(f"{name}.lora_A.{NAME}.weight"), left.pop(f"{name}.lora_B.{NAME}.weight")
        key = f"{name}.base_layer.weight"
        turned = bool(getattr(layer, "fan_in_fan_out", False))
        left[key] = merged(left[key], a, b, layer.scaling[NAME], transposed=turned)
        under = f"{name}.base_layer."
        renamed |= {n: plain_name(n, name) for n in (f"{under}weight", f"{under}bias")}
    return {renamed.get(name, name): tensor for name, tensor in left.items()}


def plain_name(key: str, module: str) -> str:
    """The name in the plain model of a weight that is under the adapter of ``module``."""
    return key.replace(f"{module}.base_layer.", f"{module}.", 1)


def _check_added(added: Any, wanted: AdapterConfig) -> None:
    """
    Raises:
        ConfigError: the adapters of an earlier `add_adapters` are others than those that are wanted now.
    """
    pairs = {"rank": (added.r, wanted.rank), "alpha": (added.lora_alpha, wanted.alpha)}
    pairs["dropout"] = added.lora_dropout, wanted.dropout
    for name, (there, here) in pairs.items():
        if there != here:
            problem = f"the model was given adapters of {name}={there} by add_adapters"
            raise ConfigError(f"adapters.{name}", here, problem, "use the same GrassConfig, or another model")


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise GrassError("grass.adapters needs peft: pip install 'grass-dist[adapters]'.") from error
    return peft


def _tensor(entry: Any) -> Any:
    return entry[1] if isinstance(entry, tuple) else entry


def _configs(model: nn.Module) -> list[Mapping[str, Any]]:
    return [c for m in model.modules() if isinstance(c := getattr(m, "peft_config", None), Mapping) and c]


def _modules_of_peft(model: nn.Module) -> list[nn.Module]:
    """The modules that peft has put around others: layers with adapters, and modules of which it trains a copy."""
    if "peft" not in sys.modules:
        return []
    return [
        m
        for m in model.modules()
        if (hasattr(m, "base_layer") and hasattr(m, "lora_A")) or (hasattr(m, "modules_to_save") and _original(m))
    ]


def _added_by(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in module.named_parameters() if n.partition(".")[0] in _OF_PEFT]


def _original(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of a module that peft trains a copy of: nothing uses them."""
    original = module._modules.get("original_module")
    return [] if original is None else list(original.parameters())


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # of transformers


def _targets(model: nn.Module, found: LayerMap, wanted: AdapterConfig) -> list[str]:
    """FQNs of the modules that get an adapter.

    Raises:
        ConfigError: there is none, or the rank is above a dimension of one.
        UnsupportedModel: the layers are quantised.
    """
    inside = [
        (unit.name, name)
        for unit in found.layers
        for name, module in model.get_submodule(unit.name).named_modules(prefix=unit.name)
        if _is_linear(module)
    ]
    names = list(dict.fromkeys(name for _, name in inside))
    for unit in found.layers:
        buffers = [(f"{unit.name}.{n}", b) for n, b in model.get_submodule(unit.name).named_buffers() if b.ndim > 1]
        for name, tensor in (*unit.params, *buffers):
            if is_quantised(tensor):
                raise UnsupportedModel(
                    f"The layers are quantised ({name} is of {tensor.dtype}), and their weights would train beside "
                    "grass.adapters: load the model without quantization, or give a PeftModel without grass.adapters, "
                    "whose adapters are all that trains."
                )
    if wanted.target != "all-linear":
        local = {name: name.removeprefix(f"{layer}.") for layer, name in inside}
        for pattern in wanted.target:
            if not any(_is_named(local[name], pattern) for name in names):
                problem = "no linear module of the layers has that name"
                raise ConfigError("adapters.target", pattern, problem, near(pattern, local.values(), ("all-linear",)))
        names = [name for name in names if any(_is_named(local[name], pattern) for pattern in wanted.target)]
    if not names:
        given = wanted.target if wanted.target == "all-linear" else list(wanted.target)
        problem = "it names no linear module of the layers"
        raise ConfigError("adapters.target", given, problem, "use 'all-linear', or leave grass.adapters out")
    for name in names:
        weight: Any = model.get_submodule(name).weight
        shape = tuple(getattr(weight, "ds_shape", weight.shape))
        if wanted.rank > min(shape):
            problem = f"{name} has a weight of {' x '.join(map(str, shape))}"
            fix = f"use {min(shape)} or less, or name modules in adapters.target"
            raise ConfigError("adapters.rank", wanted.rank, problem, fix)
    return names


def _is_named(local: str, pattern: str) -> bool:
    """Whether a module in a layer has this name, as its last part, as its whole name or by a pattern."""
    return local == pattern or local.endswith(f".{pattern}") or matches(pattern, local)


def _pattern(model: nn.Module, targets: Collection[str]) -> str:
    """A regular expression of the names of modules, which matches these and no others."""
    parts = [re.sub(r"\\?\.\d+(?=\\?\.)", r"\\.\\d+", re.escape(name)) for name in targets]
    short = "|".join(dict.fromkeys(parts))
    wanted = set(targets)
    if all((re.fullmatch(short, name) is not None) == (name in wanted) for name, _ in model.named_modules()):
        return short
    return "|".join(map(re.escape, targets))
