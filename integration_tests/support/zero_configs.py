"""ZeRO configurations as people have them, in the words of their tools: only what a file of theirs would hold."""

from __future__ import annotations

from typing import Any

AUTO: dict[str, Any] = {
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}
"""What Trainer fills in."""
CPU = {"device": "cpu", "pin_memory": True}
FP16 = {
    "enabled": "auto",
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "initial_scale_power": 16,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
HALVES = {"fp16": FP16, "bf16": {"enabled": "auto"}}
ADAMW = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
WARMUP = {"type": "WarmupLR", "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")}
DECAY = {"type": "WarmupDecayLR", "params": {**WARMUP["params"], "total_num_steps": "auto"}}
TWO = {
    "stage": 2,
    "allgather_partitions": True,
    "allgather_bucket_size": 2e8,
    "overlap_comm": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 2e8,
    "contiguous_gradients": True,
}
THREE = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}

CONFIGS: dict[str, dict[str, Any]] = {
    # as the pages of transformers on DeepSpeed have them
    "transformers, stage 1": {**AUTO, **HALVES, "zero_optimization": {"stage": 1}},
    "transformers, stage 2": {
        **AUTO, **HALVES, "optimizer": ADAMW, "scheduler": WARMUP, "zero_optimization": TWO,
        "steps_per_print": 2000, "wall_clock_breakdown": False,
    },
    "transformers, stage 2 with the optimizer on the host": {
        **AUTO, **HALVES, "optimizer": ADAMW, "scheduler": WARMUP,
        "zero_optimization": {**TWO, "offload_optimizer": CPU},
    },
    "transformers, stage 3": {
        **AUTO, **HALVES, "optimizer": ADAMW, "scheduler": WARMUP, "zero_optimization": THREE,
    },
    "transformers, stage 3 with all on the host": {
        **AUTO, **HALVES, "optimizer": ADAMW, "scheduler": DECAY, "steps_per_print": 2000,
        "zero_optimization": {**THREE, "offload_optimizer": CPU, "offload_param": CPU}, "wall_clock_breakdown": False,
    },
    # as the examples of LLaMA-Factory have them: Trainer's optimizer and schedule
    "LLaMA-Factory, stage 2 with the optimizer on the host": {
        **AUTO, **HALVES, "zero_allow_untested_optimizer": True,
        "zero_optimization": {**TWO, "offload_optimizer": CPU, "round_robin_gradients": True},
    },
    "LLaMA-Factory, stage 3 with all on the host": {
        **AUTO, **HALVES, "zero_allow_untested_optimizer": True,
        "zero_optimization": {**THREE, "overlap_comm": False, "offload_optimizer": CPU, "offload_param": CPU},
    },
    # as axolotl has them
    "axolotl, stage 1 with bf16": {
        **AUTO, "bf16": {"enabled": True}, "fp16": {**FP16, "auto_cast": False},
        "zero_optimization": {"stage": 1, "overlap_comm": True}, "wall_clock_breakdown": False,
    },
    "axolotl, stage 3 with bf16 and all on the host": {
        **AUTO, "bf16": {"enabled": True}, "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            **THREE, "sub_group_size": 0, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"},
        },
    },
    # as DeepSpeed's chat example makes them
    "DeepSpeed's examples, stage 3": {
        **AUTO, "bf16": {"enabled": True}, "steps_per_print": 10, "prescale_gradients": False,
        "wall_clock_breakdown": False,
        "hybrid_engine": {"enabled": False, "max_out_tokens": 512, "release_inference_cache": False},
        "zero_optimization": {
            "stage": 3, "offload_param": {"device": "none"}, "offload_optimizer": {"device": "none"},
            "stage3_param_persistence_threshold": 1e4, "stage3_max_live_parameters": 3e7,
            "stage3_prefetch_bucket_size": 3e7, "memory_efficient_linear": False,
        },
    },
}  # fmt: skip
