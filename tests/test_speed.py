"""FLOPs by what a draw needs, counted by hand; peaks by the names of GPUs; times of the parts of a step."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from grass_dist.config import GrassConfig
from grass_dist.finetune.lanes import Lanes
from grass_dist.method.flops import Work, lowest_reached, step_flops
from grass_dist.model.adapters import adapter_parameters, add_adapters, layers_of
from grass_dist.model.discovery import find_layers
from grass_dist.record import speed
from grass_dist.record.peaks import PEAKS, peak_of
from grass_dist.record.speed import ModelWork, Positions, Speed, positions_of, work_of

ALL = ("embeddings", "final_norm", "lm_head")
SIZES = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 4, "num_attention_heads": 2}
LAYER = 4 * 8 * 8 + 3 * 8 * 12
"""Entries of the matrices of such a Llama's layer: 544."""


def test_a_step_by_hand():
    layers, reached = Work(100, 10), Work(60, 6)
    assert step_flops(layers, reached, 20) == (220, 120 + 24 + 40)
    forward, backward = step_flops(layers, reached, 20, head=7, head_trains=True, frozen=3, recomputed=True)
    assert (forward, backward) == (240, 120 + 24 + 40 + 28 + 132)
    assert step_flops(layers, reached, 20, head=7)[1] == 120 + 24 + 40 + 14
    assert lowest_reached([3, 1], down_to_all=False) == 1 and lowest_reached([3, 1], down_to_all=True) == 0


@pytest.mark.parametrize("tied", [False, True])
def test_the_work_of_a_llama_by_hand(tied: bool):
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    work = work_of(model, find_layers(model), recomputed=False)
    assert work == ModelWork((LAYER,) * 4, attention=8, head=400, tied=tied, recomputed=False)
    # 3 rows of 5: 15 positions, 75 pairs. Multiply-adds: a layer's matrices 8,160, its attention 600; the head 6,000.
    positions = Positions(15, 2, 75)
    forward = 2 * (4 * (8160 + 600) + 6000)
    passes = 2 * 2 * 8160 + 4 * 2 * 600  # through layers 2 and 3
    assert work.flops([2], (), positions) == forward + passes + 2 * 8160 + 2 * 6000
    head = 2 if tied else 4  # where it is tied, it is the embeddings that train it
    assert work.flops([2], ("lm_head",), positions) == forward + passes + 2 * 8160 + head * 6000
    everything = forward + 2 * 4 * 8160 + 4 * 4 * 600 + 2 * 4 * 8160 + 4 * 6000
    assert work.flops(range(4), ALL, positions) == everything == 3 * forward
    again = replace(work, recomputed=True)
    assert again.flops([2], (), positions) - work.flops([2], (), positions) == 2 * 2 * (8160 + 600)


