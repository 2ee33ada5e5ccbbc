"""What is read from a trace, on events made by hand: microseconds, so that every share can be counted on paper."""

from __future__ import annotations

import random

import pytest

from benchmarks.trace_overlap import common, overlap, read_lanes, total, union, without

MAIN, IN, OUT, GLOO = 1, 2, 3, 4


def event(name: str, begin: float, end: float, tid: int = MAIN, cat: str = "cpu_op") -> dict:
    return {"ph": "X", "name": name, "cat": cat, "pid": 9, "tid": tid, "ts": begin, "dur": end - begin}


def arrives(begin: float, end: float, tid: int = IN) -> list[dict]:
    return [
        event("GRASS::h2d (model.layers.3)", begin, end, tid, "user_annotation"),
        event("aten::copy_", begin, end, tid),
    ]


def leaves(begin: float, end: float) -> list[dict]:
    return [
        event("GRASS::d2h (model.layers.3)", begin, end, OUT, "user_annotation"),
        event("aten::copy_", begin, end, OUT),
    ]


def test_the_part_of_a_copy_under_operators_is_hidden():
    events = [event("aten::mm", 0, 40), event("aten::add", 60, 70), *arrives(30, 80), *leaves(5, 25)]
    told = overlap(events)
    assert told["to device"] == {"seconds": 50e-6, "hidden": 20 / 50, "under compute": 20 / 50}
    assert told["to host"] == {"seconds": 20e-6, "hidden": 1.0, "under compute": 1.0}
    assert told["both"]["hidden"] == pytest.approx(40 / 70)


def test_nested_operators_and_ranges_count_once():
    events = [event("aten::linear", 0, 40), event("aten::mm", 10, 30), *arrives(0, 50), *arrives(10, 20)]
    assert overlap(events)["to device"] == {"seconds": 50e-6, "hidden": 0.8, "under compute": 0.8}


def test_copies_of_two_threads_count_each():
    events = [event("aten::mm", 0, 50), *arrives(0, 100), *arrives(0, 50, tid=7)]
    assert overlap(events)["to device"] == {"seconds": 150e-6, "hidden": 100 / 150, "under compute": 100 / 150}


def test_under_a_collective_it_is_hidden_but_not_under_compute():
    events = [
        *[event("aten::mm", 0, 10), event("gloo:all_gather", 5, 30, GLOO, "user_annotation")],
        *[event("aten::copy_", 40, 60, GLOO), *arrives(0, 100)],  # gloo's own, outside of a collective
    ]
    assert overlap(events)["to device"] == {"seconds": 100e-6, "hidden": 0.3, "under compute": 0.1}


def test_what_waits_or_only_encloses_hides_nothing():
    events = [
        event("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 0, 100),
        event("torch::autograd::AccumulateGrad", 0, 100),
        event("Optimizer.step#AdamW.step", 0, 100, cat="user_annotation"),
        event("GRASS::update (model.layers.3)", 0, 100, cat="user_annotation"),
        event("aten::mm", 50, 90),
        event("GRASS::wait", 60, 80, cat="user_annotation"),
        *arrives(0, 100),
    ]
    assert overlap(events)["to device"]["hidden"] == 0.2


def test_a_copy_is_not_hidden_under_another():
    assert overlap([*arrives(0, 10), *leaves(0, 10)])["both"] == {"seconds": 20e-6, "hidden": 0, "under compute": 0}


def test_only_what_lies_in_the_window_counts():
    events = [event("aten::mm", 0, 40), *arrives(20, 60)]
    assert overlap(events, (30, 50))["to device"] == {"seconds": 20e-6, "hidden": 0.5, "under compute": 0.5}


def test_without_copies_nothing_is_left_open():
    assert overlap([event("aten::mm", 0, 40)])["both"] == {"seconds": 0, "hidden": 1, "under compute": 1}


def test_on_a_gpu_copies_are_those_on_streams_without_kernels():
    def memcpy(way: str, begin: float, end: float, stream: int) -> dict:
        return event(f"Memcpy {way} (Pinned -> Device)", begin, end, stream, "gpu_memcpy")

    events = [
        event("ampere_gemm", 0, 40, 7, "kernel"),
        event("ncclDevKernel_AllGather_RING_LL", 30, 50, 20, "kernel"),
        memcpy("HtoD", 60, 80, 7),  # the batch, on the compute stream
        memcpy("HtoD", 0, 60, 30),
        memcpy("DtoH", 45, 55, 31),
        *arrives(0, 1000, tid=MAIN),  # the host queues it
        event("aten::mm", 0, 1000),  # and the operators
    ]
    told = overlap(events)
    assert told["to device"] == {"seconds": 60e-6, "hidden": 50 / 60, "under compute": 40 / 60}
    assert told["to host"] == {"seconds": 10e-6, "hidden": 0.5, "under compute": 0.0}


def test_steps_and_updates_are_found():
    events = [
        event("GRASS step 41", 50, 90, cat="user_annotation"),
        event("GRASS step 40", 0, 50, cat="user_annotation"),
        event("GRASS step 40", 0, 50, cat="gpu_user_annotation"),
        event("GRASS::update (model.layers.3)", 10, 20, cat="user_annotation"),
        event("GRASS::read", 30, 40, cat="user_annotation"),
        {"ph": "M", "name": "process_name"},
    ]
    lanes = read_lanes(events)
    assert lanes.steps == [(0, 50), (50, 90)] and lanes.updates == [(10, 20)]


def test_intervals_are_sets_of_moments():
    rng = random.Random(0)
    for _ in range(200):
        sets = []
        for _ in range(2):
            edges = [sorted(rng.sample(range(30), 2)) for _ in range(rng.randint(0, 5))]
            sets.append(([(a, b) for a, b in edges], {m for a, b in edges for m in range(a, b)}))
        (a, in_a), (b, in_b) = ((union(own), moments) for own, moments in sets)
        assert total(a) == len(in_a)
        assert total(common(a, b)) == len(in_a & in_b) and total(without(a, b)) == len(in_a - in_b)
