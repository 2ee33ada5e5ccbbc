"""For axolotl: ``plugins: [grass_dist.plugins.for_axolotl.GrassPlugin]``, and the settings below ``grass:``."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin  # type: ignore[import-not-found]
from pydantic import BaseModel

from grass_dist.config import as_config
from grass_dist.errors import ConfigError
from grass_dist.huggingface import disable, enable
from grass_dist.run import config_from_environment


class GrassArguments(BaseModel):
    """What the plugin adds to axolotl's file."""

    grass: dict[str, Any] | None = None
    """Fields of `GrassConfig`."""


class GrassPlugin(BasePlugin):
    """Switches GRASS on for axolotl's trainers."""

    def get_input_args(self) -> str:
        """Returns the class of `GrassArguments`, by which axolotl checks its file."""
        return f"{__name__}.{GrassArguments.__name__}"

    def register(self, cfg: dict[str, Any]) -> None:
        """Calls `enable` before anything is made.

        Args:
            cfg: axolotl's file; without ``grass``, the environment variable GRASS_CONFIG or the ds_config counts.

        Raises:
            ConfigError: a setting cannot work.
        """
        if (settings := cfg.get("grass")) is None:
            return enable(config_from_environment())
        try:
            enable(as_config(settings))
        except ConfigError as error:
            raise error.under("grass") from None

    def on_config_validation_error(self, cfg: dict[str, Any]) -> None:
        """Undoes `register`."""
        disable()
