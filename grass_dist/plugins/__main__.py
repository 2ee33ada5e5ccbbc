"""Prints the path of the file for ms-swift: ``--external_plugins $(python -m grass_dist.plugins)``."""

from grass_dist.plugins import FOR_SWIFT

print(FOR_SWIFT)
