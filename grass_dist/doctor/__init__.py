"""What a user runs first on a new cluster: finds what is wrong with it before a fine-tune does.

    torchrun --nnodes 2 ... -m grass_dist.doctor        mpirun ... python -m grass_dist.doctor
    srun python -m grass_dist.doctor                    grass-dist doctor  (one process: no network part)

The parts, in their order: `gather` (what each rank is), `meeting` and `network` (whether the ranks reach each other,
told before any collective can hang), `collectives`, `copies` (what is measured), `findings` (what looks wrong, judged
from the `facts` alone), `tables` and `schema` (how it is shown and written).
"""
