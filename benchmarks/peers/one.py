"""One training of one method: python -m benchmarks.peers.one METHOD LR SEED --data FILE --out FILE.json

With ``--judge`` its answers to the test sets instead, from the weights that the training has left beside the file.
Weights, gradients and states are float32; the matrix products are bfloat16, by autocast. Under torchrun the ranks
divide each batch, by DistributedDataParallel; what is measured is then of rank 0.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers.methods import MAKERS, Method, nbytes
from benchmarks.peers.regimes import REGIMES, Regime
from benchmarks.peers.task import (
    TESTS,
    accuracy,
    batches,
    held_out_loss,
    load_model,
    load_tokenizer,
    on_device,
    training_data,
)

CLIP = 1.0


def weights_of(out: Path) -> Path:
    return out.with_suffix(".weights")


def own_part(batch: dict[str, torch.Tensor], rank: int, ranks: int) -> tuple[dict[str, torch.Tensor], float]:
    """A rank's problems of a batch, and the factor by which its loss becomes the batch's in the mean over ranks."""
    own = {name: tensor[rank::ranks] for name, tensor in batch.items()}
    labelled = [int((some["labels"][:, 1:] != -100).sum()) for some in (own, batch)]
    return own, labelled[0] / labelled[1] * ranks


def mean_over_ranks(value: torch.Tensor) -> float:
    if not dist.is_initialized():
        return value.item()
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


def step(method: Method, batch: dict[str, torch.Tensor]) -> tuple[float, int, int]:
    """One step; its loss, and bytes and entries of the gradients that were there before the update."""
    ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own, share = own_part(batch, *ranks)
    device = next(method.model.parameters()).device
    own = on_device(own, device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = method.model(**own, use_cache=False).loss * share
    loss.backward()
    grads = [p.grad for p in method.model.parameters() if p.grad is not None]
    held, entries = nbytes(grads), sum(g.numel() for g in grads) + method.measured()
    method.clip(CLIP)
    method.optimizer.step()
    method.optimizer.zero_grad()
    return mean_over_ranks(loss.detach()), held, entries


def train(method: Method, whole: int, data: Any, tokenizer: Any, seed: int, regime: Regime) -> dict[str, Any]:
    """Trains it; what it lost, held and would have sent.

    Args:
        whole: parameters of the model as it was loaded.
    """
    scheduler = torch.optim.lr_scheduler.LambdaLR(method.optimizer, regime.rate)
    losses, shares, device, host = [], [], 0, 0
    method.model.train()
    for _, batch in zip(range(regime.steps), batches(data, tokenizer, seed, regime.batch), strict=False):
        loss, held, entries = step(method, batch)
        device = max(device, nbytes(method.model.parameters()) + held + method.states() + method.extra())
        host = max(host, method.host())
        scheduler.step()
        losses.append(loss)
        shares.append(entries / whole)
        assert math.isfinite(losses[0]), "the first loss is not finite"
    return {
        "losses": losses,
        "device_bytes": device,
        "host_bytes": host,
        "reduced_share": sum(shares) / len(shares),
    }


def bare(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def write(file: Path, told: dict[str, Any]) -> None:
    half = file.with_suffix(".part")
    half.write_text(json.dumps(told) + "\n")
    os.replace(half, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("method", choices=MAKERS)
    parser.add_argument("lr", type=float)
    parser.add_argument("seed", type=int)
    parser.add_argument("--data", type=Path, required=True, help="training problems; the test sets lie beside it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="packaged:smollm2-135m")
    parser.add_argument("--regime", choices=REGIMES, default="short")
    parser.add_argument("--steps", type=int, help="other than the regime's")
    parser.add_argument("--judge", action="store_true")
    args = parser.parse_args()
    regime = REGIMES[args.regime]
    if args.steps is not None:
        regime = replace(regime, steps=args.steps)
    device = torch.device(regime.device if torch.cuda.is_available() else "cpu")

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model).to(device)
    whole = sum(p.numel() for p in model.parameters())
    method = MAKERS[args.method](model, args.lr, regime, args.seed)
    weights = weights_of(args.out)
    if args.judge:
        method.model.load_state_dict(torch.load(weights))
        judged = method.model.to(torch.bfloat16).eval()
        right = {name: accuracy(judged, tokenizer, args.data.parent / name, regime.questions) for name in TESTS}
        write(args.out, json.loads(args.out.read_text()) | {"accuracy": right})
        weights.unlink()
        return
    data = training_data(args.data, tokenizer)
    told = train(method, whole, data, tokenizer, args.seed, regime)
    if ranks > 1:
        rank = dist.get_rank()
        dist.barrier()
        dist.destroy_process_group()
        if rank:
            return
    model = bare(method.model).eval()
    if regime.questions:
        torch.save(model.state_dict(), weights)
    told |= {
        "method": args.method,
        "lr": args.lr,
        "seed": args.seed,
        "steps": regime.steps,
        "settings": method.notes,
        "ranks": ranks,
        "held_out_loss": held_out_loss(model, data, tokenizer, device),
        "torch": torch.__version__,
    }
    write(args.out, told)


if __name__ == "__main__":
    main()
