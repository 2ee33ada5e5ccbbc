"""A script that knows nothing of GRASS: python plain_trainer.py FOLDER [DS_CONFIG]."""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

LLAMA = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)

if __name__ == "__main__":
    [folder, *ds_config] = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        deepspeed=ds_config[0] if ds_config else None,
    )
    torch.manual_seed(0)
    rows = [{"input_ids": row, "labels": row} for row in (torch.arange(16) + torch.arange(48)[:, None]) % 50]
    model = LlamaForCausalLM(LLAMA)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    layers = {name: name.split(".")[2] for name in before if ".layers." in name}
    moved = {layers[name] for name, p in model.named_parameters() if name in layers and (p != before[name]).any()}
    if trainer.is_world_process_zero():
        print(f"moved layers {sorted(moved)} on {trainer.accelerator.num_processes} ranks")
    trainer.accelerator.end_training()
