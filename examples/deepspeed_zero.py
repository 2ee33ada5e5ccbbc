"""deepspeed --num_gpus 2 examples/deepspeed_zero.py

DeepSpeed ZeRO: the block "grass" in the ds_config, and `grass_dist.initialize` where `deepspeed.initialize` was.
"""

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import grass_dist

WORDS, BATCH, LENGTH, STEPS = 100, 4, 16, 20
LLAMA = LlamaConfig(vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4)
DS_CONFIG = {
    "train_micro_batch_size_per_gpu": BATCH,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
    "grass": {"active_layers": 2, "probe_steps": 2, "sampling_interval": 3, "update_interval": 3},
}

torch.manual_seed(0)  # the same weights on all ranks
model = LlamaForCausalLM(LLAMA)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
engine, *_ = grass_dist.initialize(model=model, optimizer=optimizer, config=DS_CONFIG)

torch.manual_seed(dist.get_rank())  # other rows on each rank
for step in range(1, STEPS + 1):
    first = torch.randint(WORDS, (BATCH, 1), device=engine.device)
    rows = (first + torch.arange(LENGTH, device=engine.device)) % WORDS  # each row counts upwards
    layers = engine.grass.active_layers if engine.grass.phase == "train" else ()  # none in the probe
    loss = engine(input_ids=rows, labels=rows).loss
    engine.backward(loss)
    engine.step()
    if dist.get_rank() == 0:
        print(f"step {step}: trained layers {list(layers)}, loss {loss.item():.3f}")
engine.destroy()
dist.barrier()
dist.destroy_process_group()
