"""`WeightSync`: gives a copy of the model, such as one that generates, the weights that it does not have yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from grass_dist.backends.whole import whole
from grass_dist.checkpoint.model import fqn
from grass_dist.errors import ConfigError
from grass_dist.huggingface.logs import controller_of
from grass_dist.method.controller import GrassController
from grass_dist.ranks import together

Put = Callable[[str, torch.Tensor], Any]
"""(name, whole weights) → anything. The tensor is valid until it returns, and is not to be written to."""


@dataclass(frozen=True, slots=True)
class Carried:
    """What one `WeightSync.push` has carried."""

    names: tuple[str, ...] = field(repr=False)
    """FQNs of the parameters, in the model's order."""
    nbytes: int
    """Bytes of their weights."""
    of: int
    """Bytes of the weights of the whole model."""


class WeightSync:
    """Carries to a copy of a model what has changed since the last time: γ layers and the roles, not all layers.

    The first time, after a load, and when another optimizer has been made (a second `Trainer.train` under
    DeepSpeed), all parameters are carried. Parameters that another optimizer trains are carried each time. Buffers are
    not carried, nor are weights that `GrassController.changed_since` does not see.

    Args:
        model: whose weights are carried, wrapped or not. Names are those of the model without its wrappers.
        trained_by: what trains it: a `GrassOptimizer`, an engine of `initialize`, or a Trainer or prepared optimizer
            of Accelerate after `enable`. A Trainer has an optimizer only from its `train` on, when `push` may be
            called.
    """

    def __init__(self, model: nn.Module, trained_by: Any) -> None:
        self._model, self._trained_by = model, trained_by
        self._carried: tuple[GrassController, int] | None = None  # the method, and its step, of the last `push`

    def push(self, put: Put | None) -> Carried:
        """Calls ``put`` with what the copy lacks. Called on every rank, between two steps.

        Over the wire: three all-gathers of objects, of which the largest has the names of what is carried; and where
        ranks divide the weights (FSDP2, ZeRO-3) one of each parameter that is carried. A rank holds one whole parameter
        at a time.

        Args:
            put: such as ``VLLMClient.update_named_param`` of TRL; None on ranks that only take part in gathering.

        Raises:
            ConfigError: GRASS does not train the model.
            GrassError: ``put`` failed on another rank; on that one its own error is raised. The next call carries the
                same once more.
        """
        grass = self._controller()
        ranks, step = grass.backend.ranks, grass.step
        mine = together(ranks, lambda: self._choose(grass))
        chosen = set().union(*ranks.gather_objects(mine))  # one rank may have set weights alone
        grass.backend.before_read()
        params = self._params(grass)
        names, problem = tuple(name for name in params if name in chosen), None
        for name in names:
            with whole(params[name]) as weights:
                if put is None or problem is not None:
                    continue
                if (device := grass.backend.sharding.weights_come_to) is not None:
                    weights = weights.to(device)  # which may rest in host memory
                try:
                    put(name, weights)
                except Exception as error:  # whatever it is, the other ranks wait in the next gathering
                    problem = error
        together(ranks, lambda: _raise(problem))
        self._carried = grass, step
        return Carried(names, sum(_nbytes(params[name]) for name in names), sum(map(_nbytes, params.values())))

    def _controller(self) -> GrassController:
        grass = getattr(self._trained_by, "grass", None) or controller_of(self._trained_by)
        if isinstance(grass, GrassController):
            return grass
        raise ConfigError(
            "WeightSync(trained_by)",
            type(self._trained_by).__name__,
            "GRASS does not train it, or not yet",
            "give it a GrassOptimizer or an engine of grass_dist.initialize, or call grass_dist.enable() before the "
            "Trainer is made, and push() within its train() or after it",
        )

    def _params(self, grass: GrassController) -> dict[str, nn.Parameter]:
        """All parameters by name; those of units as they are trained, also while FSDP2 shows gathered ones."""
        trained = {fqn(name): param for unit in (*grass.layers, *grass.roles) for name, param in unit.params}
        named = {fqn(name): param for name, param in self._model.named_parameters()}
        if odd := sorted(trained.keys() - named.keys()):
            raise ConfigError(
                "WeightSync(model)",
                type(self._model).__name__,
                f"it has no {odd[0]}, which is trained",
                "give it the model that was given to the optimizer",
            )
        return {name: trained.get(name, param) for name, param in named.items()}

    def _choose(self, grass: GrassController) -> set[str]:
        """Names of the parameters that the copy lacks, as far as this rank knows."""
        params = self._params(grass)
        if self._carried is None or self._carried[0] is not grass:
            return set(params)
        known = {fqn(name) for unit in (*grass.layers, *grass.roles) for name, _ in unit.params}
        others = {name for name, param in params.items() if name not in known and param.requires_grad}
        return others | {fqn(name) for unit in grass.changed_since(self._carried[1]) for name, _ in unit.params}


def _raise(problem: Exception | None) -> None:
    if problem is not None:
        raise problem


def _nbytes(param: nn.Parameter) -> int:
    return getattr(param, "ds_numel", param.numel()) * param.element_size()
