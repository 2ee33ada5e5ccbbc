"""torchrun --nproc-per-node 2 examples/accelerate_loop.py

A loop over Accelerate: `grass_dist.enable` before the optimizer is prepared. The rest is what it is without GRASS.
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import grass_dist

WORDS, BATCH, LENGTH, STEPS = 100, 4, 16, 20
LLAMA = LlamaConfig(vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4)
GRASS = grass_dist.GrassConfig(active_layers=2, probe_steps=2, sampling_interval=3, update_interval=3)

grass_dist.enable(GRASS)
accelerator = Accelerator(cpu=not torch.cuda.is_available())  # without cpu=True each rank on a CPU trains alone
torch.manual_seed(0)  # the same weights and rows on all ranks
first = torch.randint(WORDS, (accelerator.num_processes * STEPS * BATCH, 1))
rows = (first + torch.arange(LENGTH)) % WORDS  # each row counts upwards
model = LlamaForCausalLM(LLAMA)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=BATCH))
grass = optimizer.optimizer.grass

for step, batch in enumerate(loader, start=1):
    layers = grass.active_layers if grass.phase == "train" else ()  # none in the probe
    loss = model(input_ids=batch, labels=batch).loss
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"step {step}: trained layers {list(layers)}, loss {loss.item():.3f}")
accelerator.wait_for_everyone()
accelerator.end_training()
