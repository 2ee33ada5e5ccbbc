"""GRASS under DeepSpeed: the block in the ds_config, and what becomes of the other options."""
