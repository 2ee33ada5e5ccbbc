"""Every option of `TrainingArguments` that touches training: with all layers it is stock's run, or it is refused.

Each option runs three times: without GRASS; with GRASS and all layers, which must give the same weights, rows of the
log and files; and with two layers, of which the others must not move.
"""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import grass_dist
from grass_dist.backends.zero.jit import spare_the_compiler
from grass_dist.checkpoint.marker import MARKER
from integration_tests.support.model import LAYERS, small_llama
from integration_tests.support.ranks import run_ranks
from integration_tests.test_trainer import arguments, data, ds_config

pytestmark = [pytest.mark.long, pytest.mark.timeout(3000)]

STEPS = 4
ROLES = ("embeddings", "final_norm", "lm_head")
WHOLE = {"active_layers": LAYERS, "probe_steps": 0, "sampling_interval": 2, "always_active": ROLES}
DRAWN = {"active_layers": 2, "probe_steps": 1, "sampling_interval": 2, "update_interval": 2}

SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr": 1e-5},
    "warmup_stable_decay": {"num_decay_steps": 1, "num_stable_steps": 2},
}
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "ademamix", "galore_adamw")
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
SAVED = {"save_strategy": "steps", "save_steps": 2}
BF16 = {"bf16": True, "max_grad_norm": 0.0}
"""Without clipping: ZeRO adds up the norm in another order, and its last bit then decides how a weight is rounded."""

OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    **{f"lr_scheduler_type={k}": {"lr_scheduler_type": k, "lr_scheduler_kwargs": v} for k, v in SCHEDULES.items()},
    "reduce_lr_on_plateau": {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss", **EVALUATED},
    "warmup_steps": {"warmup_steps": 2},
    "warmup_steps as a ratio": {"warmup_steps": 0.5},
    **{f"optim={name}": {"optim": name} for name in OPTIMIZERS},
    "optim_args": {"optim": "rmsprop", "optim_args": "momentum=0.5,centered=True"},
    "weight_decay": {"weight_decay": 0.3},
    "betas and epsilon": {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-4},
    "one micro-batch": {"gradient_accumulation_steps": 1},
    "four micro-batches": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
    "average_tokens_across_devices": {"average_tokens_across_devices": True},
    "no clipping": {"max_grad_norm": 0.0},
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "bf16": BF16,
    "fp16": {"fp16": True, "max_grad_norm": 0.0},
    "bf16_full_eval": {**BF16, "bf16_full_eval": True, **EVALUATED},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "activation_checkpointing": {"activation_checkpointing": True},
    "torch_compile": {"torch_compile": True, "torch_compile_backend": "eager"},
    "use_liger_kernel": {"use_liger_kernel": True},
    "use_cache": {"use_cache": True},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
    "torch_empty_cache_steps": {"torch_empty_cache_steps": 1},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "logging_strategy=epoch": {"logging_strategy": "epoch"},
    "logging_steps": {"logging_steps": 3},
    "logging_first_step": {"logging_steps": 3, "logging_first_step": True},
    "logging_nan_inf_filter": {"logging_nan_inf_filter": False},
    "log_on_each_node": {"log_on_each_node": False},
    "include_num_input_tokens_seen": {"include_num_input_tokens_seen": "all"},
    "eval_strategy=epoch": {"eval_strategy": "epoch"},
    "eval_steps": EVALUATED,
    "eval_delay": {"eval_delay": 3, **EVALUATED},
    "eval_on_start": {"eval_on_start": True, **EVALUATED},
    "eval_accumulation_steps": {"eval_accumulation_steps": 1, **EVALUATED},
    "prediction_loss_only": {"prediction_loss_only": True, **EVALUATED},
    "batch_eval_metrics": {"batch_eval_metrics": True, **EVALUATED},
    "save_steps": SAVED,
    "save_only_model": {"save_only_model": True, **SAVED},
    "save_total_limit": {"save_total_limit": 1, **SAVED},
    "save_strategy=best": {"save_strategy": "best", "metric_for_best_model": "loss", **EVALUATED},
    "save_on_each_node": {"save_on_each_node": True, **SAVED},
    "load_best_model_at_end": {"load_best_model_at_end": True, **EVALUATED, **SAVED},
    "enable_jit_checkpoint": {"enable_jit_checkpoint": True},
    "full_determinism": {"full_determinism": False, "seed": 7},
    "data_seed": {"data_seed": 5, "train_sampling_strategy": "random"},
    "train_sampling_strategy": {"train_sampling_strategy": "group_by_length"},
    "num_train_epochs": {"max_steps": -1, "num_train_epochs": 2},
    "max_steps over an epoch's end": {"max_steps": STEPS + 3},
    **{
        f"accelerator_config: {name}={value}": {"accelerator_config": {name: value}}
        for name, value in (
            ("split_batches", True),
            ("dispatch_batches", True),
            ("even_batches", False),
            ("use_seedable_sampler", False),
            ("non_blocking", True),
        )
    },
    "sync_each_batch": {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}},
    "dataloader_drop_last": {"dataloader_drop_last": True},
    "dataloader_num_workers": {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2},
    "dataloader_pin_memory": {"dataloader_pin_memory": False},
    "remove_unused_columns": {"remove_unused_columns": False},
    "ddp_find_unused_parameters": {"ddp_find_unused_parameters": True},
    "ddp_bucket_cap_mb": {"ddp_bucket_cap_mb": 1},
    "ddp_broadcast_buffers": {"ddp_broadcast_buffers": True},
    "ddp_static_graph": {"ddp_static_graph": True},
    "skip_memory_metrics": {"skip_memory_metrics": False},
    "debug=underflow_overflow": {"debug": "underflow_overflow"},
}

