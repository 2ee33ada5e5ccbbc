"""What the parts share: a random Llama, GRASS over it, and steps with batches by their number."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import grass_dist
from benchmarks.gpu.told import Told

MODES: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "interval": {"mode": "interval"},
    "stream": {"mode": "stream", "slots": 2},
    "stream, in backward": {"mode": "stream", "slots": 2, "update_in_backward": True},
}
CYCLIC: dict[str, Any] = {
    "active_layers": 2,
    "sampler": "cyclic",
    "probe_steps": 0,
    "sampling_interval": 4,
    "update_interval": 4,
}


def device(told: Told) -> torch.device:
    return torch.device("cpu") if told.tiny else torch.device("cuda", 0)


def llama(
    told: Told,
    *,
    layers: int = 12,
    width: int = 1024,
    inner: int = 2816,
    vocabulary: int = 8192,
    dtype: torch.dtype = torch.bfloat16,
    attention: str = "eager",
    small: tuple[int, int, int, int] = (6, 32, 48, 64),
) -> nn.Module:
    """A Llama with the random weights of seed 0, on the device.

    Args:
        small: most layers, and width, inner width and vocabulary, with ``--tiny``. What is odd stays odd.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if told.tiny:
        most, width, *even = small
        layers, inner, vocabulary = min(layers, most), even[0] + inner % 2, even[1] + vocabulary % 2
    heads = max(4, width // 128)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device(told):
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(before)


def grass(
    model: nn.Module, offload: dict[str, Any], adamw: dict[str, Any] | None = None, **settings: Any
) -> grass_dist.GrassOptimizer:
    """GRASS over AdamW without decay: by default two layers in turn, four steps each."""
    config = grass_dist.GrassConfig(**{**CYCLIC, **settings, "offload": offload})
    return grass_dist.GrassOptimizer(
        model, torch.optim.AdamW, {"lr": 1e-4, "weight_decay": 0.0, **(adamw or {})}, config=config
    )


def batch(told: Told, model: Any, step: int, rows: int = 2, length: int = 128) -> torch.Tensor:
    """Random tokens [rows, length] of a step, the same in every run."""
    generator = torch.Generator().manual_seed(step)
    shape = (rows, 12 if told.tiny else length)
    return torch.randint(0, model.config.vocab_size, shape, generator=generator).to(device(told))


def loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def train(told: Told, model: nn.Module, optimizer: grass_dist.GrassOptimizer, steps: range, **shape: int) -> None:
    """Takes steps, with clipping unless layers are updated in the backward."""
    clips = not optimizer.grass.config.offload.update_in_backward
    for step in steps:
        loss(model, batch(told, model, step, **shape)).backward()
        if clips:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> list[torch.Tensor]:
    """Copies of all weights, whole, on the host."""
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters())
    return [p.detach().cpu().clone() for p in whole]  # type: ignore[union-attr]


def apart(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest difference of two weights; infinite if one is not finite."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        difference = (a.double() - b.double()).abs().max().item()
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def synchronize(told: Told) -> None:
    if not told.tiny:
        torch.cuda.synchronize()


def free(told: Told, *optimizers: Any) -> None:
    """Gives memory back to the device; the caller has let go of the models."""
    import gc

    for optimizer in optimizers:
        optimizer.grass.states.settle()
    gc.collect()
    if not told.tiny:
        torch.cuda.empty_cache()


@contextlib.contextmanager
def to_the_bit() -> Iterator[None]:
    """Kernels that give the same result each time. Memory that was just allocated is filled by them, too."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def join_alone(told: Told) -> None:
    """Makes this process the one rank of a process group: NCCL on a GPU, gloo on the CPU."""
    if not told.tiny:
        torch.cuda.set_device(0)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    store = dist.FileStore(str(Path(tempfile.mkdtemp()) / "store"), 1)
    dist.init_process_group("gloo" if told.tiny else "nccl", store=store, rank=0, world_size=1)


def shard(told: Told, model: Any) -> nn.Module:
    """The model under FSDP2, a group for each layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device(told).type, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def sleep(milliseconds: float) -> None:
    """Keeps the compute stream busy for so long; the host goes on.

    ``torch.cuda._sleep`` is private, and there is no public kernel that waits. It counts cycles of the GPU's clock,
    here taken to be 1.7 GHz; what the parts show does not depend on it. It is in torch 2.13.
    """
    torch.cuda._sleep(int(milliseconds * 1.7e6))
