"""Says which entries of a parameter are this rank's, in its weights and in its optimizer state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from grass_dist.model.discovery import Unit
from grass_dist.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Block:
    """The place of a shard whose entries are not consecutive in the flattened whole: columns of a matrix.

    Attributes:
        shape: of the whole.
        offsets: where the shard begins, in each dimension.
        sizes: its shape.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The shard of a tensor of the whole shape, sharing its memory."""
        for dim, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            whole = whole.narrow(dim, offset, size)
        return whole


class Sharding:
    """Every rank holds all of every parameter, and all of its state; a subclass for each wrapper that divides them.

    Whoever divides a parameter, a rank holds consecutive entries of it, flattened, or a `Block` of it.

    Args:
        ranks: those that train one model together.
    """

    weights_come_to: torch.device | None = None
    """The device that computes, where weights of layers rest in host memory; None where they stay."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's shard of a parameter or gradient, sharing its memory."""
        return tensor

    def shard_of(self, param: nn.Parameter) -> torch.Tensor:
        """This rank's shard of a parameter's weights, sharing their memory."""
        return self.local(param.detach())

    def start_of(self, param: nn.Parameter) -> int | Block:
        """The position in the flattened whole parameter at which the entries of `shard_of` begin, or their block."""
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

    def state_start_of(self, param: nn.Parameter) -> int | Block:
        """The position in the flattened whole parameter at which those of `state_shard` begin, or their block."""
        return self.start_of(param)

    def keeps_whole_state(self, param: nn.Parameter) -> bool:
        """Whether every rank updates all of ``param`` and keeps all of its state."""
        return self.replicates(param)

    def as_dtensor(self, param: nn.Parameter, part: torch.Tensor) -> torch.Tensor:
        """A state of `state_shard`'s entries as torch's distributed checkpoint takes it.

        Args:
            part: this rank's entries, of the shape of `state_shard`.

        Returns:
            ``part`` itself where every rank keeps the whole, else a tensor that knows its place in the whole.
        """
        return part

    def own_part(self, param: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
        """This rank's entries of a state: the inverse of `as_dtensor`; also of a whole tensor.

        Raises:
            ValueError: it is of another shape, or divided in another way.
        """
        shape = self.state_shard(param.detach()).shape
        if value.shape != param.shape:
            raise ValueError(f"is of shape {tuple(value.shape)} where the parameter's is {tuple(param.shape)}")
        if isinstance(start := self.state_start_of(param), Block):
            return start.of(value)
        return value.reshape(-1)[start : start + shape.numel()].view(shape)

    def publish(self, units: Sequence[Unit]) -> None:
        """Gives the other ranks what `state_shard` left this one to update; called after the updates of a step."""
        return
