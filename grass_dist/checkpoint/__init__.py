"""Checkpoints that any number of ranks, and any backend, can go on from (docs/reliability.md)."""
