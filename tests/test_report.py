"""The report of a run: numbers against hand-computed ones, valid pictures, a self-contained page, cut-off records."""

from __future__ import annotations

import ast
import base64
import html
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

import grass_dist.cli
from grass_dist.errors import GrassError
from grass_dist.events import Refreshed, Sampled, Traffic
from grass_dist.finetune.metrics import MetricsLog
from grass_dist.record.costs import StepCosts
from grass_dist.report import build_report, load_run
from grass_dist.report.costs import BARS, _bars
from grass_dist.report.drawing import byte_unit, envelope, rolling_mean
from grass_dist.report.load import Interval, RefreshEvent, SampleEvent, relative
from grass_dist.report.page import cards, layer_rows, numbers, pair_answers, render, untrained
from grass_dist.report.plots import PLOTS, _columns, _held, _norm, _training_loss, plot_all

LAYERS, STEPS, PROBE, LAYER_NUMEL, ALWAYS = 30, 120, 6, 3_540_096, 28_312_128
TOTAL = LAYERS * LAYER_NUMEL + ALWAYS
ROUNDS = [(0, 10, 29), (1, 12, 29), (4, 11, 28), (0, 9, 29), (2, 13, 27), (0, 10, 29)]
"""Layers that train in steps 7-26, 27-46, 47-66, 67-86, 87-106 and 107-120."""
NASTY = "<script>alert('x')</script> & \"quotes\""

Record = dict[str, Any]


def run_json() -> Record:
    return {
        "name": "smollm2-demo",
        "model": "SmolLM2-135M",
        "backend": "fsdp2",
        "world_size": 2,
        "device": "cpu",
        "dtype": "bfloat16",
        "num_layers": LAYERS,
        "layer_names": [f"model.layers.{i}" for i in range(LAYERS)],
        "layer_numel": [LAYER_NUMEL] * LAYERS,
        "params_total": TOTAL,
        "params_always_active": ALWAYS,
        "grass": {
            "active_layers": 3,
            "sampling_interval": 20,
            "update_interval": 20,
            "sampler": "grass",
            "offload": {"prefetch_steps": 0},
        },
        "train": {"max_steps": STEPS, "global_batch_size": 16, "micro_batch_size": 4, "learning_rate": 2e-5},
        "data": {"name": "arithmetic", "train_examples": 4000, "eval_examples": 200},
        "started": "2026-05-04T10:20:30+00:00",
        "versions": {"torch": "2.13.0", "grass_dist": "0.1.0"},
    }


