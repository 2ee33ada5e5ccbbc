"""DeepSpeed ZeRO-1, 2, 3: stock ZeRO optimizers, built anew over the layers that train."""
