"""What launch/finetune.py is made of: data, batches and models. Needs the extra ``grass-dist[train]``."""
