"""Finds what is wrong with a cluster before a fine-tune does: what a user runs first.

    torchrun --nnodes 2 ... -m grass_dist.doctor        mpirun ... python -m grass_dist.doctor
    srun python -m grass_dist.doctor                    grass-dist doctor  (one process: no network part)

The parts come in this order. `gather` says what each rank is. `meeting` and `network` find out whether the ranks reach
each other, before any collective can hang. `collectives` and `copies` measure. `findings` judges what looks wrong, from
the `facts` alone. `tables` and `schema` show it and write it.
"""