def events() -> list[Record]:
    """A realistic record: noisy falling loss, importances high at both ends of the stack that drift.

    Step 106 brings the states of three layers back to the device and step 66 those of two; fourteen go to host memory.
    """
    rng = np.random.default_rng(0)
    trained = 3 * LAYER_NUMEL + ALWAYS
    found: list[Record] = [{"event": "answer", "when": "before", "prompt": "2+2=", "text": "22", "expected": "4"}]
    found.append({"event": "eval", "step": 0, "loss": 3.0})
    for k in range(1, STEPS + 1):
        probe = k <= PROBE
        loss = 1.6 + 1.4 * math.exp(-max(0, k - PROBE) / 40) + 0.09 * rng.standard_normal()
        found.append({
            "event": "step", "step": k, "phase": "probe" if probe else "train", "loss": loss, "lr": 2e-5,
            "grad_norm": None if probe else 1.0, "seconds": (0.9 if probe else 0.5) * rng.uniform(0.95, 1.1),
            "tokens": 2048, "bytes_reduced": 4 * (TOTAL if probe else trained),
            "state_bytes": 0 if probe else 6 * trained,
            "active_layers": list(range(LAYERS)) if probe else list(ROUNDS[(k - PROBE - 1) // 20]),
            "bytes_to_device": 6 * LAYER_NUMEL * {66: 2, 106: 3}.get(k, 0),
            "bytes_to_host": 6 * LAYER_NUMEL * {26: 2, 46: 3, 66: 3, 86: 3, 106: 3}.get(k, 0),
            "transfer_seconds": {26: 0.02, 46: 0.03, 66: 0.05, 86: 0.03, 106: 0.06}.get(k, 0.0),
            "wait_seconds": {66: 0.001, 106: 0.003}.get(k, 0.0),
        })  # fmt: skip
        if k % 20 == 0:
            found.append({"event": "eval", "step": k, "loss": 1.65 + 1.35 * math.exp(-k / 40)})
        if k >= PROBE and (k - PROBE) % 20 == 0:
            depth = np.linspace(-1, 1, LAYERS)
            importances = 1e-4 * (0.5 + 2 * depth**4 + 0.4 * (1 - k / STEPS) * rng.random(LAYERS) + 2.5 * (depth == 1))
            weights = np.exp(importances / importances.mean())
            odds = (weights / weights.sum()).tolist()
            found.append({"event": "refresh", "step": k, "importances": importances.tolist(), "probabilities": odds,
                          "dropped": 0})  # fmt: skip
            number = (k - PROBE) // 20
            found.append({"event": "sample", "step": k, "round": number, "active_layers": list(ROUNDS[number]),
                          "probabilities": odds})  # fmt: skip
    found.append({"event": "answer", "when": "after", "prompt": "2+2=", "text": "4", "expected": "4"})
    found.append({"event": "end", "step": STEPS, "seconds": 65.2})
    return found


def write_run(folder: Path, record: list[Record], info: Record | None = None, tail: bytes = b"") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(info or run_json()))
    (folder / "config.yaml").write_text("grass:\n  active_layers: 3\n  sampler: grass  # <chosen> & kept\n")
    (folder / "metrics.jsonl").write_bytes("".join(json.dumps(event) + "\n" for event in record).encode() + tail)
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", events())


def small_run(
    folder: Path, record: list[Record], numel: tuple[int, ...] = (10, 20, 30), always: int = 5, **grass: Any
) -> Path:
    """A run of a model with layers of ``numel`` parameters, one of which trains at a time."""
    info = run_json() | {
        "num_layers": len(numel),
        "layer_names": [f"layers.{i}" for i in range(len(numel))],
        "layer_numel": list(numel),
        "params_total": sum(numel) + always,
        "params_always_active": always,
        "grass": {"active_layers": 1, "sampler": "uniform", **grass},
    }
    return write_run(folder, record, info)


def step(k: int, layers: list[int], phase: str = "train", **changes: Any) -> Record:
    numbers = {"loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "seconds": 0.5, "tokens": 100}
    costs = {"bytes_reduced": 40, "state_bytes": 80}
    return {"event": "step", "step": k, "phase": phase, "active_layers": layers, **numbers, **costs, **changes}


def without(*kinds: str) -> list[Record]:
    return [event for event in events() if event["event"] not in kinds]


def html_of(folder: Path) -> str:
    return build_report(folder).read_text("utf-8")


def text_of(folder: Path) -> str:
    """The page without its pictures, which take most of the time."""
    return render(load_run(folder), {})


def picture_names(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "plots").iterdir()}


def assert_is_picture(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(path)[..., :3]
    assert pixels.shape[1] == 1500
    colours, counts = np.unique((pixels * 255).astype(int) @ [1, 256, 65536], return_counts=True)
    assert len(colours) > 20, "blank, or next to it"
    assert counts.max() < 0.99 * counts.sum()


# Numbers


def test_a_layer_is_counted_in_training_steps_only(run_dir: Path) -> None:
    run = load_run(run_dir)
    expected = dict.fromkeys(range(LAYERS), 0) | dict.fromkeys([1, 2, 4, 9, 11, 12, 13, 27, 28], 20)
    expected |= {0: 54, 10: 34, 29: 74}
    assert dict(enumerate(run.times_trained())) == expected
    assert sum(run.times_trained()) == 3 * 114
    assert [row.times_trained for row in layer_rows(run)] == list(expected.values())
    last = {layer: min(26 + 20 * number, STEPS) for number, layers in enumerate(ROUNDS) for layer in layers}
    stale = [STEPS - last[layer] if layer in last else None for layer in range(LAYERS)]
    assert [row.staleness for row in layer_rows(run)] == stale and {0, None} < set(stale)


def test_key_figures_against_numbers_computed_by_hand(run_dir: Path) -> None:
    found = numbers(load_run(run_dir))
    assert (found.steps, found.probe_steps) == (120, 6)
    assert found.trained_params == 38_932_416  # 3 × 3,540,096 + 28,312,128
    assert found.share == pytest.approx(0.289428, abs=1e-6)  # of 134,515,008
    assert found.bytes_train == 155_729_664
    assert found.bytes_probe == 538_060_032
    assert found.state_peak == 233_594_496
    assert found.state_full == pytest.approx(807_090_048)
    assert (found.bytes_to_device, found.bytes_to_host) == (106_202_880, 297_368_064)  # 5 and 14 layers
    assert (found.copying, found.waiting) == pytest.approx((0.19, 0.004))
    assert found.first_eval and found.first_eval.loss == 3.0 and found.first_eval.step == 0
    assert found.last_eval and found.last_eval.step == 120


def test_cards_say_the_key_figures(run_dir: Path) -> None:
    run = load_run(run_dir)
    shown = {card.label: (card.value, card.note) for card in cards(numbers(run), run)}
    assert shown["Held-out loss"] == ("3.000 → 1.717", "steps 0 and 120, −42.8%")
    assert shown["Steps"] == ("120", "6 of them the probe")
    assert shown["Parameters trained at a time"][0] == "29%"
    value, note = shown["Gradients reduced a step"]
    assert value == "156 MB" and "29% of the 538 MB" in note
    value, note = shown["Optimizer state a rank"]
    assert value == "234 MB" and "807 MB" in note


def test_layers_of_different_sizes_and_speed(tmp_path: Path) -> None:
    record = [
        step(1, [0, 1, 2], "probe", seconds=100.0, tokens=7, bytes_reduced=260),
        step(2, [0], state_bytes=150, bytes_reduced=60),
        step(3, [2], state_bytes=350, bytes_reduced=140, seconds=1.0),
        step(4, [2], state_bytes=350, bytes_reduced=140),
    ]
    found = numbers(load_run(small_run(tmp_path, record)))
    assert found.trained_params == pytest.approx((15 + 35 + 35) / 3)
    assert found.share == pytest.approx(85 / 3 / 65)
    assert found.tokens_per_second == pytest.approx(300 / 2.0)
    assert found.bytes_train == pytest.approx(340 / 3)
    assert found.bytes_probe == 260
    assert (found.state_peak, found.state_full) == (350, 350 * 65 / 35)


def test_speed_and_lanes_are_means_over_time(tmp_path: Path) -> None:
    def fast(number: int, rate: float, seconds: float, **more: float) -> dict[str, Any]:
        speed = {"tokens_per_second": rate, "flops_per_second": 1e10 * rate, "mfu": rate / 1e4, "data_seconds": 1.0}
        return step(number, [0], seconds=seconds, backward_seconds=seconds / 2, update_seconds=1.0, **speed | more)

    run = load_run(small_run(tmp_path, [fast(1, 100, 9.0), fast(2, 400, 4.0)]))  # 10 and 5 seconds with the data
    [card] = [card for card in cards(numbers(run), run) if card.label == "Tokens a second"]
    note = "2.0% of the peak of the GPUs, 2 TFLOP/s; in training steps; evaluation is left out"
    assert (card.value, card.note) == ("200", note)
    page = text_of(tmp_path)
    assert (
        "43% went to forward and backward, 13% to clipping, updates and switches, 13% to waiting for data, and 30%"
        in page
    )


def test_full_state_counts_what_trains_wherever_states_are(tmp_path: Path) -> None:
    """10 bytes a parameter: states that stay, that go to host memory at the switch, and those of a slot at a time."""
    for name, held in (
        ("none", [(150, 0), (350, 0), (650, 0)]),
        ("interval", [(150, 0), (250, 100), (350, 300)]),
        ("stream", [(50, 100), (50, 300), (50, 600)]),
    ):
        record = [step(k + 1, [k], state_bytes=device, host_state_bytes=host) for k, (device, host) in enumerate(held)]
        run = load_run(small_run(tmp_path / name, record))
        found = numbers(run)
        assert found.state_full == 650, name
        assert (found.state_peak, found.host_peak) == (max(d for d, _ in held), max(h for _, h in held))
        note = next(card.note for card in cards(found, run) if card.label == "Optimizer state a rank")
        assert ("up to 600 bytes in host memory" in note) == (name == "stream")
        assert ("host memory" in note) == (name != "none")


def test_the_room_for_states_is_that_of_the_slots(tmp_path: Path) -> None:
    """10 bytes a parameter, and room for one layer of the largest size more than train."""
    for name, offload, slots in (("interval", {}, 2), ("stream", {"mode": "stream"}, 1)):
        held = {"state_bytes": 10 * (5 + slots * 30), "bytes_to_host": 100}
        record = [step(k + 1, [k], **held, host_state_bytes=100 * k) for k in range(3)]
        assert numbers(load_run(small_run(tmp_path / name, record, offload=offload))).state_full == 650, name


def test_a_record_that_begins_late_says_so(tmp_path: Path) -> None:
    run = load_run(small_run(tmp_path, [step(8, [0]), step(9, [0]), {"event": "end", "step": 9, "seconds": 1.0}]))
    assert run.notes[-1].startswith("The record begins at step 8:") and untrained(run) == []


def test_how_even_the_probabilities_are_is_told_in_a_sentence(tmp_path: Path) -> None:
    def told(odds: list[float], **grass: Any) -> str:
        record = [
            {"event": "refresh", "step": 1, "importances": odds, "probabilities": odds, "dropped": 0},
            step(2, [0]),
        ]
        folder = small_run(tmp_path / "run", record)
        info = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(info | {"grass": info["grass"] | grass}))
        return text_of(folder)

    sentence = "have the entropy of a uniform draw among 2.83 of 3 layers; the largest is 2 times the smallest."
    assert f"{sentence}</p>" in told([0.5, 0.25, 0.25])
    assert f"{sentence} A grass.temperature below 1 sharpens them.</p>" in told([0.5, 0.25, 0.25], temperature=1.0)
    for odds in ([1 / 3] * 3, [1.0, 0.0, 0.0], [0.5, 0.5, 0.5]):
        assert "uniform draw among" not in told(odds)


def test_moves_are_told_in_a_sentence(run_dir: Path, tmp_path: Path) -> None:
    told = "moved 106 MB to the device and 297 MB back; 98% of the copying time ran beside the compute; training waited"
    assert f"<p>This rank {told} 4 ms in all.</p>" in text_of(run_dir)
    for number, (moved, sentence) in enumerate([
        ({"bytes_to_host": 7}, "moved 0 bytes to the device and 7 bytes back.</p>"),
        ({"bytes_to_host": 7, "transfer_seconds": 2.0}, "100% of the copying time ran beside the compute; training "
         "never waited.</p>"),
        ({"bytes_to_device": 7, "transfer_seconds": 2.0, "wait_seconds": 1e-4}, "99.9% of the copying time"),
        ({"bytes_to_device": 7, "transfer_seconds": 2.0, "wait_seconds": 0.3}, "85% of the copying time"),
        ({"bytes_to_device": 7, "transfer_seconds": 2.0, "wait_seconds": 3.0}, "; 0% of the copying time"),
    ]):  # fmt: skip
        assert sentence in text_of(small_run(tmp_path / str(number), [step(1, [0], **moved)]))


def test_switches_are_told_in_a_sentence(run_dir: Path, tmp_path: Path) -> None:
    assert "of layers took" not in text_of(run_dir)  # the record is of before they were counted
    for switches, told in ((1, "1 switch of layers took 4 ms of the host,"), (3, "3 switches of layers took 12 ms")):
        steps = [step(k, [0], switch_seconds=0.004 if k <= switches else 0.0) for k in range(1, 6)]
        assert told in text_of(small_run(tmp_path / str(switches), steps))


def test_costs_of_a_step_are_what_came_since_the_last_one() -> None:
    traffic = Traffic(5, 7, 2, 0.5, 0.125)
    grass = SimpleNamespace(bytes_reduced=100, traffic=traffic, switch_seconds=1.0)
    run: Any = SimpleNamespace(grass=grass, state_bytes=10, host_state_bytes=20)
    costs = StepCosts(run)
    traffic.bytes_to_device, traffic.seconds, grass.bytes_reduced = 25, 0.75, 140  # the very object, as the engine does
    grass.switch_seconds = 1.5
    first = costs.of_step()
    assert first == {
        "bytes_reduced": 40, "bytes_to_device": 20, "bytes_to_host": 0, "transfer_seconds": 0.25, "wait_seconds": 0,
        "weight_bytes_to_device": 0, "weight_bytes_to_host": 0, "switch_seconds": 0.5,
        "state_bytes": 10, "host_state_bytes": 20,
    }  # fmt: skip
    traffic.bytes_to_host, traffic.waited, run.host_state_bytes = 8, 0.625, 0
    assert costs.of_step() == {**dict.fromkeys(first, 0), "bytes_to_host": 1, "wait_seconds": 0.5, "state_bytes": 10}


def test_share_before_the_first_step_is_of_the_configuration(tmp_path: Path) -> None:
    found = numbers(load_run(small_run(tmp_path, [step(1, [0, 1, 2], "probe")])))
    assert found.share == pytest.approx((20 + 5) / 65)
    assert found.tokens_per_second is None and found.bytes_train is None and found.state_full is None


def test_layer_table_shows_last_importances_and_probabilities(tmp_path: Path) -> None:
    record = [
        {"event": "refresh", "step": 1, "importances": [9, 9, 9], "probabilities": [0.4, 0.3, 0.3], "dropped": 0},
        {"event": "refresh", "step": 2, "importances": [1, 3, None], "probabilities": [0.2, 0.7, 0.1], "dropped": 1},
    ]
    rows = layer_rows(load_run(small_run(tmp_path, record)))
    assert [row.importance for row in rows] == [0.5, 1.5, None]
    assert [row.probability for row in rows] == [0.2, 0.7, 0.1]
    assert [(row.index, row.name, row.numel) for row in rows][2] == (2, "layers.2", 30)


def test_probabilities_of_an_early_draw_are_of_the_last_refresh(tmp_path: Path) -> None:
    older, newer = [0.5, 0.3, 0.2], [0.2, 0.7, 0.1]
    refresh = {"event": "refresh", "importances": [1, 1, 1], "dropped": 0}
    record = [
        *(step(k, [0]) for k in range(1, 7)),
        refresh | {"step": 1, "probabilities": older},
        refresh | {"step": 4, "probabilities": newer},
        {"event": "sample", "step": 5, "round": 1, "active_layers": [2], "probabilities": older, "drawn_at": 3},
    ]
    run = load_run(small_run(tmp_path, record))
    assert [(event.step, list(event.probabilities)) for event in run.probability_events()] == [
        (1, older), (3, older), (4, newer),
    ]  # fmt: skip
    assert [row.probability for row in layer_rows(run)] == newer
    assert (run.samples[0].step, run.samples[0].drawn_at) == (5, 3)


def test_what_observers_are_told_is_what_a_report_reads(tmp_path: Path) -> None:
    folder = small_run(tmp_path, [])
    log = MetricsLog(folder, json.loads((folder / "run.json").read_text()))
    log.observe(Refreshed(3, (1.0, math.nan, 3.0), (0.25, 0.25, 0.5), 1))
    log.observe(Sampled(5, 1, (2,), (0.25, 0.25, 0.5), drawn_at=3))
    log.close()
    run = load_run(folder)
    assert run.refreshes == (RefreshEvent(3, (1.0, None, 3.0), (0.25, 0.25, 0.5), 1),)
    assert run.samples == (SampleEvent(5, 1, (2,), (0.25, 0.25, 0.5), 3),)


def test_a_record_of_before_layers_were_drawn_ahead_is_read(run_dir: Path) -> None:
    run = load_run(run_dir)
    assert [event.step for event in run.samples] == [6, 26, 46, 66, 86, 106]
    assert {event.drawn_at for event in run.samples} == {None}
    assert [event.step for event in run.probability_events()] == [s for s in range(6, 120, 20) for _ in range(2)]


def test_losses_that_are_logged_now_and_then_are_joined(tmp_path: Path) -> None:
    probe = step(1, [0, 1, 2], "probe", loss=None)
    sparse = [probe, *(step(k, [0], loss=k if k % 10 == 0 else None) for k in range(2, 42))]
    steps, loss, *words = _training_loss(load_run(small_run(tmp_path / "sparse", sparse)))
    assert steps.tolist() == loss.tolist() == [10, 20, 30, 40] and words == ["where it was logged", "of these"]
    every = [probe, *(step(k, [0], loss=None if k == 7 else k) for k in range(2, 42))]  # one was not finite
    steps, loss, *words = _training_loss(load_run(small_run(tmp_path / "every", every)))
    assert len(steps) == 40 and math.isnan(loss[5]) and words == ["each step", "steps"]


def test_relative_importances_skip_the_unmeasured() -> None:
    assert relative([1.0, 2.0, None, 3.0]) == [0.5, 1.0, None, 1.5]
    assert relative([None, None]) == [None, None]
    assert relative([0.0, 0.0]) == [None, None]


def test_intervals_break_where_the_trained_layers_change(run_dir: Path) -> None:
    firsts = [7, 27, 47, 67, 87, 107]
    lasts = [26, 46, 66, 86, 106, 120]
    assert load_run(run_dir).intervals() == [Interval(*part) for part in zip(firsts, lasts, ROUNDS, strict=True)]


def test_an_interval_does_not_bridge_steps_that_are_missing(tmp_path: Path) -> None:
    run = load_run(small_run(tmp_path, [step(1, [0]), step(2, [0]), step(5, [0])]))
    assert run.intervals() == [Interval(1, 2, (0,)), Interval(5, 5, (0,))]


def test_a_repeated_step_of_a_resumed_run_counts_once(tmp_path: Path) -> None:
    record = [step(1, [0]), step(2, [1]), step(3, [1]), step(2, [2], loss=0.5), step(3, [2])]
    run = load_run(small_run(tmp_path, record))
    assert run.times_trained() == [1, 0, 2]
    assert [s.loss for s in run.steps] == [1.0, 0.5, 1.0]


# Pictures


def test_every_picture_is_drawn_and_stands_in_the_page(run_dir: Path) -> None:
    page = html_of(run_dir)
    assert picture_names(run_dir) == set(PLOTS)
    assert set(PLOTS) == {"loss", "importance", "probability", "counts", "cost", "moves"}
    for name in PLOTS:
        path = run_dir / "plots" / f"{name}.png"
        assert_is_picture(path)
        assert base64.b64encode(path.read_bytes()).decode() in page


def test_the_marks_follow_the_layers_that_trained(run_dir: Path, tmp_path: Path) -> None:
    moved = [e | {"active_layers": [5, 6, 7]} if e.get("phase") == "train" else e for e in events()]
    other = write_run(tmp_path / "other", moved)
    for folder in (run_dir, other):
        plot_all(load_run(folder), folder / "plots")
    same = {name: (run_dir / f"plots/{name}.png").read_bytes() == (other / f"plots/{name}.png").read_bytes()
            for name in PLOTS}  # fmt: skip
    assert same == {
        "loss": True,
        "importance": True,
        "probability": False,
        "counts": False,
        "cost": True,
        "moves": True,
    }


def test_states_in_host_memory_are_drawn_where_there_are_any(run_dir: Path, tmp_path: Path) -> None:
    pictures = []
    for name, host in (("none", 0), ("some", 10**9)):
        record = [e | {"host_state_bytes": host} if e["event"] == "step" else e for e in events()]
        pictures.append(write_run(tmp_path / name, record) / "plots" / "cost.png")
    for picture in (run_dir / "plots" / "cost.png", *pictures):
        plot_all(load_run(picture.parents[1]), picture.parent)
    without, none, some = (p.read_bytes() for p in (run_dir / "plots" / "cost.png", *pictures))
    assert without == none != some


@pytest.mark.parametrize("field", ["bytes_to_device", "bytes_to_host", "transfer_seconds", "wait_seconds"])
def test_the_picture_of_the_moves_shows_each_of_them(run_dir: Path, tmp_path: Path, field: str) -> None:
    record = [e | {field: 0} if e["event"] == "step" and e["step"] == 66 else e for e in events()]
    other = write_run(tmp_path / "other", record)
    for folder in (run_dir, other):
        plot_all(load_run(folder), folder / "plots")
    assert (run_dir / "plots/moves.png").read_bytes() != (other / "plots/moves.png").read_bytes()


def test_bars_of_a_long_run_are_as_long_as_the_longest_step() -> None:
    steps, values = np.arange(1, 1001), np.zeros(1000)
    values[500] = 7.0  # step 501, the last of a bar of three
    at, heights, widths = _bars(steps, values)
    assert len(at) == 334 <= BARS and set(widths[:-1]) == {3} and widths[-1] == 1
    assert (heights.max(), at[heights.argmax()], np.count_nonzero(heights)) == (7.0, 500, 1)
    assert _bars(steps, -values)[1].min() == -7.0 and _bars(steps, -values)[1].max() == 0
    at, heights, widths = _bars(np.array([1, 2, 5]), np.array([1.0, 2.0, 3.0]))
    assert (at.tolist(), heights.tolist()) == ([1, 2, 5], [1, 2, 3]) and widths == pytest.approx([0.9] * 3)


def test_a_heatmap_holds_the_values_of_the_last_refresh(run_dir: Path) -> None:
    run = load_run(run_dir)
    columns = _columns(run, run.refreshes[-1].step)
    assert columns.tolist() == list(range(1, 121))
    grid = _held(run.refreshes, columns, lambda event: event.probabilities, LAYERS)
    assert np.isnan(grid[:, :6]).all(), "nothing is known before the refresh at the end of step 6"
    for index, refresh in enumerate(run.refreshes):
        held = grid[:, 6 + 20 * index : 26 + 20 * index]
        assert (held == np.array(refresh.probabilities)[:, None]).all()


def test_colours_are_logarithmic_only_where_values_differ_much() -> None:
    assert (_norm(np.array([[1.0, 7.0, np.nan]])).vmin, _norm(np.array([[1.0, 7.0]])).vmax) == (0, 7)
    assert (_norm(np.array([[0.0, 1.0, 9.0]])).vmin, _norm(np.array([[1.0, 9.0]])).vmax) == (1, 9)
    assert _norm(np.array([[1e-9, 1.0]])).vmin == pytest.approx(1e-3)
    assert float(_norm(np.array([[0.25, 0.25]]))(0.25)) == 0.5


def test_rolling_mean_is_centred_and_skips_gaps() -> None:
    assert rolling_mean(np.array([1.0, 2.0, 3.0, 10.0]), 3).tolist() == [1.5, 2.0, 5.0, 6.5]
    assert rolling_mean(np.array([1.0, np.nan, 3.0]), 3).tolist() == [1.0, 2.0, 3.0]


def test_a_long_line_keeps_its_extremes() -> None:
    values = np.zeros(10_000)
    values[4321], values[8765] = 5.0, -3.0
    x, y = envelope(np.arange(1, 10_001), values, bins=100)
    assert len(x) == len(y) == 200
    assert (y.max(), y.min()) == (5.0, -3.0)
    assert x[y.argmax()] == 4301


def test_byte_units_are_decimal() -> None:
    assert [byte_unit(n) for n in (0, 999, 1000, 2.5e6, 1e9)] == [
        (1.0, "bytes"), (1.0, "bytes"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB"),
    ]  # fmt: skip


@pytest.mark.parametrize(("layers", "steps"), [(2, 5), (128, 5_000)])
def test_small_and_large_runs_are_drawn(tmp_path: Path, layers: int, steps: int) -> None:
    odds = [1 / layers] * layers
    record: list[Record] = []
    for k in range(1, steps + 1):
        layer = k // 25 % layers
        record.append(step(k, [layer], loss=1 + 1 / k, seconds=20.0 if k == 1 else 0.4 + k % 7 / 100,
                           bytes_to_host=0 if k % 5 else 10**6))  # fmt: skip
        if k == 1 or k % 50 == 0:
            importances = [1 + (i * k) % 11 for i in range(layers)]
            record.append({"event": "refresh", "step": k, "importances": importances, "probabilities": odds,
                           "dropped": 0})  # fmt: skip
    folder = small_run(tmp_path, record, numel=(10,) * layers)
    pictures = plot_all(load_run(folder), folder / "plots")
    assert len(pictures) == 6
    for path in pictures.values():
        assert path is not None
        assert_is_picture(path)


# The page


def test_the_page_holds_everything_it_promises(run_dir: Path) -> None:
    page = text_of(run_dir)
    assert "SmolLM2-135M · fsdp2 on 2 ranks · cpu, bfloat16 · sampler grass · γ = 3 of 30 layers" in page
    assert "grass:\n  active_layers: 3\n  sampler: grass  # &lt;chosen&gt; &amp; kept\n" in page
    assert "took 1 min 05 s" in page and "4,000 training examples, 200 held out" in page
    for layer in range(LAYERS):
        assert f"<code>model.layers.{layer}</code>" in page
    notes = re.findall(r"<li>(.*?)</li>", page)
    assert len(notes) == 1 and "never trained" in notes[0], "a complete run has nothing else to note"


def test_the_page_refers_to_nothing_outside_itself(run_dir: Path) -> None:
    page = html_of(run_dir)
    targets = re.findall(r"""(?:src|href|action|data)\s*=\s*["']?([^"'\s>]+)""", page)
    assert len(targets) == 6
    assert all(target.startswith("data:image/png;base64,") for target in targets)
    for outside in ("http:", "https:", "url(", "@import", "<script", "<link", "<iframe"):
        assert outside not in page


def test_text_of_the_run_is_escaped(tmp_path: Path) -> None:
    answers = [{"event": "answer", "when": when, "prompt": NASTY, "text": NASTY, "expected": NASTY}
               for when in ("before", "after")]  # fmt: skip
    info = run_json() | {"name": NASTY, "model": NASTY, "layer_names": [NASTY] * LAYERS}
    folder = write_run(tmp_path, without("answer") + answers, info)
    (folder / "config.yaml").write_text(NASTY)
    page = text_of(folder)
    assert "<script" not in page
    # title, heading, summary, each layer, prompt, expected, before, after, configuration
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp;") == 3 + LAYERS + 4 + 1


def test_the_example_shows_what_is_learnt(tmp_path: Path) -> None:
    pieces = [(NASTY, False, False), ("<|im_start|>", False, True), (NASTY, True, False), ("<eos>", True, True)]
    shown = [{"text": text, "learnt": learnt, "special": special} for text, learnt, special in pieces]
    info = {**run_json(), "example": {"tokens": 1234, "learnt": 56, "pieces": shown}}
    page = html_of(write_run(tmp_path / "run", without("step"), info))
    section = page.partition('<section id="example">')[2].partition("</section>")[0]
    assert "1,234 tokens" in section and "<script>" not in section
    spans = re.findall(r'<span class="([a-z ]*)">(.*?)</span>', section.partition("<pre")[2])
    assert [(kind.split(), html.unescape(text)) for kind, text in spans] == [
        ([], NASTY), (["special"], "<|im_start|>"), (["learnt"], NASTY), (["learnt", "special"], "<eos>")
    ]  # fmt: skip
    assert "The record holds no example." in html_of(write_run(tmp_path / "older", without("step")))


def test_answers_are_paired_by_their_prompt(tmp_path: Path) -> None:
    def answer(when: str, prompt: str, text: str, expected: str | None = None) -> Record:
        return {"event": "answer", "when": when, "prompt": prompt, "text": text, "expected": expected}

    record = [answer("before", "a", "a0"), answer("before", "b", "b0", "b!"), answer("after", "b", "b1", "b!")]
    folder = small_run(tmp_path, [*record, answer("after", "c", "c1")])
    found = [(a.prompt, a.expected, a.before, a.after) for a in pair_answers(load_run(folder))]
    assert found == [("a", None, "a0", None), ("b", "b!", "b0", "b1"), ("c", None, None, "c1")]
    page = text_of(folder)
    assert page.count("not recorded") == 2
    assert page.count('<div class="tag">Expected</div>') == 1


def test_half_a_character_in_an_answer_does_not_stop_the_page(tmp_path: Path) -> None:
    answer = {"event": "answer", "when": "after", "prompt": "p", "text": "half: \ud83d", "expected": None}
    assert "half: ?" in html_of(small_run(tmp_path, [answer]))


# Records that lack something


@pytest.mark.parametrize("tail", [b'{"event": "step", "ste', b'{"event": "answer", "text": "\xc3', b"\0\0\0\0", b"7"])
def test_a_half_written_last_line_is_left_out_and_told(tmp_path: Path, tail: bytes) -> None:
    folder = write_run(tmp_path, without("end"), tail=tail)
    run = load_run(folder)
    assert run.steps[-1].step == STEPS
    assert (
        run.notes[0]
        == f"The last line of metrics.jsonl (line {len(without('end')) + 1}) was half-written; it is left out."
    )
    assert len(run.notes) == 2 and "no end" in run.notes[1]
    page = text_of(folder)
    assert all(note in page for note in run.notes)


def test_a_complete_last_line_without_a_line_break_is_read(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path, without("end"), tail=b'{"event": "end", "step": 120, "seconds": 3}'))
    assert run.end and run.end.seconds == 3
    assert run.notes == ()


DAMAGED = {
    "cut": ('{"event": "step", "st', "this line is damaged"),
    "not an object": ("[1]", "not an object"),
    "field missing": ('{"event": "eval", "step": 3}', "loss: field required"),
    "wrong type": ('{"event": "eval", "step": "x", "loss": 1}', "step: "),
    "no such phase": (json.dumps(step(1, [0], "warmup")), "phase: "),
    "no such layer": (json.dumps(step(1, [30])), "outside 0 to 29"),
    "too few": ('{"event": "sample", "step": 1, "round": 0, "active_layers": [], "probabilities": []}', "0 entries"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(run_dir: Path, name: str) -> None:
    line, problem = DAMAGED[name]
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    (run_dir / "metrics.jsonl").write_text("\n".join([*lines[:4], line, *lines[4:]]))
    with pytest.raises(GrassError) as caught:
        load_run(run_dir)
    assert f"{run_dir / 'metrics.jsonl'}, line 5: " in str(caught.value)
    assert problem in str(caught.value)
    assert_one_sentence(str(caught.value))


def test_events_of_a_later_version_are_passed_over(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path, [{"event": "telemetry", "watts": 3}, *events()]))
    assert len(run.steps) == STEPS


@pytest.mark.parametrize(
    ("missing", "pictures", "sentence"),
    [
        (("refresh",), {"loss", "probability", "counts", "cost", "moves"}, "No importances were recorded"),
        (("refresh", "sample"), {"loss", "counts", "cost", "moves"}, "No sampling probabilities were recorded"),
        (("eval",), set(PLOTS), "no evaluation was recorded"),
        (("answer",), set(PLOTS), "No answers were recorded."),
        (("step",), {"loss", "importance", "probability"}, "No training step was recorded"),
    ],
)
def test_a_part_that_was_not_recorded_is_told(
    tmp_path: Path, missing: tuple[str, ...], pictures: set[str], sentence: str
) -> None:
    page = html_of(write_run(tmp_path, without(*missing)))
    assert sentence in page
    assert picture_names(tmp_path) == pictures
    assert page.count("<img ") == len(pictures)


def test_a_record_of_before_states_moved_is_read(tmp_path: Path) -> None:
    fields = {"bytes_to_device", "bytes_to_host", "transfer_seconds", "wait_seconds"}
    record = [{name: value for name, value in event.items() if name not in fields} for event in events()]
    page = html_of(write_run(tmp_path, record))
    assert "No optimizer state moved" in page and "This rank moved" not in page
    assert picture_names(tmp_path) == set(PLOTS) - {"moves"}
    last = load_run(tmp_path).steps[-1]
    assert all(getattr(last, name) == 0 for name in fields)


def test_an_empty_record_still_makes_a_page(tmp_path: Path) -> None:
    page = html_of(write_run(tmp_path, []))
    assert "<img " not in page and picture_names(tmp_path) == set()
    assert "no evaluation was recorded" in page and "model.layers.29" in page


def test_a_run_cut_off_in_the_probe(tmp_path: Path) -> None:
    page = html_of(write_run(tmp_path, [step(k, list(range(LAYERS)), "probe") for k in (1, 2)]))
    assert picture_names(tmp_path) == {"loss", "cost"}
    assert "no training step was recorded" in page and "The record has no end" in page
    assert_is_picture(tmp_path / "plots" / "cost.png")


def test_null_and_infinite_readings(tmp_path: Path) -> None:
    record = without("eval")
    for event in record:
        if event["event"] == "refresh":
            event["importances"] = [None] * 15 + [math.nan] + event["importances"][16:]
        if event["event"] == "step" and event["step"] % 10 == 0:
            event["loss"] = math.inf if event["step"] % 20 else None
    record.append({"event": "eval", "step": 120, "loss": math.nan})
    page = html_of(write_run(tmp_path, record))
    run = load_run(tmp_path)
    assert [row.importance is None for row in layer_rows(run)] == [True] * 16 + [False] * 14
    assert run.steps[9].loss is None and run.steps[19].loss is None
    assert "not finite" in page and picture_names(tmp_path) == set(PLOTS)


def test_importances_that_are_all_null_leave_the_picture_out(tmp_path: Path) -> None:
    record = [e | {"importances": [None] * LAYERS} if e["event"] == "refresh" else e for e in events()]
    html_of(write_run(tmp_path, record))
    assert picture_names(tmp_path) == {"loss", "probability", "counts", "cost", "moves"}


def test_a_picture_of_an_earlier_report_does_not_stay(run_dir: Path) -> None:
    build_report(run_dir)
    assert "importance" in picture_names(run_dir)
    write_run(run_dir, without("refresh"))
    build_report(run_dir)
    assert "importance" not in picture_names(run_dir)


def test_one_process_reduces_nothing(tmp_path: Path) -> None:
    run = load_run(small_run(tmp_path, [step(1, [0], bytes_reduced=0)]))
    card = next(card for card in cards(numbers(run), run) if card.label == "Gradients reduced a step")
    assert card.value == "0" and "nothing is reduced" in card.note


@pytest.mark.parametrize(
    ("backend", "ways"),
    [
        ({"backend": "fsdp2"}, "all ranks send 150 bytes within hosts and 150 bytes across them"),
        ({"backend": "ddp"}, "all ranks send 300 bytes within hosts and 300 bytes across them"),
        ({"backend": "fsdp2", "replicate": 2}, "all ranks send 200 bytes within hosts and 200 bytes across them"),
    ],
)
def test_bytes_within_hosts_and_across_them(tmp_path: Path, backend: Record, ways: str) -> None:
    info = run_json() | {"world_size": 4, "hosts": ["a", "a", "b", "b"]} | backend
    run = load_run(write_run(tmp_path, [step(1, [0], bytes_reduced=100)], info))
    card = next(card for card in cards(numbers(run), run) if card.label == "Gradients reduced a step")
    assert ways in card.note
    alone = load_run(write_run(tmp_path, [step(1, [0], bytes_reduced=100)], info | {"hosts": ["a"] * 4}))
    assert "hosts" not in next(c for c in cards(numbers(alone), alone) if c.label == card.label).note


def test_a_run_without_its_configuration_file(run_dir: Path) -> None:
    (run_dir / "config.yaml").unlink()
    assert "The folder has no config.yaml." in text_of(run_dir)


# Folders that are no run, and the command


def assert_one_sentence(text: str) -> None:
    assert "\n" not in text.strip() and text.strip().endswith(".") and "Traceback" not in text


def no_run(folder: Path, kind: str) -> Path:
    run = write_run(folder, events())
    info = run_json()
    match kind:
        case "no folder":
            return folder / "absent"
        case "no run.json":
            (run / "run.json").unlink()
        case "no metrics.jsonl":
            (run / "metrics.jsonl").unlink()
        case "run.json is not JSON":
            (run / "run.json").write_text("{")
        case "run.json is a list":
            (run / "run.json").write_text("[]")
        case "run.json lacks a field":
            del info["layer_names"]
            (run / "run.json").write_text(json.dumps(info))
        case "run.json has too few layers":
            (run / "run.json").write_text(json.dumps(info | {"layer_numel": [1]}))
    return run


KINDS = {
    "no folder": "there is no such folder",
    "no run.json": "run.json: this file is missing",
    "no metrics.jsonl": "metrics.jsonl: this file is missing",
    "run.json is not JSON": "run.json: this is not JSON",
    "run.json is a list": "run.json: this is not the record of a run",
    "run.json lacks a field": "layer_names: field required",
    "run.json has too few layers": "layer_numel has 1 entries and num_layers=30",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_ends_with_one_sentence_without_a_run(tmp_path: Path, kind: str) -> None:
    result = CliRunner().invoke(grass_dist.cli.app, ["report", str(no_run(tmp_path / "run", kind))])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert KINDS[kind] in result.stderr
    assert_one_sentence(result.stderr)


def test_the_command_writes_the_page_and_says_where(run_dir: Path) -> None:
    result = CliRunner().invoke(grass_dist.cli.app, ["report", str(run_dir)])
    assert result.exit_code == 0
    assert result.stdout.strip() == str(run_dir / "report.html")
    assert (run_dir / "report.html").stat().st_size > 100_000


def test_a_page_that_cannot_be_written_is_one_sentence(run_dir: Path) -> None:
    (run_dir / "plots").write_text("a file where the folder should be")
    with pytest.raises(GrassError, match="cannot be written") as caught:
        build_report(run_dir)
    assert_one_sentence(str(caught.value))


def test_a_missing_library_is_one_sentence(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("grass_dist.report.page", "grass_dist.report.plots"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(GrassError, match=r"needs jinja2.*pip install 'grass-dist\[train\]'"):
        build_report(run_dir)


def test_version_and_help() -> None:
    assert re.fullmatch(r"grass-dist \d+\.\d+\.\d+\S*\n", CliRunner().invoke(grass_dist.cli.app, ["--version"]).stdout)
    assert "report" in CliRunner().invoke(grass_dist.cli.app, ["--help"]).stdout


def test_the_command_imports_heavy_libraries_only_when_needed() -> None:
    code = "import sys, grass_dist.cli; print([m for m in ('matplotlib', 'jinja2.environment') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
    tree = ast.parse(Path(grass_dist.cli.__file__).read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert "typing" in imported and not any(name.split(".")[0] in ("torch", "numpy") for name in imported)


def test_a_finished_run_says_which_layers_it_did_not_reach(tmp_path):
    never = sorted(set(range(LAYERS)) - {layer for layers in ROUNDS for layer in layers})
    [note] = untrained(load_run(write_run(tmp_path / "run", events())))
    assert note.startswith(f"{len(never)} of {LAYERS} layers never trained ({', '.join(map(str, never))}): ")
    assert untrained(load_run(write_run(tmp_path / "cut", without("end")))) == []
