"""Writes the page of a run: its key figures, pictures, layers, answers and configuration in one HTML file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from grass_dist.config import GrassConfig, slot_count
from grass_dist.errors import GrassError
from grass_dist.method.importance import effective_layers
from grass_dist.method.schedule import too_short_for
from grass_dist.report.drawing import byte_unit
from grass_dist.report.load import AnswerEvent, EvalEvent, RunInfo, RunRecord, StepEvent, relative
from grass_dist.report.wire import Sent, sent


@dataclass(frozen=True, slots=True)
class Numbers:
    """The numbers behind the key figures; None where the record does not say."""

    steps: int
    probe_steps: int
    tokens_per_second: float | None
    trained_params: float
    """Parameters that train in a step: the active layers, on average, and what is always active."""
    share: float
    """`trained_params` over all parameters."""
    bytes_train: float | None
    """Gradient bytes that a training step reduces, on average."""
    bytes_probe: float | None
    """Gradient bytes that a step of the probe, which measures every layer, reduces."""
    bytes_sent: Sent | None
    """Bytes that the reductions of a training step send; None on one host."""
    state_peak: int | None
    state_full: float | None
    """Bytes of optimizer state if every parameter trained, with as many bytes as a trained one has."""
    host_peak: int
    bytes_to_device: int
    weights_to_device: int
    bytes_to_host: int
    copying: float
    """Seconds in which copies ran, both directions added up."""
    waiting: float
    """Seconds in which training waited for a copy."""
    switching: float
    """Seconds in which the host switched layers."""
    switches: int
    training: float
    """Seconds of all training steps."""
    first_eval: EvalEvent | None
    last_eval: EvalEvent | None


@dataclass(frozen=True, slots=True)
class Card:
    """A key figure as the page shows it."""

    label: str
    value: str
    note: str


@dataclass(frozen=True, slots=True)
class LayerRow:
    """A line of the table of layers."""

    index: int
    name: str
    numel: int
    times_trained: int
    staleness: int | None
    """Steps since it trained last."""
    importance: float | None
    probability: float | None


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """A prompt, and what the model answered to it before and after the training."""

    prompt: str
    expected: str | None
    before: str | None
    after: str | None


def render(run: RunRecord, pictures: Mapping[str, Path | None]) -> str:
    """Returns the whole page, with the pictures inside it."""
    found = numbers(run)
    told = {"moves": _moves(found), "probability": _evenness(run), "cost": lanes(run)}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        info=run.info,
        facts=_facts(run),
        trains=_trains(run),
        notes=[*run.notes, *untrained(run)],
        cards=cards(found, run),
        pictures={name: path and _data_url(path) for name, path in pictures.items()},
        told=told,
        layers=layer_rows(run),
        answers=pair_answers(run),
        config_text=run.config_text,
    )


def numbers(run: RunRecord) -> Numbers:
    """Computes the key figures. Without a training step, the share is that of γ layers of average size."""
    info, train, probe = run.info, run.train_steps, run.probe_steps
    trained = [sum(info.layer_numel[i] for i in step.active_layers) + info.params_always_active for step in train]
    active = info.grass.get("active_layers")
    expected = sum(info.layer_numel) * (active if isinstance(active, int) else info.num_layers) / info.num_layers
    mean_trained = sum(trained) / len(trained) if trained else expected + info.params_always_active
    seconds = sum(step.seconds for step in train)
    return Numbers(
        steps=run.steps[-1].step if run.steps else 0,
        probe_steps=len(probe),
        tokens_per_second=sum(step.tokens for step in train) / seconds if seconds > 0 else None,
        trained_params=mean_trained,
        share=mean_trained / info.params_total,
        bytes_train=sum(step.bytes_reduced for step in train) / len(train) if train else None,
        bytes_probe=sum(step.bytes_reduced for step in probe) / len(probe) if probe else None,
        bytes_sent=_sent(info, sum(step.bytes_reduced for step in train) / len(train)) if train else None,
        state_peak=max((step.state_bytes for step in train), default=None),
        state_full=_full_state(run, trained),
        host_peak=max((step.host_state_bytes for step in train), default=0),
        bytes_to_device=sum(step.bytes_to_device for step in run.steps),
        weights_to_device=sum(step.weight_bytes_to_device for step in run.steps),
        bytes_to_host=sum(step.bytes_to_host for step in run.steps),
        copying=sum(step.transfer_seconds for step in run.steps),
        waiting=sum(step.wait_seconds for step in run.steps),
        switching=sum(step.switch_seconds for step in run.steps),
        switches=sum(step.switch_seconds > 0 for step in run.steps),
        training=seconds,
        first_eval=run.evals[0] if run.evals else None,
        last_eval=run.evals[-1] if run.evals else None,
    )


def _full_state(run: RunRecord, trained: Sequence[int]) -> float | None:
    """Bytes of the states of all parameters, at the bytes a parameter that the record shows; None if it shows none.

    Args:
        trained: parameters that trained in each of the training steps.
    """
    info, train = run.info, run.train_steps
    if slots := _slots(run):
        room = info.params_always_active + slots * max(info.layer_numel)
        return train[0].state_bytes / room * info.params_total
    # The least of them are of the first steps, when nothing has a state but what trains.
    rates = [(s.state_bytes + s.host_state_bytes) / n for s, n in zip(train, trained, strict=True) if n]
    return min(rates) * info.params_total if rates else None


def _slots(run: RunRecord) -> int:
    """Number of layers for whose states the device has room at all times; 0 where states stay, or it is not known."""
    moved = any(step.bytes_to_device + step.bytes_to_host for step in run.steps)
    try:
        config = GrassConfig(**run.info.grass)
    except (GrassError, TypeError):  # of another version
        return 0
    mode = config.offload.mode or "interval"
    if not moved or not run.train_steps or mode not in ("interval", "stream"):
        return 0
    return slot_count(config, mode, run.info.num_layers - len(run.info.frozen_layers))


def cards(found: Numbers, run: RunRecord) -> list[Card]:
    """Returns the row of key figures."""
    limit = run.info.train.get("max_steps")
    planned = f" of {limit:,}" if isinstance(limit, int) and limit != found.steps else ""
    rate = found.tokens_per_second
    share = f"{_count_text(found.trained_params)} of {_count_text(run.info.params_total)}"
    return [
        _loss_card(found.first_eval, found.last_eval),
        Card("Steps", f"{found.steps:,}{planned}", f"{found.probe_steps:,} of them the probe"),
        _speed_card(rate, run),
        Card("Parameters trained at a time", _percent(found.share), f"{share}, counting those outside the layers"),
        _bytes_card(found),
        _state_card(found),
    ]


def layer_rows(run: RunRecord) -> list[LayerRow]:
    """Returns the table of layers, with the last importance over the mean and the last probability."""
    info = run.info
    unknown: list[float | None] = [None] * info.num_layers
    importances = relative(run.refreshes[-1].importances) if run.refreshes else unknown
    events = run.probability_events()
    probabilities = events[-1].probabilities if events else unknown
    trained, stale = run.times_trained(), run.staleness()
    columns = (info.layer_names, info.layer_numel, trained, stale, importances, probabilities)
    return [LayerRow(index, *row) for index, row in enumerate(zip(*columns, strict=True))]


def pair_answers(run: RunRecord) -> list[AnswerPair]:
    """Returns one entry for each prompt, in the order of the record; the last answer to a prompt counts."""
    said: dict[str, dict[str, AnswerEvent]] = {}
    for answer in run.answers:
        said.setdefault(answer.prompt, {})[answer.when] = answer
    pairs = []
    for prompt, by_time in said.items():
        texts = [by_time[when].text if when in by_time else None for when in ("before", "after")]
        expected = [answer.expected for answer in by_time.values() if answer.expected is not None]
        pairs.append(AnswerPair(prompt, expected[0] if expected else None, *texts))
    return pairs


def _loss_card(first: EvalEvent | None, last: EvalEvent | None) -> Card:
    label = "Held-out loss"
    if first is None or last is None:
        return Card(label, "—", "no evaluation was recorded")
    if first.step == last.step:
        return Card(label, _loss_text(first.loss), f"at step {first.step:,} only")
    change = f", {last.loss / first.loss - 1:+.1%}".replace("-", "−") if first.loss and last.loss else ""
    found = [(name, getattr(first, name), getattr(last, name)) for name in ("perplexity", "accuracy", "f1")]
    more = [f"{name} {a:.3g} → {b:.3g}" for name, a, b in found if a is not None and b is not None]
    note = "; ".join([f"steps {first.step:,} and {last.step:,}{change}", *more])
    return Card(label, f"{_loss_text(first.loss)} → {_loss_text(last.loss)}", note)


def _bytes_card(found: Numbers) -> Card:
    label = "Gradients reduced a step"
    if found.bytes_train is None:
        return Card(label, "—", "no training step was recorded")
    if not found.bytes_train:
        return Card(label, "0", "nothing is reduced, as in a run on one process")
    note = f"by parameters, {_percent(found.share)} of full fine-tuning"
    if found.bytes_probe:
        measured = _percent(found.bytes_train / found.bytes_probe)
        note = f"{measured} of the {_bytes_text(found.bytes_probe)} that a probe step reduces; {note}"
    if found.bytes_sent:
        within, across = map(_bytes_text, astuple(found.bytes_sent))
        note = f"{note}; all ranks send {within} within hosts and {across} across them, as rings do"
    return Card(label, _bytes_text(found.bytes_train), note)


def _sent(info: RunInfo, reduced: float) -> Sent | None:
    if len(set(info.hosts)) < 2 or len(info.hosts) % info.replicate:
        return None
    return sent(reduced, info.hosts, replicate=info.replicate, whole=info.backend == "ddp")


def _state_card(found: Numbers) -> Card:
    label = "Optimizer state a rank"
    if found.state_peak is None or found.state_full is None:
        return Card(label, "—", "no training step was recorded")
    rest = f" on the device, and up to {_bytes_text(found.host_peak)} in host memory" if found.host_peak else ""
    note = f"peak{rest}; full fine-tuning would hold {_bytes_text(found.state_full)} at the same bytes a parameter"
    return Card(label, _bytes_text(found.state_peak), note)


def _speed_card(rate: float | None, run: RunRecord) -> Card:
    """The tokens that the model reads where the record has them, else the targets; and FLOPs if they are known."""
    note = "in training steps; evaluation is left out"
    read = _over_time(run.train_steps, "tokens_per_second")
    if (flops := _over_time(run.train_steps, "flops_per_second")) is not None:
        note = f"{flops / 1e12:.3g} TFLOP/s; {note}"
        if (mfu := _over_time(run.train_steps, "mfu")) is not None:
            note = f"{_percent(mfu)} of the peak of the GPUs, {note}"
    rate = rate if read is None else read
    return Card("Tokens a second", _count_text(rate) if rate else "—", note)


def _over_time(steps: Sequence[StepEvent], field: str) -> float | None:
    """Mean of a rate over the time of the steps that have it; None if none has."""
    known = [(value, s.seconds + (s.data_seconds or 0)) for s in steps if (value := getattr(s, field)) is not None]
    seconds = sum(took for _, took in known)
    return sum(value * took for value, took in known) / seconds if seconds > 0 else None


def lanes(run: RunRecord) -> str:
    """Says in a sentence what the time of the training steps went to; nothing if the record does not tell."""
    steps = [s for s in run.train_steps if s.data_seconds is not None and s.backward_seconds is not None]
    whole = sum(s.seconds + (s.data_seconds or 0) for s in steps)
    if whole <= 0:
        return ""
    backward, update, data = (
        sum(getattr(s, f"{lane}_seconds") or 0.0 for s in steps) / whole for lane in ("backward", "update", "data")
    )
    rest = max(0.0, 1 - backward - update - data)
    return (
        f"Of the time of the training steps, {_percent(backward)} went to forward and backward, {_percent(update)} to "
        f"clipping, updates and switches, {_percent(data)} to waiting for data, and {_percent(rest)} to the rest."
    )


def _moves(found: Numbers) -> str:
    """Says what moving states and switching layers has cost this rank."""
    return " ".join(told for told in (_copies(found), _switches(found)) if told)


def _switches(found: Numbers) -> str:
    if not (found.switches and found.training):
        return ""
    times = "1 switch of layers" if found.switches == 1 else f"{found.switches:,} switches of layers"
    share = 100 * found.switching / found.training
    return f"{times} took {_time_text(found.switching)} of the host, {share:.2g}% of the time of the training steps."


def _copies(found: Numbers) -> str:
    if not found.bytes_to_device + found.bytes_to_host + found.weights_to_device:
        return ""
    ways = f"moved {_bytes_text(found.bytes_to_device)} to the device and {_bytes_text(found.bytes_to_host)} back"
    if found.weights_to_device:
        ways += f", and {_bytes_text(found.weights_to_device)} of weights to the device"
    if not found.copying:
        return f"This rank {ways}."
    hidden = 100 * max(0.0, 1 - found.waiting / found.copying)
    share = f"{hidden:.0f}%" if hidden < 99 else f"{min(hidden, 99.9):.1f}%" if found.waiting else "100%"
    waited = f"waited {_time_text(found.waiting)} in all" if found.waiting else "never waited"
    return f"This rank {ways}; {share} of the copying time ran beside the compute; training {waited}."


def _evenness(run: RunRecord) -> str:
    """Says how far the last probabilities are from those of a uniform draw; nothing if they are uniform."""
    events = run.probability_events()
    known = [p for p in events[-1].probabilities if p is not None] if events else []
    if abs(sum(known) - 1) > 1e-6 or min(known) <= 0 or max(known) - min(known) < 1e-9:
        return ""
    among = f"a uniform draw among {effective_layers(known):.3g} of {run.info.num_layers} layers"
    told = (
        f"The last probabilities have the entropy of {among}; the largest is {_times(max(known) / min(known))} times "
    )
    temperature = run.info.grass.get("temperature")
    hint = f" A grass.temperature below {temperature:g} sharpens them." if isinstance(temperature, int | float) else ""
    if isinstance(temperature, Mapping) and isinstance(wanted := temperature.get("effective_layers"), int | float):
        hint = f" grass.temperature asks for {wanted:.3g}."
    explored = run.info.grass.get("exploration")
    if isinstance(explored, int | float) and explored:
        hint += f" A share of {explored:.3g} of it is a uniform draw (grass.exploration)."
    return f"{told}the smallest.{hint}"


def _times(ratio: float) -> str:
    return f"{ratio:.3g}" if ratio < 1e6 else "over a million"


def untrained(run: RunRecord) -> list[str]:
    """Returns the note on layers that a finished run did not reach."""
    if run.begins_at > 1:
        return []  # what trained before is not known
    frozen = set(run.info.frozen_layers)
    never = [layer for layer, times in enumerate(run.times_trained()) if not times and layer not in frozen]
    compete = run.info.num_layers - len(frozen)
    told = too_short_for(never, compete, str(run.info.grass.get("sampler"))) if run.end else None
    return [told] if told else []


def _facts(run: RunRecord) -> str:
    data, versions = run.info.data, run.info.versions or {}
    examples = [f"{data[key]:,} {what}" for key, what in _EXAMPLES.items() if isinstance(data.get(key), int)]
    named = f"data {data['name']}" if "name" in data else ""
    parts = [
        f"{named} ({', '.join(examples)})" if named and examples else named or ", ".join(examples),
        f"started {run.info.started}" if run.info.started else "",
        f"took {_time_text(run.end.seconds)}" if run.end else "",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    return " · ".join(part for part in parts if part)


def _trains(run: RunRecord) -> str:
    """Returns what the start of the run said of its layers and of what never trains."""
    facts = run.info.trains or {}
    told, stacks = facts.get("told"), facts.get("stacks")
    if not isinstance(told, str):
        return ""
    names = [name for name in stacks if isinstance(name, str)] if isinstance(stacks, list) else []
    return f"Layers of {' and '.join(names) or 'the model'} · {told}"


_EXAMPLES = {"train_examples": "training examples", "eval_examples": "held out"}


def _data_url(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


def _loss_text(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if share < 0.0995 else f"{100 * share:.0f}%"


def _bytes_text(count: float) -> str:
    scale, unit = byte_unit(count)
    return f"{count / scale:.3g} {unit}"


def _count_text(count: float) -> str:
    for scale, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M")):
        if count >= scale:
            return f"{count / scale:.4g}{unit}"
    return f"{count:,.0f}"


def _time_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    if minutes:
        return f"{minutes} min {rest:02d} s"
    return f"{seconds:.1f} s" if seconds >= 0.1 or not seconds else f"{1000 * seconds:.2g} ms"
