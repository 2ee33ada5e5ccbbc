"""torchrun --nproc-per-node 2 examples/trl_grpo.py

TRL's GRPOTrainer under DDP, whose completions a copy of the model makes, as a vLLM server would. Before it generates,
`grass_dist.WeightSync` carries to it the weights that have changed since the last time.
"""

import copy
import os

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is experimental in TRL
from trl import GRPOConfig, GRPOTrainer

import grass_dist

WORDS, PROMPT, COMPLETION = 100, 4, 6
SIZES = {"vocab_size": WORDS + 1, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
LLAMA = LlamaConfig(**SIZES, num_hidden_layers=6, eos_token_id=WORDS, pad_token_id=WORDS)
GRASS = grass_dist.GrassConfig(active_layers=2, probe_steps=2, sampling_interval=3, update_interval=3)

words = Tokenizer(models.WordLevel({"<end>": WORDS} | {str(n): n for n in range(WORDS)}, unk_token="<end>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
prompts = [" ".join(str((first + i) % WORDS) for i in range(PROMPT)) for first in range(WORDS)]
gpu = torch.cuda.is_available()
arguments = GRPOConfig(
    output_dir="runs/trl_grpo",
    max_steps=20,
    per_device_train_batch_size=16,
    num_generations=8,
    max_completion_length=COMPLETION,
    learning_rate=1e-2,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    bf16=gpu,
    use_cpu=not gpu,  # without it, Accelerate lets each rank on a CPU train alone
)


def even_words(completions: list[str], **_) -> list[float]:
    """The share of even words in a completion."""
    return [sum(int(word) % 2 == 0 for word in text.split()) / COMPLETION for text in completions]


def roll_out(prompts: list[str], trainer: GRPOTrainer) -> dict:
    """Makes one completion of each prompt by the copy; each prompt stands here as often as it has completions."""
    carry()
    given = tokenizer(prompts, return_tensors="pt").to(policy.device)["input_ids"]
    with torch.no_grad():
        rows = policy.generate(given, do_sample=True, max_new_tokens=COMPLETION, pad_token_id=WORDS)
    completions = [row[PROMPT:].tolist() for row in rows]
    completions = [ids[: ids.index(WORDS) + 1] if WORDS in ids else ids for ids in completions]  # up to the end
    return {"prompt_ids": given.tolist(), "completion_ids": completions, "logprobs": None}


def put(name: str, weights: torch.Tensor) -> None:
    """Takes one parameter over. With a vLLM server, `VLLMClient.update_named_param` of TRL stands here."""
    policy.get_parameter(name).data.copy_(weights)


def carry() -> None:
    done = sync.push(put)  # every rank has a copy here; for a server, give None on all ranks but one
    if trainer.is_world_process_zero() and done.names:
        layers = sorted({int(name.split(".")[2]) for name in done.names if ".layers." in name})
        print(f"after step {trainer.state.global_step}: carried layers {layers}, {done.nbytes} of {done.of} bytes")


torch.manual_seed(0)  # the same weights on all ranks
model = LlamaForCausalLM(LLAMA)
policy = copy.deepcopy(model).to("cuda" if gpu else "cpu").eval()
grass_dist.enable(GRASS)
trainer = GRPOTrainer(
    model,
    even_words,
    args=arguments,
    train_dataset=Dataset.from_dict({"prompt": prompts}),
    processing_class=tokenizer,
    rollout_func=roll_out,
)
sync = grass_dist.WeightSync(model, trainer)
trainer.train()
carry()  # the last step's
assert all(torch.equal(ours, theirs) for ours, theirs in zip(policy.parameters(), model.parameters(), strict=True))
if trainer.is_world_process_zero():
    for row in (row for row in trainer.state.log_history if "loss" in row):
        print(f"step {row['step']}: reward {row['reward']:.3f}")
    print("the copy is the trained model, to the bit")
trainer.accelerator.end_training()
