"""Norms of gradients on the device, kept there until a refresh."""

from __future__ import annotations

from collections.abc import Sequence

import torch

PIECE = 1 << 16
"""Entries of a tensor that are widened at a time on the CPU, where torch copies what it widens: 512 KiB."""


def norms(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The 2-norm of each tensor in fp64, 0-dim tensors on its device; no tensor is copied as a whole.

    Tensors of one dtype and device take one operator. On a GPU its kernel widens each entry as it reads it.
    """
    cut = [_pieces(tensor) for tensor in tensors]
    alike: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for piece in (piece for pieces in cut for piece in pieces):
        alike.setdefault((piece.device, piece.dtype), []).append(piece)
    found = {key: iter(torch._foreach_norm(own, 2.0, dtype=torch.float64)) for key, own in alike.items()}
    of_pieces = [[next(found[piece.device, piece.dtype]) for piece in pieces] for pieces in cut]
    return [own[0] if len(own) == 1 else torch.linalg.vector_norm(torch.stack(own)) for own in of_pieces]


def _pieces(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    if tensor.layout != torch.strided:
        tensor = tensor.coalesce().values()
    if tensor.device.type != "cpu" or tensor.numel() <= PIECE or not tensor.is_contiguous():
        return (tensor,)
    return tensor.view(-1).split(PIECE)


def sum_of_squares(tensor: torch.Tensor) -> torch.Tensor:
    """Σ x² in fp64, a 0-dim tensor on the device."""
    return norms([tensor])[0].square()


class SquareSums:
    """This rank's part of ||g||² of each layer, for each step since the last refresh, in fp64 on the device.

    Nothing here waits for the device: `put` and `close_step` queue small kernels.

    Args:
        slots: number of parameters of each layer.
        device: where the gradients are.
        alike: ranks that put in the same norms, and each a share of its part.
    """

    def __init__(self, slots: Sequence[int], device: torch.device, alike: int = 1) -> None:
        self._slots, self._alike = max(slots), alike
        self._none = torch.zeros((), dtype=torch.float64, device=device)
        self._norms: dict[tuple[int, int], torch.Tensor] = {}
        self._rows: list[torch.Tensor] = []
        self._layers: list[tuple[int, ...]] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    def put(self, layer: int, slot: int, norm: torch.Tensor) -> None:
        """Sets the norm of parameter ``slot`` of ``layer`` for the step that is under way."""
        self._norms[layer, slot] = norm

    def close_step(self, active: tuple[int, ...], scale: torch.Tensor | None = None) -> None:
        """Ends a step: what was put becomes a row of one number for each of the ``active`` layers.

        Args:
            scale: factor of the gradients that were measured, an fp64 scalar on the device, to be taken out.
        """
        none, device = self._none, self._none.device
        found = [self._norms.get((layer, slot), none).to(device) for layer in active for slot in range(self._slots)]
        totals = torch.stack(found).view(len(active), self._slots).square().sum(dim=1)
        if self._alike > 1:
            totals /= self._alike
        if scale is not None:
            totals /= scale.square()
        self._rows.append(totals)
        self._layers.append(active)
        self._norms.clear()

    def discard(self) -> None:
        """Forgets what was put since the last step ended."""
        self._norms.clear()

    def take(self) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
        """All rows as one fp64 tensor (steps, γ) on the device, and the layers of each; then there are no rows.

        γ is the largest number of layers; a row of fewer ends with zeros.
        """
        rows, layers = torch.nn.utils.rnn.pad_sequence(self._rows, batch_first=True), self._layers
        self._rows, self._layers = [], []
        return rows, layers

    def state_dict(self) -> dict:
        return {"rows": [row.tolist() for row in self._rows], "layers": [list(active) for active in self._layers]}

    def load_state_dict(self, state: dict) -> None:
        device = self._none.device
        self._rows = [torch.tensor(row, dtype=torch.float64, device=device) for row in state["rows"]]
        self._layers = [tuple(active) for active in state["layers"]]
