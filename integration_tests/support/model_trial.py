"""One class of transformers, built tiny and trained for some steps: in plain PyTorch, then with GRASS."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from grass_dist import GrassConfig, GrassError, GrassOptimizer, find_layers
from grass_dist.events import Started
from grass_dist.model.units import choose_units
from integration_tests.support.tiny_batches import Maker, find_batch, loss_of
from integration_tests.support.tiny_configs import recipes

LARGEST = 80_000_000
"""Elements of the largest model that is tried."""

SEEN = 1e-6
"""A gradient from which AdamW changes a weight near 1 in fp32."""

INPUT_GRADS = "model.enable_input_require_grads()"
_WAYS = 6

PLAIN_STEPS, STEPS = 2, 8
SETTINGS: dict[str, Any] = {"active_layers": 2, "probe_steps": 2, "sampling_interval": 2, "update_interval": 2}

WORKS, WITH_WAY, NO_WAY = "works", "works as the refusal says", "refused, and its way does not work"
SILENT, SAID, BARE, WRONG = "silent", "frozen, and said", "bare error", "wrong"
NO_BLOCKS, UNBUILT, UNTRAINED = "no blocks", "not built", "does not train in plain PyTorch"
VERDICTS = (WORKS, WITH_WAY, NO_BLOCKS, NO_WAY, SAID, SILENT, BARE, WRONG, UNBUILT, UNTRAINED)
NOT_COUNTED = (UNBUILT, UNTRAINED)


@dataclass
class Outcome:
    """What became of a class."""

    kind: str
    family: str
    name: str
    verdict: str = UNBUILT
    detail: str = ""
    stacks: list[str] = field(default_factory=list)
    layers: int = 0
    batch: str = ""
    way: dict[str, Any] = field(default_factory=dict)
    released: str = ""  # of one that is refused: whether it starts at the sizes of its default configuration
    numel: int = 0


class Wrong(Exception):
    """A check of the training failed."""


def build(model_class: type, config: Any, kind: str) -> nn.Module:
    """The model with the same random weights at each call."""
    torch.manual_seed(0)
    own = copy.deepcopy(config)
    parts = [own, *(part for name in getattr(own, "sub_configs", {}) if (part := getattr(own, name, None)) is not None)]
    for part in parts:
        if kind.endswith("classification"):
            part.num_labels = 3
        if hasattr(part, "problem_type"):
            part.problem_type = None
        part._attn_implementation = "eager"
    return model_class(own).float().train()


def try_class(outcome: Outcome, model_class: type, fixes: Mapping[str, Any]) -> None:
    """Fills in what became of it."""
    problems: list[str] = []
    for number, config in enumerate(recipes(model_class.config_class, fixes, problems)):  # type: ignore[attr-defined]
        try:
            with torch.device("meta"):
                numel = sum(p.numel() for p in build(model_class, config, outcome.kind).parameters())
        except Exception:
            # Some compute while they are made; then only the real one says whether it can be made.
            numel = 0 if number < 2 else LARGEST + 1
        if numel > LARGEST:
            problems.append(f"{numel / 1e6:.0f} million elements")
            continue
        try:
            model = build(model_class, config, outcome.kind)
        except Exception as error:
            problems.append(f"{type(error).__name__}: {str(error)[:200]}")
            continue
        outcome.verdict = UNTRAINED
        try:
            maker = find_batch(model, outcome.kind)
        except Exception as error:
            problems.append(str(error))
            continue
        outcome.batch, outcome.numel = maker.note, sum(p.numel() for p in model.parameters())
        moving = _with_gradient(model, maker)
        del model
        _compare(outcome, model_class, config, maker, moving)
        return
    outcome.detail = " || ".join(dict.fromkeys(problems))[:900]


def _compare(outcome: Outcome, model_class: type, config: Any, maker: Maker, moving: set[str]) -> None:
    """Trains with GRASS, and after each refusal with what it says."""
    told: list[str] = []
    for _ in range(_WAYS):
        try:
            missing, started = _train_anew(outcome, model_class, config, maker, moving)
        except GrassError as error:
            told.append(str(error))
            outcome.released = outcome.released or _at_default_sizes(model_class)
            if (way := way_of(str(error), outcome.way)) is None:
                outcome.verdict = NO_BLOCKS if str(error).endswith('set layers="FQN of the layer stack".') else NO_WAY
                break
            outcome.verdict, outcome.way = NO_WAY, way
        except Wrong as error:
            outcome.verdict, told = WRONG, [*told, str(error)]
            break
        except Exception as error:
            outcome.verdict, told = BARE, [*told, f"{type(error).__name__}: {str(error)[:300]}"]
            break
        else:
            silent = [name for name in missing if not _is_said(name, started)]
            fine = WITH_WAY if outcome.way else SAID if missing else WORKS
            outcome.verdict = SILENT if silent else fine
            if missing:
                told.append(f"not trained: {(silent or missing)[:6]} of {len(missing)}")
            break
    outcome.detail = " || ".join(told)


def _train_anew(
    outcome: Outcome, model_class: type, config: Any, maker: Maker, moving: set[str]
) -> tuple[list[str], Started]:
    """Returns what trains in plain PyTorch and not here, and what the start has said."""
    model = build(model_class, config, outcome.kind)
    settings = dict(outcome.way)
    if settings.pop(INPUT_GRADS, False):
        model.enable_input_require_grads()  # type: ignore[operator]
    optimizer = GrassOptimizer(
        model,
        torch.optim.AdamW,
        {"lr": 1e-3, "weight_decay": 0.0},
        config=GrassConfig(**{**SETTINGS, **settings}),
    )
    assert optimizer.grass.started is not None
    outcome.stacks, outcome.layers = list(optimizer.grass.started.stacks), len(optimizer.grass.layers)
    missing = _missing(model, optimizer, moving)
    _train(model, optimizer, maker, moving)
    return missing, optimizer.grass.started


def _at_default_sizes(model_class: type) -> str:
    """Whether a run would start at the sizes of the default configuration, with default settings."""
    try:
        with torch.device("meta"):
            model = model_class(model_class.config_class())  # type: ignore[attr-defined]
        choose_units(model, find_layers(model), GrassConfig(), [{"params": list(model.parameters())}])
    except GrassError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"not built: {type(error).__name__}"
    return "starts"


def way_of(told: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a refusal says that works, on top of the settings so far."""
    found: dict[str, Any] = {}
    if layers := re.search(r'layers="(?!FQN)([^"]+)"', told):
        found["layers"] = layers[1]
    elif layers := re.search(r"layers=\[([^\]]+)\]", told):
        found["layers"] = re.findall(r"[\"']([^\"']+)[\"']", layers[1])
    if count := re.search(r"active_layers=(\d+)", told):
        found["active_layers"] = int(count[1])
    if told.startswith("always_active") or "name them in always_active" in told:
        before = settings.get("always_active", ("embeddings", "final_norm", "lm_head", "others"))
        found["always_active"] = tuple(dict.fromkeys((*before, *re.findall(r"'([^']+)'", told.rpartition("e.g. ")[2]))))
    if "enable_input_require_grads" in told:
        found[INPUT_GRADS] = True
    merged = {**settings, **found}
    return merged if found and merged != dict(settings) else None