MODES: dict[str, int | None] = {"one process": None, "ddp": None, "zero2": 2, "zero3": 3}

Run = dict[str, Any]


def one_run(folder: Path, world_size: int, stage: int | None, option: Mapping[str, Any], grass: dict | None) -> Run:
    """Trains, and gives back weights, rows of the log, and the names of what was saved; or the error that came."""
    model, engine = small_llama(), None
    try:
        more = {} if stage is None else {"deepspeed": ds_config(stage)}
        args = arguments(folder, world_size, **{"max_steps": STEPS, **more, **copy.deepcopy(option)})
        if grass is not None:
            grass_dist.enable(grass_dist.GrassConfig(**grass))
        trainer = Trainer(model, args, train_dataset=data(STEPS), eval_dataset=data(1))
        trainer.train()
        engine = trainer.model_wrapped if stage is not None else None
        if engine is not None:
            engine.empty_partition_cache()  # an evaluation leaves parameters in flight, in stock, too
        return {
            "params": {name: whole_of(p) for name, p in model.named_parameters()},
            "rows": [comparable(row) for row in trainer.state.log_history],
            "files": saved_files(folder),
            "step": trainer.state.global_step,
        }
    except Exception as error:
        return {"error": error}
    finally:
        grass_dist.disable()
        if engine is not None and grass is None:
            engine.destroy()


def whole_of(param: torch.nn.Parameter) -> torch.Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_id")):
        return param.detach().float().clone()


def comparable(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says of the training, and not of its time or its memory."""
    timed = ("runtime", "per_second", "mem_", "total_flos", "grass/")
    return {key: value for key, value in row.items() if not any(part in key for part in timed)}


def saved_files(folder: Path) -> list[str]:
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return sorted(name for name in found if MARKER not in name)


def judge(stock: Run, whole: Run, drawn: Run) -> str:
    """One word for what an option does, and a sentence where there is more to say."""
    if "error" in stock:
        same = all("error" in run for run in (whole, drawn))
        return f"fails as stock: {first_line(stock['error'])}" if same else "WRONG: works where stock fails"
    errors = [run["error"] for run in (whole, drawn) if "error" in run]
    if errors:
        if len(errors) == 2 and all(isinstance(e, grass_dist.GrassError) for e in errors):
            return f"refused: {first_line(errors[0])}"
        return f"WRONG: {type(errors[0]).__name__}: {first_line(errors[0])}"
    worst = max((whole["params"][name] - p).abs().max().item() for name, p in stock["params"].items())
    if not worst <= 2e-6:
        return f"WRONG: all layers, and weights differ by {worst:.1e}"
    if (whole["step"], whole["files"]) != (stock["step"], stock["files"]):
        return f"WRONG: other files or steps: {sorted(set(whole['files']) ^ set(stock['files']))}, {whole['step']}"
    if differs := rows_differ(stock["rows"], whole["rows"]):
        return f"WRONG: {differs}"
    return unmoved(drawn) or ("as stock, to the bit" if worst == 0 else "as stock, within 2e-6")


def rows_differ(stock: list[dict], ours: list[dict]) -> str | None:
    """Rows of a switch are more than stock's; those of the same steps are compared, but for mean losses.

    Trainer averages over the ranks what it logs, and adds the rank's own loss of the steps since then to train_loss.
    """
    of_stock = {(row["step"], "eval_loss" in row): row for row in stock}
    of_ours = {(row["step"], "eval_loss" in row): row for row in ours}
    if missing := of_stock.keys() - of_ours.keys():
        return f"rows of {sorted(missing)} are missing"
    more = of_ours.keys() != of_stock.keys()
    for at, row in of_stock.items():
        for key, value in row.items():
            if more and key in ("loss", "grad_norm", "train_loss"):
                continue
            if (there := of_ours[at].get(key)) != pytest.approx(value, rel=1e-4, abs=1e-7):
                return f"{key} at {at} is {there} and not {value}"
    return None


def unmoved(drawn: Run) -> str | None:
    """What is wrong with a run of two layers: one that was frozen has moved, or none has trained."""
    starts = [dict(small_llama(dtype).named_parameters()) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    moved = {n for n, p in drawn["params"].items() if all(not torch.equal(p, start[n].float()) for start in starts)}
    layers = {name.split(".")[2] for name in moved if ".layers." in name}
    if not 2 <= len(layers) <= 2 * math.ceil((drawn["step"] + 1) / 2):
        return f"WRONG: layers {sorted(layers)} have moved in {drawn['step']} steps"
    return None


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:150] if str(error).strip() else type(error).__name__


def try_options(rank: int, world_size: int, folder: str, stage: int | None) -> dict[str, str]:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if stage is not None:
        spare_the_compiler({})
    found = {}
    for number, (name, option) in enumerate(OPTIONS.items()):
        runs = [
            one_run(Path(folder) / f"{number}" / str(at), world_size, stage, option, grass)
            for at, grass in enumerate((None, WHOLE, DRAWN))
        ]
        found[name] = judge(*runs)
        if rank == 0:
            print(f"{name:45s} {found[name]}", flush=True)
    return found


@pytest.mark.parametrize("mode", MODES)
def test_every_option_of_trainer_is_stocks_or_refused(mode, tmp_path):
    if mode == "one process":
        ranks = [try_options(0, 1, str(tmp_path), None)]
    else:
        ranks = run_ranks(2, try_options, str(tmp_path), MODES[mode], timeout=2900)
    counts = Counter(outcome.split(":")[0] for outcome in ranks[0].values())
    print(f"{mode}: {len(OPTIONS)} options: " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common()))
    wrong = {name: outcome for rank in ranks for name, outcome in rank.items() if outcome.startswith("WRONG")}
    assert not wrong
