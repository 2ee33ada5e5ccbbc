"""Whether a run can go on from a saved position of the method: its settings and its clock."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from grass_dist.config import GrassConfig
from grass_dist.errors import CheckpointError, shorten
from grass_dist.method.controller import GrassController

SETTINGS = "settings"
"""Key of `settings_of` beside a saved position."""

CLASS = "optimizer class"

_DEFAULTS = GrassConfig().model_dump()
_LATER = ("adapters", "freeze", "active_parameters", "exploration")


def settings_of(grass: GrassController, class_name: str | None = None) -> dict[str, Any]:
    """The settings that must not change within a run, as JSON holds them: all but where the states are.

    The role ``others``, ``adapters``, ``freeze``, ``active_parameters`` and ``exploration`` are among them only where
    they are set: older releases did not have them.

    Args:
        class_name: of the optimizer class; None where another one may go on.
    """
    config, roles = grass.config, {unit.name for unit in grass.roles}
    always = [name for name in config.always_active if name != "others" or name in roles]
    unknown = {"offload"}
    unknown |= {name for name in _LATER if getattr(config, name) == _DEFAULTS[name]}
    settings = config.model_dump(mode="json", exclude=unknown) | {"always_active": always}
    settings |= {} if class_name is None else {CLASS: class_name}
    return json.loads(json.dumps(settings))


def other_settings(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """A sentence on the first setting of a saved position that is not this run's; None if all are.

    Args:
        saved: the position. Older releases have saved none of its settings.
        own: this run's settings.
    """
    settings = saved.get(SETTINGS) or own
    for name in sorted({*settings, *own} - ({CLASS} if CLASS not in settings or CLASS not in own else set())):
        if settings.get(name) != own.get(name):
            there, here = (shorten(repr(of.get(name)), 60) for of in (settings, own))
            shown = "".join(c if c.isprintable() else "?" for c in shorten(name, 40))
            return (
                f"{shown}={there} in the saved state, and {here} here; give the same optimizer class and "
                "the same GrassConfig (only its offload may differ), or begin without a state."
            )
    return None


def check_clock(grass: GrassController, saved: Mapping[str, Any]) -> None:
    """Compares the saved position of the method with this run's schedule.

    Args:
        saved: the saved state of the method.

    Raises:
        CheckpointError: they differ.
    """
    schedule, step, waiting, active = grass.schedule, saved["step"], saved.get("next"), grass.config.active_layers
    trains = len(grass.layers) if schedule.phase(step) == "probe" else active
    fewer = range(1, trains) if grass.config.active_parameters is not None and trains == active else ()
    if any(len(layers) not in (trains, *fewer) for layers in (saved["active_layers"], *saved["measured"]["layers"])):
        raise CheckpointError(f"The checkpoint's method is not where this run's is after {step} steps.")
    due = step + schedule.steps_to_switch(step), schedule.round(step) + 1
    fewest = active if grass.config.active_parameters is None else 1
    if waiting and (
        (waiting["step"], waiting["round"]) != due or not fewest <= len(waiting["active_layers"]) <= active
    ):
        raise CheckpointError(f"The checkpoint has drawn layers that this run does not switch to after step {step}.")