def _with_gradient(model: nn.Module, maker: Maker) -> set[str]:
    """Names of the parameters that train in plain PyTorch: those that get a gradient in one of some batches."""
    names: set[str] = set()
    for step in range(PLAIN_STEPS):
        loss_of(model, maker(step)).backward()
        names |= {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.ne(0).any())}
        model.zero_grad()
    return names


def _missing(model: nn.Module, optimizer: GrassOptimizer, moving: set[str]) -> list[str]:
    units = (*optimizer.grass.layers, *optimizer.grass.roles)
    trains = {id(p) for unit in units for _, p in unit.params}
    return [name for name, p in model.named_parameters() if name in moving and id(p) not in trains]


def _is_said(name: str, started: Started) -> bool:
    return any(f"{name}.".startswith(f"{said}.") for said in started.frozen)


def _train(model: nn.Module, optimizer: GrassOptimizer, maker: Maker, moving: set[str]) -> None:
    """
    Raises:
        Wrong: a loss is not finite; or something moved that is frozen; or something did not that trains.
    """
    for step in range(STEPS):
        phase = optimizer.grass.phase
        active = [optimizer.grass.layers[index] for index in optimizer.grass.active_layers]
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        loss = loss_of(model, maker(step % PLAIN_STEPS))
        if not torch.isfinite(loss):
            raise Wrong(f"the loss of step {step} is {loss.item()}")
        loss.backward()
        grads = {n for n, p in model.named_parameters() if p.grad is not None and bool((p.grad.abs() > SEEN).any())}
        optimizer.step()
        optimizer.zero_grad()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        if phase == "probe":
            if moved:
                raise Wrong(f"moved in the probe: {sorted(moved)[:4]}")
            continue
        for problem in _problems(active, optimizer, grads, moved, moving):
            raise Wrong(f"step {step}: {problem}")


def _problems(
    active: list[Any], optimizer: GrassOptimizer, grads: set[str], moved: set[str], moving: set[str]
) -> Iterator[str]:
    trains = {name for unit in (*active, *optimizer.grass.roles) for name, _ in unit.params}
    if moved - trains:
        yield f"moved though frozen: {sorted(moved - trains)[:4]}"
    if grads & trains - moved:
        yield f"has a gradient and did not move: {sorted(grads & trains - moved)[:4]}"
    for unit in (*active, *optimizer.grass.roles):
        names = {name for name, _ in unit.params}
        if names & moving and not names & moved:
            yield f"{unit.name} trains and did not move"
