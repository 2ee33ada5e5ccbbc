"""The data of the next steps is prepared ahead: the same data, in the same order, with its errors in their place."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grass_dist.errors import ConfigError
from grass_dist.finetune.data.ahead import Ahead
from grass_dist.finetune.data.batches import Examples, collate
from grass_dist.finetune.data.config import DataConfig
from grass_dist.finetune.feed import Feed
from grass_dist.record.speed import Positions

EXAMPLES = Examples({"input_ids": [i] * (1 + i % 5), "labels": [i] * (1 + i % 5)} for i in range(23))


class Task:
    """Adds the step and the place in the global batch to each example's ids, as masks depend on them."""

    reads_files = False

    def __init__(self) -> None:
        self.threads: set[str] = set()

    def vary(self, example: dict[str, list[int]], step: int, place: int) -> dict[str, list[int]]:
        self.threads.add(threading.current_thread().name.split("_")[0])
        return {**example, "input_ids": [i + 1000 * step + 100 * place for i in example["input_ids"]]}

    def collate(self, examples: Any) -> dict[str, torch.Tensor]:
        return collate(examples, 0)


def feed(ahead: int, first: int = 1, rank: int = 0, device: str = "cpu", task: Any = None, **data: Any) -> Feed:
    sizes = {"seed": 3, "global_batch_size": 8, "micro_batch_size": 2}
    train = SimpleNamespace(max_steps=12, model_dump=lambda include: sizes)
    settings = SimpleNamespace(prefetch_steps=ahead, group_by_length=False, streaming=False, **data)
    world: Any = SimpleNamespace(rank=rank, size=2, device=torch.device(device), together=lambda work: work())
    config: Any = SimpleNamespace(train=train, data=settings)
    return Feed(config, SimpleNamespace(train=EXAMPLES), task or Task(), world, first)  # type: ignore[arg-type]


def taken(source: Feed, steps: int) -> list[list[dict[str, Any]]]:
    found = [source.take() for _ in range(steps)]
    source.close()
    return [[{name: t.tolist() for name, t in batch.items()} for batch in step.batches] for step in found]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_step_gets_does_not_depend_on_what_is_prepared(rank: int):
    plain, ahead = Task(), Task()
    alone = taken(feed(0, rank=rank, task=plain), 12)
    assert taken(feed(2, rank=rank, task=ahead), 12) == alone == taken(feed(50, rank=rank), 12)
    assert taken(feed(2, first=8, rank=rank), 5) == alone[7:]  # in the middle of an epoch
    assert ahead.threads == {"data"} and plain.threads == {"MainThread"}


def test_a_step_has_its_positions_and_padding():
    step = feed(1).take()
    longest = [batch["input_ids"].shape for batch in step.batches]
    padded = sum(int((batch["attention_mask"] == 0).sum()) for batch in step.batches)
    positions = Positions(sum(r * n for r, n in longest), padded, sum(r * n * n for r, n in longest))
    assert step.positions == positions and step.arrived is None


def test_so_many_are_ready_and_none_after_the_last():
    made: list[int] = []
    ahead = Ahead(lambda step: made.append(step) or step, 3, 7, 2)  # type: ignore[func-returns-value]
    assert made == []  # nothing before the first is asked for
    assert ahead.take() == 3
    ahead.settle()
    assert made == [3, 4, 5]
    assert [ahead.take() for _ in range(4)] == [4, 5, 6, 7]
    ahead.settle()
    assert made == [3, 4, 5, 6, 7]
    ahead.close()


@pytest.mark.parametrize("steps", [0, 3])
def test_an_error_is_raised_at_its_own_step(steps: int):
    def prepare(step: int) -> int:
        if step == 3:
            raise ConfigError("data.name", "x", "line 3 is broken", "mend it")
        return step

    ahead = Ahead(prepare, 1, 5, steps)
    assert [ahead.take(), ahead.take()] == [1, 2]
    ahead.settle()  # not here
    with pytest.raises(ConfigError, match="line 3 is broken"):
        ahead.take()
    ahead.close()


def test_closing_waits_for_what_is_under_way():
    began, goes_on, ended = threading.Event(), threading.Event(), []

    def prepare(step: int) -> int:
        if step > 1:
            began.set()
            goes_on.wait(10)
            ended.append(step)
        return step

    ahead = Ahead(prepare, 1, 9, 4)
    ahead.take()
    began.wait(10)
    threading.Timer(0.05, goes_on.set).start()
    ahead.close()
    assert ended == [2]  # the others are not begun


def test_data_is_copied_on_a_stream_and_waited_for(monkeypatch: pytest.MonkeyPatch):
    """On a GPU that notes what it is asked: the compute waits for the copies, which have a stream of their own."""
    calls: list[Any] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            calls.append(("enter", self.name))

        def __exit__(self, *_: Any) -> None:
            calls.append(("exit", self.name))

        def wait_event(self, event: Any) -> None:
            calls.append(("wait", self.name, event.of))

    class Event:
        of = ""

        def record(self, stream: Stream) -> None:
            self.of = stream.name
            calls.append(("record", stream.name))

    compute, stock = Stream("compute"), torch.Tensor.to

    def to(self: torch.Tensor, device: Any, **how: Any) -> torch.Tensor:
        calls.append(("copy", str(device), how, getattr(self, "pinned", False)))
        return stock(self, "cpu")

    def pin(self: torch.Tensor) -> torch.Tensor:
        pinned = self.clone()
        pinned.pinned = True  # type: ignore[attr-defined]
        return pinned

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(f"data of {device}"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: Stream(f"device {device}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: calls.append(("used", stream.name)))
    source = feed(0, device="cuda:1")
    source.take()
    copies = 3 * 2  # input_ids, labels and attention_mask of two micro-batches
    own = "data of cuda:1"
    copy = ("copy", "cuda:1", {"non_blocking": True}, True)
    inside = [("enter", "device cuda:1"), ("enter", own), *[copy] * copies, ("record", own)]
    left = [("exit", own), ("exit", "device cuda:1")]
    assert calls == [*inside, *left, ("wait", "compute", own), *[("used", "compute")] * copies]


def test_grouping_is_refused_where_it_cannot_be(tmp_path: Path):
    for other, why in (
        ("streaming", "a stream does not know lengths ahead"),
        ("packing", "packed sequences are as long"),
    ):
        with pytest.raises(ConfigError, match=rf"^group_by_length=True: {why} \({other}: true\); set it to false"):
            DataConfig(name="x.jsonl", text="t", group_by_length=True, **{other: True})
