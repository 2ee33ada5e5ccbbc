"""torchrun --nproc-per-node 4 examples/fsdp2_tp_loop.py

A training loop of your own over two dimensions: `parallelize_module` divides each layer over two ranks, `fully_shard`
shards it over the two pairs, and `GrassOptimizer` trains two layers at a time. The ranks of a pair take the same rows.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

import grass_dist

WORDS, BATCH, LENGTH, STEPS = 100, 4, 16, 20
LLAMA = LlamaConfig(vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4)
GRASS = grass_dist.GrassConfig(active_layers=2, probe_steps=2, sampling_interval=3, update_interval=3)
COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
PLAN = {
    "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
    "lm_head": ColwiseParallel(output_layouts=Replicate()),
    **{f"model.layers.*.{name}": ColwiseParallel() for name in COLUMNS},
    **{f"model.layers.*.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")},
}

device = "cuda" if torch.cuda.is_available() else "cpu"
mesh = init_device_mesh(device, (2, 2), mesh_dim_names=("dp", "tp"))
torch.manual_seed(0)  # the same weights on all ranks
model = LlamaForCausalLM(LLAMA).to(device)
parallelize_module(model, mesh["tp"], PLAN)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh["dp"])
fully_shard(model, mesh=mesh["dp"])
optimizer = grass_dist.GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=GRASS)

torch.manual_seed(mesh.get_local_rank("dp"))  # other rows on each pair
for step in range(1, STEPS + 1):
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
dist.barrier()
dist.destroy_process_group()
