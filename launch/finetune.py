#!/usr/bin/env python
"""Fine-tunes a causal language model with GRASS; the one program that every launcher starts.

    torchrun --nproc-per-node 2 launch/finetune.py --config configs/fsdp2_grass.yaml train.learning_rate=1e-5
    deepspeed --num_gpus 2 launch/finetune.py --config configs/zero3_grass.yaml train.learning_rate=1e-5

`python -m grass_dist.finetune` and `grass-dist train CONFIG` start the same.
"""

import sys

from grass_dist.finetune.main import main

if __name__ == "__main__":
    sys.exit(main())
