"""Says which entries of a parameter are this rank's, in its weights and in its optimizer state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from grass_dist.model.discovery import Unit
from grass_dist.ranks import Ranks


class Sharding:
    """Every rank holds all of every parameter, and all of its state; a subclass for each wrapper that divides them.

    Whoever divides a parameter, a rank holds consecutive entries of it, flattened.

    Args:
        ranks: those that train one model together.
    """

    part: tuple[int, int] = (0, 1)
    """(i, n): `state_shard` gives part i of n; (0, 1) where nothing is divided but by the wrapper itself."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's shard of a parameter or gradient, sharing its memory."""
        return tensor

    def shard_of(self, param: nn.Parameter) -> torch.Tensor:
        """This rank's shard of a parameter's weights, sharing their memory."""
        return self.local(param.detach())

    def start_of(self, param: nn.Parameter) -> int:
        """The position in the flattened whole parameter at which the entries of `shard_of` begin."""
        return 0

    def counts(self, param: nn.Parameter) -> bool:
        """Whether this rank's shard of ``param`` counts in a sum over the ranks: a replica is counted once."""
        return self.ranks.rank == 0

    def replicates(self, param: nn.Parameter) -> bool:
        """Whether every rank has the whole of ``param``."""
        return True

    def divide_states(self, units: Sequence[Unit]) -> None:
        """Has `state_shard` and `publish` divide among the ranks what each of them holds whole, if there is any.

        Called once at the start, with all that may ever train, if the update rule works entry by entry.
        """
        return

    def state_shard(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of a parameter or gradient that this rank updates and keeps a state for, sharing its memory."""
        return self.local(tensor)

    def state_start_of(self, param: nn.Parameter) -> int:
        """The position in the flattened whole parameter at which those of `state_shard` begin."""
        return self.start_of(param)

    def publish(self, units: Sequence[Unit]) -> None:
        """Gives the other ranks what `state_shard` left this one to update; called after the updates of a step."""
        return
