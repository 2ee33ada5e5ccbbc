"""torchrun --nproc-per-node 2 examples/trl_reward.py

TRL's RewardTrainer under DDP: a reward model learns to prefer small numbers. Its new head trains at every step.
"""

import itertools

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer

import grass_dist

WORDS, LENGTH = 20, 6
LLAMA = LlamaConfig(
    vocab_size=21,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_labels=1,
    pad_token_id=WORDS,
)
GRASS = grass_dist.GrassConfig(active_layers=2, probe_steps=2, sampling_interval=3, update_interval=3)

words = Tokenizer(models.WordLevel({"<end>": WORDS} | {str(n): n for n in range(WORDS)}, unk_token="<end>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")


def numbers(first: int, least: int) -> str:
    """Some of the ten numbers from ``least`` on."""
    return " ".join(str(least + (first + i) % 10) for i in range(LENGTH))


pairs = [{"chosen": numbers(n, 0), "rejected": numbers(3 * n, 10)} for n in range(100)]
gpu = torch.cuda.is_available()
arguments = RewardConfig(
    output_dir="runs/trl_reward",
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
grass_dist.enable(GRASS)
trainer = RewardTrainer(
    LlamaForSequenceClassification(LLAMA),
    arguments,
    train_dataset=Dataset.from_list(pairs),
    processing_class=tokenizer,
)
trainer.train()
if trainer.is_world_process_zero():
    logged = [row for row in trainer.state.log_history if "loss" in row]
    for before, row in itertools.pairwise(logged):  # a row names the layers of the next step
        layers = [int(layer) for layer in before["grass/layers"].split()]
        print(f"step {row['step']}: trained layers {layers}, loss {row['loss']:.3f}")
trainer.accelerator.end_training()
