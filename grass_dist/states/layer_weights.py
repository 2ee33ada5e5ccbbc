"""The weights of one layer as one flat run of bytes, in host memory or in a slot on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from grass_dist.errors import GrassError
from grass_dist.states.layout import Field, Layout


class LayerWeights:
    """Parameters of one layer that share one flat memory; they are bound to a slot while they are used.

    `bind` changes where the data of the parameters are, and nothing else: a parameter stays the same object, with its
    gradient, its hooks and its ``requires_grad``.

    Args:
        name: FQN of the layer.
        params: those that may rest in host memory, with their FQNs.

    Attributes:
        layout: of the flat memory.
        bound: where the data of each parameter are.
    """

    def __init__(self, name: str, params: Sequence[tuple[str, nn.Parameter]]) -> None:
        self.name, self.params = name, tuple(params)
        self.layout = Layout([Field(name, param.shape, param.dtype) for name, param in self.params])
        self.bound: list[torch.Tensor] = []

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """A tensor for each parameter in ``flat``: uint8, at least ``layout.device_bytes`` long.

        Each has a storage of its own over its part of the memory. So a file that is saved of one parameter holds that
        parameter alone, and parameters do not look as if they were tied.
        """
        return [_alone(view) for view in self.layout.device_views(flat)]

    def bind(self, views: list[torch.Tensor]) -> None:
        """Makes ``views`` the data of the parameters."""
        for (_, param), view in zip(self.params, views, strict=True):
            param.data = view
        self.bound = views

    def come_home(self) -> bool:
        """Takes over data that someone else has given to parameters (``model.to(...)``, ``param.data = ...``).

        Returns:
            Whether there were any.

        Raises:
            GrassError: they are of another dtype or shape.
        """
        moved = False
        for (name, param), view in zip(self.params, self.bound, strict=True):
            if param.data_ptr() == view.data_ptr():
                continue
            moved = True
            if param.dtype != view.dtype or param.shape != view.shape:
                raise GrassError(
                    f"{name} was of {view.dtype} and shape {tuple(view.shape)} and is of {param.dtype} and "
                    f"{tuple(param.shape)} now: with grass.offload.weights='host' change the model before you make the "
                    "optimizer."
                )
            view.copy_(param.detach())
            param.data = view
        return moved


def _alone(view: torch.Tensor) -> torch.Tensor:
    """The same memory with a storage of its own, where DLPack knows the dtype."""
    try:
        return torch.from_dlpack(view)
    except (BufferError, RuntimeError, TypeError):
        return view
