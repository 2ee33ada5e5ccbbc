"""Compiled layers: how often dynamo must compile them, since layers are frozen and unfrozen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from torch import nn

from grass_dist.model.discovery import Unit

_Trait = tuple[str, str, Hashable]

_LIMITS = ("recompile_limit", "accumulated_recompile_limit")

VARIANTS = 6
"""Graphs of one compiled block, at most and for one shape of its input: the block is frozen or trains, and its input
needs a gradient or not, or there are no gradients at all (evaluation)."""


def is_compiled(module: nn.Module) -> bool:
    """Whether `nn.Module.compile` was called.

    Private: reads ``nn.Module._compiled_call_impl``, which it sets. Checked on torch 2.9 and 2.13;
    `tests/test_private_interfaces.py` fails when it changes.
    """
    return module._compiled_call_impl is not None


def is_wrapper_of_compile(module: nn.Module) -> bool:
    """Whether ``module`` is what `torch.compile` returns for a module."""
    return type(module).__name__ == "OptimizedModule"


def compile_layers(model: nn.Module, layers: Sequence[str], **options: Any) -> None:
    """Compiles each layer in place, and lets dynamo keep the graphs of all states of freezing.

    Layers that are alike share their graphs: as layers are drawn there are up to three, and four if what is below the
    layers is frozen. Call it before the model is wrapped and before there is an optimizer.

    Args:
        layers: their FQNs.
        options: of ``torch.compile``, such as its backend.
    """
    import torch._dynamo.config as config

    for layer in map(model.get_submodule, layers):
        layer.compile(**options)
    for name in _LIMITS:
        setattr(config, name, max(getattr(config, name), VARIANTS * len(layers)))


def compiled_whole(model: nn.Module, layers: Sequence[Unit]) -> str | None:
    """A sentence, if a compiled module holds several layers, so that each draw is another graph of all of them."""
    for name, module in model.named_modules():
        inside = sum(unit.name.startswith(f"{name}." if name else "") for unit in layers)
        if inside > 1 and (is_compiled(module) or is_wrapper_of_compile(module)):
            import torch._dynamo.config as config

            kind = type(getattr(module, "_orig_mod", module)).__name__
            return (
                f"{kind} is compiled as a whole with {inside} layers in it: each draw freezes other layers, which is "
                f"another graph, and above {config.recompile_limit} of them (torch._dynamo.config.recompile_limit) it "
                "runs uncompiled; compile its layers instead, before you make the optimizer: for layer in layers: "
                "layer.compile()."
            )
    return None


def too_low_recompile_limit(model: nn.Module, layers: Sequence[Unit]) -> str | None:
    """A sentence, if dynamo's limit is too low for the compiled blocks in ``layers``, which share their code.

    Dynamo keeps a graph for each block that differs in something that its forward reads, such as an index of the layer,
    and for each state of freezing. Above the limit it compiles no more, and runs blocks as they are.
    """
    found: defaultdict[type, dict[tuple[_Trait, ...], None]] = defaultdict(dict)
    count: defaultdict[type, int] = defaultdict(int)
    for unit in layers:
        for block in _compiled_in(model.get_submodule(unit.name)):
            found[type(block)][tuple(_traits(block))] = None
            count[type(block)] += 1
    if not found:
        return None
    import torch._dynamo.config as config

    kind, unlike = max(found.items(), key=lambda item: len(item[1]))
    need = VARIANTS * len(unlike)
    low = [f"torch._dynamo.config.{name} = {need}" for name in _LIMITS if getattr(config, name) < need]
    if len(unlike) == 1 or not low:
        return None
    first, second, *_ = unlike
    name = next(f"{where}{what}" for (where, what, a), (_, _, b) in zip(first, second, strict=False) if a != b)
    return (
        f"{count[kind]} compiled blocks of {kind.__name__} differ (by {name}). If their forward reads it, as with a "
        "key-value cache (use_cache=False leaves that out), dynamo compiles each of them again as layers are frozen "
        f"and unfrozen: set {' and '.join(low)}, or blocks run uncompiled above the limit of "
        f"{config.recompile_limit}, which with fullgraph=True is an error."
    )


def _compiled_in(layer: nn.Module) -> Iterator[nn.Module]:
    for module in layer.modules():
        if is_compiled(module):
            yield module
        elif is_wrapper_of_compile(module) and isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            yield inner


def _traits(block: nn.Module) -> Iterator[_Trait]:
    """What a graph may depend on, as (module within, name, value): plain attributes, and the shapes of weights."""
    for where, module in block.named_modules():
        at = f"{where}." if where else ""
        for name, value in sorted(vars(module).items()):
            if isinstance(value, bool | int | float | str) and name != "training" and not name.startswith("_"):
                yield at, name, value
        for name, param in module.named_parameters(recurse=False):
            yield at, name, tuple(param.shape)
