"""DeepSpeed ZeRO: its configuration, its optimizers, and the states of the layers across them."""
