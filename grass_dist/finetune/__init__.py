"""The training program: configuration, data, steps, record and checkpoints. Needs ``grass-dist[train]``."""
