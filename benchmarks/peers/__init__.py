"""Every alternative on the same model, data and batches: what each learns, and what it holds and sends meanwhile."""