@pytest.mark.parametrize(("active", "roles"), [((1,), ()), ((0, 3), ()), ((2,), ALL), ((0, 1, 2, 3), ALL)])
def test_torch_counts_the_same_flops(active, roles):
    """But for attention, which torch's kernels compute whole also where half of it is masked."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False, attn_implementation="eager"))
    layers = find_layers(model)
    work = work_of(model, layers, recomputed=False)
    assert work is not None
    trained = [*(layers.layers[i] for i in active), *(unit for unit in layers.roles if unit.name in roles)]
    model.requires_grad_(False)
    for unit in trained:
        for _, param in unit.params:
            param.requires_grad_(True)
    ids = torch.arange(12).view(2, 6)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    whole = replace(work, attention=2 * work.attention)
    assert counter.get_total_flops() == whole.flops(active, roles, Positions(12, 0, 72))


def test_torch_counts_the_same_flops_with_adapters():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False, attn_implementation="eager"))
    config = GrassConfig(active_layers=2, adapters={"rank": 2, "alpha": 4}, always_active=())
    add_adapters(model, config)
    layers = layers_of(model, config)
    work = work_of(model, layers, recomputed=False)
    assert work is not None and work.adapters == sum(p.numel() for _, p in adapter_parameters(model)) > 0
    ids = torch.arange(12).view(2, 6)
    for roles, active in ((("adapters",), (0, 2)), ((), (2, 3))):
        wanted = {id(p) for i in active for _, p in layers.layers[i].params}
        wanted |= {id(p) for _, p in adapter_parameters(model) if roles}
        for param in model.parameters():
            param.requires_grad_(id(param) in wanted)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, labels=ids).loss.backward()
        whole = replace(work, attention=2 * work.attention)
        assert counter.get_total_flops() == whole.flops(active, roles, Positions(12, 0, 72)), roles


def test_models_that_are_counted_otherwise_are_left_out():
    bert = BertForMaskedLM(BertConfig(**SIZES))
    work = work_of(bert, find_layers(bert), recomputed=True)
    assert work is not None and (work.attention, work.tied, work.recomputed) == (16, True, True)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2))
    sizes = {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    for other in (t5, MixtralForCausalLM(MixtralConfig(**sizes)), torch.nn.ModuleList([torch.nn.Linear(2, 2)] * 2)):
        layers: Any = find_layers(other) if other in (t5,) else SimpleNamespace(stacks=("x",), layers=())
        if isinstance(other, MixtralForCausalLM):
            layers = find_layers(other)
        assert work_of(other, layers, recomputed=False) is None


def test_positions_and_padding_are_counted():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    batches = [{"input_ids": torch.zeros(2, 3), "attention_mask": mask}, {"input_ids": torch.zeros(1, 4)}]
    assert positions_of(batches) == Positions(10, 2, 34)
    assert positions_of([{"input_features": torch.zeros(2, 80, 30)}]) == Positions(0, 0, 0)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H20", None),
        ("Tesla V100-SXM2-16GB", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
    ],
)
def test_the_peak_is_that_of_the_gpus_name(name: str, peak: float | None):
    assert peak_of(name) == peak and all(value > 1e13 for value in PEAKS.values())


def test_the_share_of_the_peak_is_of_all_ranks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    work = ModelWork((10**9,), 0, 0, False, False)
    positions = Positions(1000, 250, 10**6)
    found = Speed(work, torch.device("cuda", 0), torch.bfloat16, 2).of_step([0], (), positions, 9, 0.5)
    assert found["tokens_per_second"] == 1500 and found["flops"] == 6e12 and found["flops_per_second"] == 12e12
    assert found["mfu"] == pytest.approx(12 / 312 / 2)
    assert speed.told(found) == "1,500 tokens/s, 12 TFLOP/s, 1.9% of the peak"
    for device, dtype in (("cpu", torch.bfloat16), ("cuda:0", torch.float32)):
        found = Speed(work, torch.device(device), dtype, 2).of_step([0], (), positions, 9, 0.5)
        assert found["mfu"] is None and speed.told(found) == "1,500 tokens/s, 12 TFLOP/s"
    found = Speed(None, torch.device("cpu"), torch.float32, 1).of_step([0], (), Positions(0, 0, 0), 9, 0.5)
    assert speed.told(found) == "18 tokens/s" and found["flops"] is None


def test_lanes_are_times_of_the_stream_that_computes(monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    device = {"events": 0}  # that it has come to

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.number = len(seen)

        def record(self, stream: Any) -> None:
            seen.append(stream)

        def query(self) -> bool:
            return self.number < device["events"]

        def elapsed_time(self, other: Event) -> float:
            assert other.query(), "the time of an event that has not come"
            return 250.0 * (other.number - self.number) * (1 + self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    lanes = Lanes(torch.device("cuda:1"))
    found = []
    for device["events"] in (2, 5, 9):  # within the first update, within the second one, after the third
        lanes.begin()
        lanes.end("backward")
        lanes.end("update")
        found.append(lanes.seconds())
    assert found == [
        {"backward": 0.25},  # the device has not ended the update
        {"backward": 1.0, "update": 0.5},  # that of the step before
        {"backward": 1.75, "update": 2.0},
    ]
    assert seen == ["stream of cuda:1"] * 9


def test_lanes_on_a_cpu_are_times_of_the_thread():
    lanes = Lanes(torch.device("cpu"))
    for _ in range(2):  # a step forgets the one before
        lanes.begin()
        lanes.end("backward")
        lanes.end("update")
    found = lanes.seconds()
    assert list(found) == ["backward", "update"] and all(took is not None and took >= 0 for took in found.values())
