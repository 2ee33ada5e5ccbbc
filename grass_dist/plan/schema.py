"""Writes the JSON of ``grass-dist plan --json FILE``, in flat names with their units.

version, model, params, num_layers, gpus, gpus_per_host, hosts, gpu_memory_bytes, seq_len_tokens, micro_batch,
accumulation, backend, replicate, offload, weights, logits, dtype, activation_checkpointing, always_active,
sampling_interval_steps

speeds         flop_per_s, flop_share, device_bytes_per_s, pcie_bytes_per_s, within_bytes_per_s, across_bytes_per_s,
               within_latency_s, across_latency_s, and measured: the names of those that the doctor measured
rows           one for each method: method (full, lora, lisa, grass), active_layers, fits, simulated (whether memory is
               of the simulation), moment (of the peak); then of a GPU at that moment weights_bytes,
               gradients_bytes, states_bytes, activations_bytes, buffers_bytes, allowance_bytes, runtime_bytes, and
               their sum peak_bytes; allocated_bytes is what max_memory_allocated would tell, and
               closed_form_bytes the same by the closed form;
               host_pinned_bytes (of a host); pcie_bytes_per_step (of states, each way, of a GPU), weight_bytes_per_step
               (of weights, to a GPU), within_hosts_bytes_per_step and across_hosts_bytes_per_step (of all ranks
               together); compute_s, update_s, network_s, network_hidden_s,
               pcie_s, pcie_hidden_s, step_s, tokens_per_s (of all ranks), relative_to_full (step time)
recommended    null, or active_layers of the row that is recommended
most_layers    the largest γ that fits; 0: none
sentences      what is printed below the tables
scale          with --scale: each backend, gpus, step_s, efficiency, fits
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from grass_dist.plan.choose import Choice, Estimate
from grass_dist.plan.cost import LANES
from grass_dist.plan.memory import PARTS, memory_of
from grass_dist.plan.scale import Point
from grass_dist.plan.shape import ModelShape
from grass_dist.plan.speeds import Speeds

VERSION = 1
_OF_RUN = (
    "gpus",
    "gpus_per_host",
    "micro_batch",
    "accumulation",
    "backend",
    "replicate",
    "offload",
    "weights",
    "logits",
    "dtype",
)
_UNPRINTED = ("device_bytes", "pinnable_bytes")


def plan_json(shape: ModelShape, choice: Choice, speeds: Speeds, points: Sequence[Point]) -> dict[str, Any]:
    """Returns the object that the module describes, with values that JSON can hold."""
    run, recommended = choice.run, choice.recommended
    full = next(row for row in choice.rows if row.method.name == "full")
    return {
        "version": VERSION,
        "model": shape.name,
        "params": shape.numel,
        "num_layers": shape.num_layers,
        **{name: getattr(run, name) for name in _OF_RUN},
        "hosts": run.num_hosts,
        "gpu_memory_bytes": run.gpu_bytes,
        "seq_len_tokens": run.seq_len,
        "activation_checkpointing": run.checkpointing,
        "always_active": list(run.roles),
        "sampling_interval_steps": run.sampling_interval,
        "speeds": {name: value for name, value in asdict(speeds).items() if name not in _UNPRINTED},
        "rows": [_row(shape, row, full) for row in choice.rows],
        "recommended": recommended and recommended.method.active_layers,
        "most_layers": most_layers(choice.rows),
        "sentences": list(choice.sentences),
        "scale": [asdict(point) for point in points],
    }


def most_layers(rows: Sequence[Estimate]) -> int:
    """Returns the largest γ with which GRASS fits; 0 if none does."""
    return max((r.method.active_layers for r in rows if r.method.name == "grass" and r.fits), default=0)


def _row(shape: ModelShape, row: Estimate, full: Estimate) -> dict[str, Any]:
    memory, time = row.memory, row.time
    return {
        "method": row.method.name,
        "active_layers": row.method.active_layers,
        "fits": row.fits,
        "simulated": memory.simulated,
        "moment": memory.moment,
        **{f"{part}_bytes": getattr(memory, part) for part in (*PARTS, "allowance", "runtime", "allocated")},
        "peak_bytes": memory.total,
        "closed_form_bytes": memory_of(shape, row.run, row.method).allocated,
        "host_pinned_bytes": row.host_bytes,
        "pcie_bytes_per_step": row.moved.pcie,
        "weight_bytes_per_step": row.moved.weights,
        "within_hosts_bytes_per_step": row.moved.within,
        "across_hosts_bytes_per_step": row.moved.across,
        **{f"{lane}_s": getattr(time, lane) for lane in LANES},
        "step_s": time.total,
        "tokens_per_s": time.tokens_per_s,
        "relative_to_full": time.total / full.time.total,
    }
