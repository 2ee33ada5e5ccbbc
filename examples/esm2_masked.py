"""torchrun --nproc-per-node 2 examples/esm2_masked.py

ESM-2 learns masked residues of the chains in a FASTA file, under DDP: a loop of your own, two layers at a time.
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import DataCollatorForLanguageModeling, EsmConfig, EsmForMaskedLM, EsmTokenizer

import grass_dist

FASTA, BATCH, LENGTH, STEPS = Path(__file__).parent / "data/proteins.fasta", 4, 32, 20
TOKENS = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]  # those of ESM-2
ESM = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 128}
ESM |= {"position_embedding_type": "rotary", "token_dropout": True, "emb_layer_norm_before": False}
GRASS = grass_dist.GrassConfig(active_layers=2, probe_steps=2, sampling_interval=3, update_interval=3)

records = (record.splitlines() for record in FASTA.read_text().split(">")[1:])
chains = ["".join(rows) for _, *rows in records]
with tempfile.NamedTemporaryFile(
    "w"
) as file:  # in earnest: `AutoTokenizer.from_pretrained("facebook/esm2_t6_8M_UR50D")`
    print(*TOKENS, sep="\n", file=file, flush=True)
    tokenizer = EsmTokenizer(file.name)
mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)  # hides residues, and asks for these alone
dist.init_process_group()
device = torch.device("cuda", dist.get_node_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
torch.manual_seed(0)  # the same weights on all ranks
config = EsmConfig(**ESM, vocab_size=33, pad_token_id=tokenizer.pad_token_id, mask_token_id=tokenizer.mask_token_id)
model = EsmForMaskedLM(config).to(device)
model.esm.contact_head.requires_grad_(False)  # it has no part in this loss
model = DistributedDataParallel(model)
optimizer = grass_dist.GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=GRASS)

torch.manual_seed(dist.get_rank())  # other chains and masks on each rank
for step in range(1, STEPS + 1):
    rows = [chains[i] for i in torch.randint(len(chains), (BATCH,))]
    batch = mask([tokenizer(row, truncation=True, max_length=LENGTH) for row in rows]).to(device)
    layers = optimizer.grass.active_layers if optimizer.grass.phase == "train" else ()  # none in the probe
    loss = model(**batch).loss
    loss.backward()
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"step {step}: trained layers {list(layers)}, loss {loss.item():.3f}")
dist.barrier()
dist.destroy_process_group()
