"""torchrun --nproc-per-node 2 examples/trl_dpo.py

TRL's DPOTrainer under DDP: the model learns to prefer counting upwards to counting downwards.
"""

import itertools

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

import grass_dist

WORDS, LENGTH = 100, 6
LLAMA = LlamaConfig(vocab_size=101, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4)
GRASS = grass_dist.GrassConfig(active_layers=2, probe_steps=2, sampling_interval=3, update_interval=3)

words = Tokenizer(models.WordLevel({"<end>": WORDS} | {str(n): n for n in range(WORDS)}, unk_token="<end>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")


def count(first: int, step: int) -> str:
    return " ".join(str((first + step * i) % WORDS) for i in range(1, LENGTH))


pairs = [{"prompt": f"{n} ", "chosen": count(n, 1), "rejected": count(n, -1)} for n in range(WORDS)]
gpu = torch.cuda.is_available()
arguments = DPOConfig(
    output_dir="runs/trl_dpo",
    max_steps=20,
    per_device_train_batch_size=4,
    learning_rate=3e-3,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    bf16=gpu,
    use_cpu=not gpu,  # without it, Accelerate lets each rank on a CPU train alone
)
torch.manual_seed(0)  # the same weights on all ranks
model = LlamaForCausalLM(LLAMA)
reference = LlamaForCausalLM(LLAMA)
reference.load_state_dict(model.state_dict())
grass_dist.enable(GRASS)
trainer = DPOTrainer(model, reference, arguments, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
trainer.train()
if trainer.is_world_process_zero():
    logged = [row for row in trainer.state.log_history if "loss" in row]
    for before, row in itertools.pairwise(logged):  # a row names the layers of the next step
        layers = [int(layer) for layer in before["grass/layers"].split()]
        print(f"step {row['step']}: trained layers {layers}, loss {row['loss']:.3f}")
trainer.accelerator.end_training()
