"""``python -m grass_dist.finetune``: the training program, in the form that launchers start."""

import sys

from grass_dist.finetune.main import main

if __name__ == "__main__":
    sys.exit(main())
