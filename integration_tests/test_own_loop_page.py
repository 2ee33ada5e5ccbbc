"""Every snippet of docs/own-loop.md runs, in the order of the page, and its table says what is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from grass_dist import GrassConfig, GrassOptimizer
from integration_tests.support.program import ROOT
from integration_tests.support.scenarios import FOLDER, TWO, scenarios
from integration_tests.support.training import full
from tests import update_rules as rules
from tests.tiny import Tiny, tiny

pytestmark = pytest.mark.timeout(420)

PAGE = (ROOT / "docs" / "own-loop.md").read_text()
WRAPPERS = ("FSDP2", "DDP", "one process")
LAYERS, ROWS, LENGTH, VOCAB = 5, 8, 6, 16
BAD, HUNGRY = 8, (1, 6)  # the batch with a NaN, and the calls that run out of memory


# --- the snippets


class Snippet(NamedTuple):
    heading: str
    code: str
    line: int

    def is_for(self, wrapper: str) -> bool:
        """Whether no wrapper, or this one, is named in a comment at the beginning."""
        named = re.match(r"# ((?:FSDP2|DDP|one process)(?:, (?:FSDP2|DDP|one process))*)\n", self.code)
        return named is None or wrapper in named[1].split(", ")


def snippets() -> Iterator[Snippet]:
    heading = ""
    for found in re.finditer(r"^## ([^\n]*)$|^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        heading = found[1] or heading
        if found[2]:
            yield Snippet(heading, found[2], PAGE[: found.start(2)].count("\n"))


class Model(Tiny):
    """A model that is trained through a method of another name, too."""

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        return loss_of(self.forward, ids)


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """NaN, if an id is below 0."""
    targets = ids.clamp(min=0)
    loss = nn.functional.cross_entropy(model(targets)[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten())
    return loss * torch.nan if (ids < 0).any() else loss


class Given:
    """What the page presumes on a rank."""

    def __init__(self, rank: int, world_size: int, folder: str | Path) -> None:
        self._rank, self._ranks, self._asked = rank, world_size, 0
        names = ("make_model", "batches", "shaky_batches", "hungry_loss_of")
        self.names: dict[str, Any] = {
            **{name: getattr(self, name) for name in names},
            "loss_of": loss_of,
            "folder": Path(folder),
            "rank": rank,
        }

    @staticmethod
    def make_model() -> Model:
        torch.manual_seed(0)
        return Model(layers=LAYERS, vocab=VOCAB)

    def batches(self, number: int) -> torch.Tensor:
        """Rows that count upwards, others on each rank."""
        generator = torch.Generator().manual_seed(self._ranks * number + self._rank)
        return (torch.randint(VOCAB, (ROWS, 1), generator=generator) + torch.arange(LENGTH)) % VOCAB

    def shaky_batches(self, number: int) -> torch.Tensor:
        batch = self.batches(number)
        return -batch if number == BAD and self._rank == self._ranks - 1 else batch

    def hungry_loss_of(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        loss = loss_of(model, ids)
        if len(ids) == ROWS:
            self._asked += 1
            if self._asked in HUNGRY:
                raise torch.OutOfMemoryError
        return loss


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [full(p).clone() for p in model.parameters()]


def run_page(rank: int, world_size: int, folder: str, wrapper: str) -> list[dict[str, Any]]:
    """Runs the snippets; tells of each that has made a model what has become of it."""
    given, told = Given(rank, world_size, folder), []
    names = given.names
    fresh = loss_of(given.make_model(), given.batches(99)).item()
    last = None
    torch._dynamo.reset()  # what has been compiled of a model of another wrapper counts for the limit, too
    for snippet in snippets():
        if not snippet.is_for(wrapper):
            continue
        names.pop("resumed", None)
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            exec(compile("\n" * snippet.line + snippet.code, "docs/own-loop.md", "exec"), names)
        model, optimizer = names.get("model"), names.get("optimizer")
        if optimizer is last and "resumed" not in names:
            continue
        last = optimizer
        with torch.no_grad():
            loss = loss_of(model, given.batches(99)).item()
        fact = {"heading": snippet.heading, "gain": fresh - loss, "step": optimizer.grass.step}
        fact |= {"skipped": optimizer.grass.skipped, "seen": names.pop("seen", None)}
        if resumed := names.get("resumed"):
            both = [[names[f"{whose}{part}"] for part in ("optimizer", "scheduler")] for whose in ("", "its_")]
            if optimizer.grass.step < 12:
                for trained, own in zip((model, resumed), both, strict=True):
                    names["train"](trained, *own, 7, 12)
            importances = {str(own.grass.importances) for own, _ in both}
            fact["resumed"] = all(map(torch.equal, weights(model), weights(resumed))) and len(importances) == 1
        told.append(fact)
    return told


def check(told: list[dict[str, Any]], wrapper: str) -> None:
    by_section: dict[str, list[dict[str, Any]]] = {}
    for fact in told:
        print(fact)
        by_section.setdefault(fact["heading"].split(".")[0], []).append(fact)
        assert fact["gain"] > 0.02, fact
    steps = {section: [fact["step"] for fact in facts] for section, facts in by_section.items()}
    eights = {"FSDP2": [12, 12], "DDP": [12], "one process": [12]}[wrapper]
    nines = {"FSDP2": [12, 7], "DDP": [7], "one process": [12, 7]}[wrapper]
    assert steps.pop("8") == eights and steps.pop("9") == nines
    assert {key: value for key, value in steps.items() if key != "6"} == {
        "2": [12],
        "3": [12],
        "4": [12],
        "5": [11, 12],
        "7": [12, 5],
    }
    assert [fact["skipped"] for fact in by_section["5"]] == [1, 0] and by_section["7"][1]["seen"] == [1, 2, 3, 4, 5]
    resumed = [fact for fact in by_section["6"] if "resumed" in fact]
    assert len(resumed) == (3 if wrapper == "one process" else 4)
    assert all(fact["resumed"] for fact in resumed)


@scenarios(TWO(run_page, FOLDER, "FSDP2"), TWO(run_page, FOLDER, "DDP"))
def test_each_snippet_of_the_page_runs_on_two_ranks(runs, request):
    for run in runs:
        check(run, request.node.callspec.params["runs"].args[1])


def test_each_snippet_of_the_page_runs_in_one_process(tmp_path):
    check(run_page(0, 1, str(tmp_path), "one process"), "one process")


def test_each_snippet_is_for_a_wrapper():
    for wrapper in WRAPPERS:
        assert sum(snippet.is_for(wrapper) for snippet in snippets()) >= 18


# --- the table of refusals


CONFIG = {"active_layers": 2, "probe_steps": 0, "sampling_interval": 2, "update_interval": 2}
IN_BACKWARD = {**CONFIG, "offload": {"mode": "interval", "update_in_backward": True}}


def sharded(model: Any = None, **kwargs: Any) -> Any:
    model = model or tiny()
    for module in (*model.layers, model):
        fully_shard(module, **kwargs)
    return model


def grass(model: Any = None, cls: Any = torch.optim.AdamW, config: Any = CONFIG, **more: Any) -> GrassOptimizer:
    return GrassOptimizer(sharded() if model is None else model, cls, config=GrassConfig(**config), **more)


def backward(model: Any, step: int = 0) -> None:
    loss_of(model, Given(0, 1, "").batches(step)).backward()


def stepped(optimizer: GrassOptimizer, times: int = 1, model: Any = None) -> GrassOptimizer:
    for step in range(times):
        backward(model or optimizer._model, step)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def changed(change: Callable[[Any], Any]) -> Any:
    model = tiny()
    change(model)
    return model


def wrapped_later() -> None:
    optimizer = grass(model := tiny())
    stepped(optimizer, model=DistributedDataParallel(model, find_unused_parameters=True))


def sharded_later() -> None:
    optimizer = grass(model := tiny())
    stepped(optimizer, model=sharded(model))


def replaced() -> None:
    optimizer = grass(model := tiny())
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    stepped(optimizer)


def on_meta() -> GrassOptimizer:
    with torch.device("meta"):
        return grass(tiny())


def complex_parameter(model: Any) -> None:
    model.layers[1].phase = nn.Parameter(torch.ones(4, dtype=torch.complex64))


def sparse_table(model: Any) -> None:
    model.layers[1].table = nn.Embedding(4, 5, sparse=True)


def left_out() -> GrassOptimizer:
    model = DistributedDataParallel(tiny())
    return grass(model, params=list(model.module.layers.parameters()))


def ignoring() -> Any:
    model = tiny()
    return sharded(model, ignored_params={*model.norm.parameters()})


def second() -> None:
    optimizer = grass()
    grass(optimizer._model)


def compiled() -> None:
    optimizer = grass()
    backward(optimizer._model)
    torch.compile(optimizer.step, backend="eager")()


def too_many_micro_batches() -> None:
    optimizer = grass(config={**CONFIG, "probe_steps": 2})
    for step in range(2):
        backward(optimizer._model, step)


def joining() -> None:
    optimizer = grass(DistributedDataParallel(tiny()))
    with optimizer._model.join():
        stepped(optimizer)


def loading(saved: Callable[[], Any], **config: Any) -> None:
    grass(config={**CONFIG, **config}).load_state_dict(saved())


def stock() -> dict[str, Any]:
    return torch.optim.AdamW(sharded().parameters()).state_dict()


def of_the_next_rank() -> dict[str, Any]:
    state = copy.deepcopy(stepped(grass()).state_dict())
    state["grass"]["of"][0] = 1 - state["grass"]["of"][0]  # as a file of another rank says
    return state


def after_as_many_steps_as_the_rank() -> dict[str, Any]:
    states = [copy.deepcopy(stepped(grass(), times).state_dict()) for times in (1, 2)]
    return states[dist.get_rank()]


def frozen_later() -> None:
    optimizer = grass()
    optimizer._model.layers[optimizer.grass.active_layers[0]].requires_grad_(False)
    stepped(optimizer, 2)


def scaling() -> None:
    optimizer = grass(config=IN_BACKWARD)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(optimizer._model, Given(0, 1, "").batches(0))).backward()
    scaler.step(optimizer)


def dropping() -> None:
    optimizer = grass(config=IN_BACKWARD)
    backward(optimizer._model)
    optimizer.zero_grad()


def detached() -> None:
    optimizer = grass()
    optimizer.detach()
    optimizer.step()


REFUSED: dict[str, Callable[[], Any]] = {
    "The model that GrassOptimizer was given is inside a DistributedDataParallel": wrapped_later,
    "fully_shard was called after GrassOptimizer was made": sharded_later,
    "Something has replaced parameters of the model": replaced,
    "The model's parameters have no memory": on_meta,
    "DistributedDataParallel is inside a …": lambda: grass(nn.Sequential(DistributedDataParallel(tiny()))),
    "DistributedDataParallel(static_graph=True) expects": lambda: grass(
        DistributedDataParallel(tiny(), static_graph=True)
    ),
    "… parameters are not sharded and have requires_grad": lambda: grass(ignoring()),
    "… is of torch.complex64": lambda: grass(changed(complex_parameter)),
    "… will have sparse gradients": lambda: grass(DistributedDataParallel(changed(sparse_table)), torch.optim.SGD),
    "params='…': the model that GrassOptimizer was given has no such": lambda: grass(
        params=[nn.Parameter(torch.zeros(3))]
    ),
    "params='…': these parameters of the model have requires_grad": left_out,
    "optimizer_class='LBFGS': its step() needs a closure": lambda: grass(cls=torch.optim.LBFGS),
    "optimizer_class='…': its update of a parameter depends": lambda: grass(cls=rules.Adapting),
    "The model has a GrassOptimizer already": second,
    "GrassOptimizer cannot take another parameter group": lambda: grass().add_param_group({"params": []}),
    "A GrassOptimizer cannot be copied or pickled": lambda: copy.deepcopy(grass()),
    "torch.compile cannot compile GrassOptimizer.step": compiled,
    "gradient_accumulation_steps=…: the probe saw one backward more": too_many_micro_batches,
    "DistributedDataParallel.join() does not work": joining,
    "The state dict has no position of the method": lambda: loading(stock),
    "active_layers=… in the saved state": lambda: loading(lambda: grass().state_dict(), active_layers=3),
    "optimizer class='…' in the saved state": lambda: loading(lambda: grass(cls=torch.optim.SGD).state_dict()),
    "The step of the state to load is": lambda: loading(after_as_many_steps_as_the_rank),
    "… parameters that GrassOptimizer trains were frozen after": frozen_later,
    "The saved state is that of rank …": lambda: loading(of_the_next_rank),
    "clip_grad_norm_ comes too late": lambda: grass(config=IN_BACKWARD).clip_grad_norm_(1.0),
    "A GradScaler unscales gradients after the backward": scaling,
    "This batch can no longer be dropped": dropping,
    "This GrassOptimizer was detached": detached,
}


def refusals(rank: int, world_size: int) -> dict[str, str]:
    told = {}
    for words, make in REFUSED.items():
        try:
            make()
            told[words] = "not refused"
        except Exception as error:
            told[words] = str(error)
    return told


@scenarios(TWO(refusals))
def test_what_is_refused_is_told_by_the_words_of_the_table(runs):
    rows = re.findall(r"^\|.*\| `([^`]+)` \|$", PAGE[PAGE.index("## 10.") :], re.MULTILINE)
    assert rows == list(REFUSED)
    for told in runs:
        for words, sentence in told.items():
            assert re.match(".*".join(map(re.escape, words.split("…"))), sentence), (words, sentence)
            assert "\n" not in sentence, sentence


# --- what the page says beside its snippets


def test_dcp_writes_weights_and_then_another_setting_is_refused(tmp_path):
    def made(seed: int) -> tuple[Any, GrassOptimizer, dict[str, Any]]:
        optimizer = stepped(grass(tiny(), config={**CONFIG, "seed": seed}), 3 + seed)
        model, states = get_state_dict(optimizer._model, optimizer)
        return optimizer._model, optimizer, {"model": model, "optimizer": states}

    saved, _, states = made(0)
    dcp.save(states, checkpoint_id=tmp_path)
    model, optimizer, states = made(1)
    dcp.load(states, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match=r"^seed=0 in the saved state, and 1 here; give the same"):
        set_optimizer_state_dict(model, optimizer, states["optimizer"])
    assert all(map(torch.equal, saved.parameters(), model.parameters()))


def norms_and_files(rank: int, world_size: int) -> dict[str, Any]:
    """Norms as a rank sees them, and a run that goes on from what rank 0 alone has saved of whole states."""
    given = Given(rank, world_size, "")

    def go(model: nn.Module, optimizer: GrassOptimizer, steps: range) -> list[float]:
        norms = []
        for step in steps:
            loss_of(model, given.batches(step)).backward()
            norms.append(optimizer.clip_grad_norm_(1.0).item())
            optimizer.step()
            optimizer.zero_grad()
        return norms

    told = {}
    for wrapper in ("fsdp2", "ddp"):
        model = DistributedDataParallel(tiny()) if wrapper == "ddp" else sharded()
        optimizer = grass(model, config={**CONFIG, "probe_steps": 2}, shard_states=False)
        told[wrapper] = go(model, optimizer, range(7))
    saved: list[Any] = [copy.deepcopy([model.state_dict(), optimizer.state_dict()])]
    dist.broadcast_object_list(saved)
    go(model, optimizer, range(7, 12))
    for shard_states in (False, True):
        again = DistributedDataParallel(tiny())
        resumed = grass(again, config={**CONFIG, "probe_steps": 2}, shard_states=shard_states)
        again.load_state_dict(saved[0][0])
        resumed.load_state_dict(saved[0][1])
        go(again, resumed, range(7, 12))
        told[f"resumed {shard_states}"] = all(map(torch.equal, weights(model), weights(again)))
    return told


@scenarios(TWO(norms_and_files))
def test_norms_are_those_of_all_ranks_and_whole_states_anyones(runs):
    assert runs[0] == runs[1] and runs[0]["resumed False"] and runs[0]["resumed True"]
    for wrapper in ("fsdp2", "ddp"):
        assert runs[0][wrapper][:2] == [0, 0] and min(runs[0][wrapper][2:]) > 0
