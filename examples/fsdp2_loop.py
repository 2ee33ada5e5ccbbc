"""torchrun --nproc-per-node 2 examples/fsdp2_loop.py

A training loop of your own: `fully_shard` shards the model, and `GrassOptimizer` trains two of its layers at a time.
Checkpoints are written while training goes on; started again, it goes on from the newest one in runs/fsdp2_loop.
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import grass_dist

FOLDER, WORDS, BATCH, LENGTH, STEPS = "runs/fsdp2_loop", 100, 4, 16, 20
LLAMA = LlamaConfig(vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4)
GRASS = grass_dist.GrassConfig(active_layers=2, probe_steps=2, sampling_interval=3, update_interval=3)

device = "cuda" if torch.cuda.is_available() else "cpu"
mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))
torch.manual_seed(0)  # the same weights on all ranks
model = LlamaForCausalLM(LLAMA).to(device)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = grass_dist.GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=GRASS)

torch.manual_seed(dist.get_rank())  # other rows on each rank
found = grass_dist.load_checkpoint(FOLDER, optimizer)  # the generators too
start = found[0] if found else 0
with grass_dist.AsyncCheckpointer(FOLDER, optimizer, keep=2) as checkpointer:
    for step in range(start + 1, STEPS + 1):
        first = torch.randint(WORDS, (BATCH, 1), device=device)
        rows = (first + torch.arange(LENGTH, device=device)) % WORDS  # each row counts upwards
        layers = optimizer.grass.active_layers if optimizer.grass.phase == "train" else ()  # none in the probe
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step}: trained layers {list(layers)}, loss {loss.item():.3f}")
        if step % 5 == 0:
            checkpointer.save(step)
dist.barrier()
dist.destroy_process_group()
