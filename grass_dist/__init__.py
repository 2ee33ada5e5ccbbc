"""GRASS layer-wise training for FSDP2, DDP and single-process PyTorch models."""
