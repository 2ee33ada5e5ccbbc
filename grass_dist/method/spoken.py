"""What a run says of itself: at its start, at the end of the probe, and at each switch."""

from __future__ import annotations

from collections.abc import Sequence

from grass_dist.config import EffectiveLayers, GrassConfig
from grass_dist.events import Started
from grass_dist.model.units import shown_names

_DRAWN = {
    "grass": "drawn by gradient norms",
    "grass-static": "drawn by the gradient norms of the probe",
    "weight-norm": "drawn by weight norms",
    "uniform": "drawn evenly",
    "cyclic": "in turn",
    "random-cyclic": "in turn, in a random order",
    "without-replacement": "in turn, each once before any comes again",
    "middle": "the middle ones",
    "fixed": "always the same",
}

_DEFAULTS = {name: GrassConfig.model_fields[name].default for name in ("temperature", "exploration")}


def about_run(config: GrassConfig, started: Started, probing: int) -> str:
    """The sentence of a start.

    Args:
        probing: steps of the probe.
    """
    layers, of = len(started.layers), started.num_layers
    competing = "" if layers == of else f" ({layers} compete)"
    drawn = _DRAWN.get(config.sampler, f"drawn by the sampler {config.sampler!r}")
    drawn += about_evenness(config)
    probe = f"probe until step {probing}, in which nothing is updated" if probing else "no probe"
    count, limit = f"{config.active_layers}", config.active_parameters
    if limit is not None:
        count = f"up to {count}"
        most = f"{100 * limit:.3g} % of their" if limit < 1 else f"{limit:,}"
        competing += f", with at most {most} parameters,"
    return (
        f"GRASS: {count} of {of} layers{competing} train at a time ({shown_names(started.stacks)}), {drawn}; {probe}; "
        f"{about_trained(started)}."
    )


def about_evenness(config: GrassConfig) -> str:
    """How even draws by importances are made, where the user sets it, or that this has no effect; else nothing."""
    wanted, explored = config.temperature, config.exploration
    if "norms" not in _DRAWN.get(config.sampler, "norms"):
        idle = [f"grass.{name}" for name in _DEFAULTS if getattr(config, name) != _DEFAULTS[name]]
        return f" ({' and '.join(idle)} without effect)" if idle else ""
    parts = []
    if isinstance(wanted, EffectiveLayers):
        parts.append(f"as uneven as among {wanted.effective_layers:g}")
    if explored:
        parts.append(f"{100 * explored:.3g} % of it even")
    return f" ({', '.join(parts)})" if parts else ""


def about_trained(started: Started) -> str:
    """What trains at every step, and what never does."""
    roles = ", ".join(_role(role, started.layers) for role in started.roles.items())
    left = f"; not in this optimizer: {shown_names(started.left_out)}" if started.left_out else ""
    return f"always training: {roles or 'nothing'}; frozen for good: {_frozen(started)}{left}"


def _role(role: tuple[str, Sequence[str]], layers: Sequence[str]) -> str:
    name, params = role
    if name != "others":
        return name
    shown: dict[str, None] = {}
    for param in params:
        module = param.rpartition(".")[0]
        around = module and any(layer.startswith(f"{module}.") for layer in layers)  # the layers, too: no name of it
        shown[param if around or not module else module] = None
    return f"{name} ({shown_names(list(shown))})"


def _frozen(started: Started) -> str:
    if not started.frozen:
        return "nothing"
    together = "together " if len(started.frozen) > 1 else ""
    return f"{shown_names(started.frozen)} ({together}{100 * started.frozen_share:.2g} %)"


def about_layers(numbers: Sequence[int], step: int, round: int, probed: bool) -> str:
    """The sentence of a switch.

    Args:
        numbers: of the layers that train from now on, in the model's stack.
        step: optimizer steps completed.
        probed: whether the probe has just ended.
    """
    shown = [str(number) for number in numbers]
    named = ", ".join(shown) if len(shown) <= 40 else f"{', '.join(shown[:40])} and others"
    ended = f"the probe has ended after step {step}; " if probed else ""
    train = f"layer {named} trains" if len(shown) == 1 else f"layers {named} train"
    return f"GRASS: {ended}{train} from step {step + 1} on (round {round})."


def about_idle(names: Sequence[str], of: int) -> str:
    """The sentence at the end of a probe, if some layers had no gradient in it.

    Args:
        names: theirs.
        of: number of layers that compete.
    """
    return (
        f"{len(names)} of {of} layers had no gradient in any step of the probe ({shown_names(names)}): no batch has "
        "used them, or nothing of their output is in the loss. They are drawn all the same, and learn nothing then: "
        "freeze them (grass.freeze), or name the stack that your batches train by layers=."
    )


def about_woken(names: Sequence[str], step: int) -> str:
    """The sentence where someone else has unfrozen parameters.

    Args:
        names: theirs.
        step: optimizer steps completed.
    """
    return (
        f"{len(names)} parameters of the optimizer were unfrozen before step {step + 1} and are frozen again "
        f"({shown_names(names)}): layers train when they are drawn, and what did not train at the start needs another "
        "optimizer, made after optimizer.detach()."
    )


def about_unmeasured(step: int) -> str:
    """The sentence of a step of the probe without a backward, after ``step`` steps."""
    return (
        f"optimizer.step() was called in the probe after {step} steps, and no backward had given a gradient: it "
        "measures nothing and is no step of the probe; such calls are counted in grass.skipped."
    )
