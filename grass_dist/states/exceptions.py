"""Parameters that a class of bitsandbytes treats in another way than its other ones.

`bitsandbytes.optim.GlobalOptimManager` knows them by the identity of the model's parameter, or by their position in an
optimizer, whichever that is. Trainer has it keep 32-bit states of embeddings. A master, or a shard as a plain tensor,
is another object, and positions in the optimizer of a layer are other ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch


def take_exceptions(optimizer: torch.optim.Optimizer, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Has an optimizer of bitsandbytes treat each tensor that it updates as it would treat the model's parameter.

    Others are left as they are. Not documented: the attribute ``mng``, and the manager's ``pid2config``,
    ``index2config`` and ``module_weight_config_triple``. Checked on bitsandbytes 0.50.2; a test in
    `tests/test_optimizers.py` fails when it changes.

    Args:
        pairs: of the model's parameter and what is updated for it.
    """
    shared: Any = vars(optimizer).get("mng")
    if shared is None or not type(shared).__module__.startswith("bitsandbytes."):
        return
    own = copy.copy(shared)
    own.pid2config, own.index2config, own.module_weight_config_triple = {}, {}, []
    for weights, target in pairs:
        config = dict(shared.pid2config.get(id(weights), {}))
        for module, name, exception in shared.module_weight_config_triple:
            if getattr(module, name, None) is weights:
                config.update(exception)
        if config:
            own.pid2config[id(target)] = config
    optimizer.mng = own  # pyright: ignore[reportAttributeAccessIssue]
