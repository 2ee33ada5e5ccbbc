"""Finds the shapes of a model's parameters, by layer and role, which is all that the planner knows of it.

No weight is ever read.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from grass_dist.config import GrassConfig
from grass_dist.errors import ConfigError, UnsupportedModel
from grass_dist.model.always import always_active_roles
from grass_dist.model.discovery import Unit, find_layers
from grass_dist.model.foreign import CODE, MOST_LAYERS, plain_config, read_settings
from grass_dist.plan.architecture import folds, is_causal, make
from grass_dist.plan.pairs import Pairs, pairs_of

Shapes = tuple[tuple[int, ...], ...]

TYPICAL = ((1.1e9, 22, 2048), (3e9, 28, 3072), (7e9, 32, 4096), (13e9, 40, 5120), (34e9, 48, 8192), (70e9, 80, 8192))
"""Parameters, layers and width of published Llama models, which ``--params`` takes where no shape is given."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a model, in elements."""

    name: str
    layers: tuple[Shapes, ...]
    """Parameter shapes of each layer that competes, in the model's order: of all stacks, of one class or several."""
    roles: Mapping[str, Shapes]
    """Parameter shapes of embeddings, final_norm, lm_head and others; tied embeddings are in embeddings alone."""
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    gated: bool
    """True if the feed-forward has a gate (Llama, Gemma, Qwen)."""
    tied: bool
    config: Any = field(repr=False, compare=False)
    """The transformers configuration, from which `simulate` builds the model."""
    causal: bool = True
    """True if a query meets only the keys before it, and `grass-dist train` trains the model."""
    frozen: Shapes = ()
    """Parameter shapes of what never trains: the language model of ESMFold."""
    pairs: Pairs | None = None
    """Sizes of a folding trunk, of ESMFold."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def layer_numel(self) -> int:
        """Elements of the largest layer."""
        return max(elements_in(layer) for layer in self.layers)

    @property
    def layers_numel(self) -> int:
        """Elements of all layers."""
        return sum(elements_in(layer) for layer in self.layers)

    @property
    def layers_matrices(self) -> int:
        """Elements of the matrices of all layers, which are what they multiply by."""
        return sum(math.prod(s) for layer in self.layers for s in layer if len(s) >= 2)

    @property
    def trained_numel(self) -> int:
        """Elements of what trains in full fine-tuning."""
        return self.layers_numel + sum(map(elements_in, self.roles.values()))

    @property
    def numel(self) -> int:
        return self.trained_numel + elements_in(self.frozen)


def elements_in(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)


def shape_of_model(name: str, tell: Callable[[str], None] = lambda _: None) -> ModelShape:
    """Returns the shape of a Hugging Face model, a folder, a ``config.json`` or ``packaged:smollm2-135m``.

    Code that comes with it is not run: a model that transformers does not know itself is refused.

    Args:
        tell: called with a sentence where transformers' own class stands for such code.

    Raises:
        ConfigError: there is no such model.
        UnsupportedModel: it has no layer stack.
    """
    return shape_of_config(name, _load(name, tell))


def shape_of_params(
    params: float,
    *,
    layers: int | None = None,
    hidden: int | None = None,
    intermediate: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    vocab: int = 32000,
    tied: bool = False,
) -> ModelShape:
    """Returns the shape of a Llama of ``params`` parameters.

    Args:
        params: those of the whole model; the width of the feed-forward follows from it, unless it is given.
        layers, hidden: None takes those of the published Llama whose size is nearest.
        heads: None takes heads of 128 entries each (64 where the width has no such divisor).

    Raises:
        ConfigError: no model has such sizes.
    """
    from transformers import LlamaConfig

    given = {"--layers": layers, "--hidden": hidden, "--intermediate": intermediate, "--heads": heads}
    for option, value in {**given, "--kv-heads": kv_heads, "--vocab": vocab}.items():
        if value is not None:
            check_whole(option, value, MOST_LAYERS if option == "--layers" else 2**24)
    near = min(TYPICAL, key=lambda entry: abs(math.log(entry[0] / params)))
    layers, hidden = layers or near[1], hidden or near[2]
    heads = heads or max(1, hidden // (128 if hidden % 128 == 0 else 64))
    if hidden % heads:
        raise ConfigError("--heads", heads, f"it does not divide --hidden={hidden}", "use a divisor")
    kv_heads = kv_heads or heads
    if heads % kv_heads:
        raise ConfigError("--kv-heads", kv_heads, f"it does not divide the {heads} heads", "use a divisor")
    if intermediate is None:
        attention = 2 * hidden * hidden + 2 * hidden * (hidden // heads) * kv_heads
        left = params - vocab * hidden * (1 if tied else 2) - hidden
        intermediate = round((left / layers - attention - 2 * hidden) / (3 * hidden) / 64) * 64
        if intermediate < 64:
            fix = "use fewer --layers or a smaller --hidden, or more parameters"
            problem = f"{layers} layers of width {hidden} with a vocabulary of {vocab} have more"
            raise ConfigError("--params", f"{params:.4g}", problem, fix)
    if hidden // heads % 2:
        problem = f"with {heads} heads each is {hidden // heads} wide, and rotary positions turn pairs"
        raise ConfigError("--hidden", hidden, problem, "use a multiple of twice the --heads")
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
    )
    return shape_of_config(f"Llama of {params / 1e9:.3g}B", config)


def check_whole(option: str, value: int, largest: int) -> None:
    """Checks a whole number.

    Raises:
        ConfigError: ``value`` is no whole number from 1 to ``largest``.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(option, value, "it is no whole number", f"use one from 1 to {largest}")
    if value < 1:
        raise ConfigError(option, value, "it is below 1", "use a whole number above 0")
    if value > largest:
        raise ConfigError(option, value, f"it is above {largest}", "use a smaller number")


