"""For ms-swift: ``--external_plugins FILE`` with this file switches GRASS on, by the variable GRASS_CONFIG."""

from grass_dist.huggingface import enable
from grass_dist.run import config_from_environment

enable(config_from_environment())
