"""torchrun --nproc-per-node 2 examples/esmfold_trunk.py

ESMFold: the blocks of its folding trunk are the layers, two of them train at a time, and its language model is frozen.
FSDP2 under torchrun; `python examples/esmfold_trunk.py` trains in one process. An argument names another folder with a
proteins.fasta, and with a NAME.pdb for each chain whose structure is known.
"""

import functools
import json
import math
import os
import random
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import EsmConfig, EsmForProteinFolding

import grass_dist

FOLDER = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "data"
CROP, BATCH, STEPS, RESIDUES = 20, 2, 20, "ARNDCQEGHILKMFPSTWYVX"  # ESMFold's order of residues
HEADS = {"sequence_dim": 32, "pairwise_dim": 16, "ipa_dim": 8, "num_heads_ipa": 2, "resnet_dim": 16, "num_blocks": 2}
TRUNK = {"num_blocks": 6, "sequence_state_dim": 64, "pairwise_state_dim": 32, "structure_module": HEADS}
ESM = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 33}
ESM |= {"position_embedding_type": "rotary", "token_dropout": True, "pad_token_id": 1, "mask_token_id": 32}
CONFIG = Path(__file__).parent.parent / "configs/esmfold_trunk.json"  # freezes heads that this loss does not reach
GRASS = grass_dist.GrassConfig(**json.loads(CONFIG.read_text()))


def read_fasta(file: Path) -> dict[str, str]:
    records = (record.splitlines() for record in file.read_text().split(">")[1:])
    return {head.split()[0]: "".join(rows) for head, *rows in records}


def distances(name: str, length: int) -> torch.Tensor:
    """Distances between the C-alpha atoms in Å, (length, length): of NAME.pdb, else of an ideal alpha helix.

    No structure comes with this example, and a helix is wrong for most of its chains: it shows that training runs, and
    nothing about proteins.
    """
    if (file := FOLDER / f"{name}.pdb").exists():
        rows = [row for row in file.read_text().splitlines() if row.startswith("ATOM") and row[12:16] == " CA "]
        atoms = torch.tensor([[float(row[at : at + 8]) for at in (30, 38, 46)] for row in rows])
    else:  # 3.6 residues and 5.4 Å a turn, at 2.3 Å from its axis
        turn = torch.arange(length) * (2 * math.pi / 3.6)
        atoms = torch.stack([2.3 * turn.cos(), 2.3 * turn.sin(), torch.arange(length) * 1.5], -1)
    return torch.cdist(atoms, atoms)


def folding_loss(found, true: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the distogram, in 64 bins from 2 to 22 Å, and the error of the distances in what was folded.

    The published loss has C-beta distances in the first, and frames and all atoms (FAPE) in place of the second.
    """
    bins = torch.bucketize(true, torch.linspace(2.3125, 21.6875, 63, device=true.device))
    folded = found.positions[-1][:, :, 1]  # C-alpha atoms after the last block of the structure module
    error = (torch.cdist(folded, folded) - true).abs().clamp(max=10).mean() / 10
    return F.cross_entropy(found.distogram_logits.flatten(0, 2), bins.flatten()) + error


device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)  # the same weights on all ranks
config = EsmConfig(**ESM, hidden_dropout_prob=0.0, is_folding_model=True, esmfold_config={"trunk": TRUNK})
model = EsmForProteinFolding(config).to(device)  # `from_pretrained("facebook/esmfold_v1")` in earnest; its ESM is fp16
model.esm.requires_grad_(False)
for block in model.trunk.blocks:  # `gradient_checkpointing_enable` would reach only the language model
    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
model.trunk.set_chunk_size(None)  # chunks save memory where nothing is kept for a backward
ranks = int(os.environ.get("WORLD_SIZE", "1"))
if ranks > 1:
    mesh = init_device_mesh(device, (ranks,))
    # Not `model.esm` as a whole: FSDP2 renames the class of what it shards, and by that name transformers knows which
    # hidden states to give to ESMFold.
    for module in (*model.esm.encoder.layer, *model.esm.children(), *model.trunk.blocks, model):
        fully_shard(module, mesh=mesh)
optimizer = grass_dist.GrassOptimizer(model, torch.optim.AdamW, {"lr": 3e-3}, config=GRASS)

chains = {name: chain for name, chain in read_fasta(FOLDER / "proteins.fasta").items() if len(chain) >= CROP}
targets = {name: distances(name, len(chain)) for name, chain in chains.items()}
rank = int(os.environ.get("RANK", "0"))
crops = random.Random(rank)  # other crops on each rank
for step in range(1, STEPS + 1):
    names = crops.choices(list(chains), k=BATCH)
    starts = [crops.randint(0, len(chains[name]) - CROP) for name in names]
    cut = [(name, slice(start, start + CROP)) for name, start in zip(names, starts, strict=True)]
    residues = torch.tensor([[RESIDUES.index(r) for r in chains[name][at]] for name, at in cut], device=device)
    true = torch.stack([targets[name][at, at] for name, at in cut]).to(device)
    layers = optimizer.grass.active_layers if optimizer.grass.phase == "train" else ()  # none in the probe
    found = model(residues, num_recycles=step % 2)  # once or twice through the trunk, the same on all ranks
    loss = folding_loss(found, true)
    loss.backward()
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        print(f"step {step}: trained layers {list(layers)}, loss {loss.item():.3f}")
if ranks > 1:
    dist.barrier()
    dist.destroy_process_group()