def parse_count(option: str, text: str) -> float:
    """Reads a number of parameters, e.g. 70B, 135M or 6.74e9."""
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?(?:E\+?\d{1,2})?)\s*([KMBT]?)\s*", text.upper(), re.ASCII)
    value = float(found[1]) * 1000 ** " KMBT".index(found[2] or " ") if found else 0.0
    if not 1e4 <= value <= 1e14:
        raise ConfigError(option, text, "this is no number of parameters", "write e.g. 70B or 135M")
    return value


def shape_of_config(name: str, config: Any) -> ModelShape:
    """Returns the shape of the model of a transformers configuration.

    Several stacks compete as they do in training: of the slots and gradients, each is as large as the largest layer.

    Raises:
        ConfigError: the model cannot be built of it.
        UnsupportedModel: the model has no layer stack, reads something else than tokens, or has a second stack that
            does (a vision tower).
        ConfigError: what has no role is too large to train at every step.
    """
    try:
        model = make(config, torch.bfloat16, "meta")
    except UnsupportedModel:
        raise
    except Exception as error:  # whatever the class of a model makes of a broken configuration
        reason = " ".join(str(error).split())[:150]
        raise ConfigError("--model", name, f"it cannot be built ({reason})", "give another model") from None
    found = find_layers(model)
    if len(found.stacks) > 1 and not config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{name}: a plan of several lists of layers is of an encoder-decoder that reads tokens, and here are "
            f"{found.stack}, whose memory depends on what else they read; give the number of parameters by --params."
        )
    text = config.get_text_config()
    hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
    roles = always_active_roles(model, found, GrassConfig())
    trained = {id(p) for unit in (*found.layers, *roles) for _, p in unit.params}
    layer = _shapes(found.layers[0])
    inner = _inner_width(text, layer, hidden)
    width = getattr(text, "head_dim", None) or getattr(text, "d_kv", None)
    return ModelShape(
        name=name,
        layers=tuple(_shapes(unit) for unit in found.layers),
        roles={unit.name: _shapes(unit) for unit in roles},
        hidden=hidden,
        intermediate=inner,
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(width or hidden // heads),
        vocab=int(text.vocab_size),
        gated=sum(inner in shape for shape in layer if len(shape) == 2) >= 3,
        tied="lm_head" not in {unit.name for unit in found.roles},
        config=config,
        causal=is_causal(config),
        frozen=tuple(tuple(p.shape) for p in model.parameters() if id(p) not in trained),
        pairs=pairs_of(config) if folds(config) else None,
    )


def _shapes(unit: Unit) -> Shapes:
    return tuple(tuple(param.shape) for _, param in unit.params)


def _inner_width(config: Any, layer: Shapes, hidden: int) -> int:
    """Width of the feed-forward, as configured, else the commonest other dimension of the layer's matrices."""
    for key in ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "encoder_ffn_dim"):
        if isinstance(value := getattr(config, key, None), int):
            return value
    widths = Counter(d for shape in layer if len(shape) == 2 for d in shape if d > hidden)
    return max(widths, key=lambda d: widths[d], default=4 * hidden)


def _load(name: str, tell: Callable[[str], None]) -> Any:
    from transformers import PreTrainedConfig

    from grass_dist.model.packaged import resolve_model

    path = Path(resolve_model(name))
    fix = "give a Hugging Face name, a folder with a config.json, such a file, or --params"
    try:
        if path.exists():
            settings = read_settings(path / "config.json" if path.is_dir() else path)
        else:
            settings, _ = PreTrainedConfig.get_config_dict(name)
        config = plain_config(settings)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:  # `ForeignModel` among them
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        reason = reason if len(reason) <= 160 else reason[:157] + "..."
        raise ConfigError("--model", name, f"there is no such model here ({reason})", fix) from None
    if CODE in settings:
        tell(f"{name} comes with code of its own, which is not run: the plan is that of transformers' own class.")
    return config
