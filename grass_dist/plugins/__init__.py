"""Files that other training programs load by name, to switch GRASS on (docs/huggingface.md)."""

from pathlib import Path

FOR_SWIFT = str(Path(__file__).with_name("for_swift.py"))
"""The path for ms-swift's ``--external_plugins``; ``python -m grass_dist.plugins`` prints it."""
