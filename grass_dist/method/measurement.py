"""Sums of squares on the device, kept there until a refresh."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def sum_of_squares(tensor: torch.Tensor) -> torch.Tensor:
    """Σ x² in fp64, a 0-dim tensor on the device; the entries are widened one by one, with no fp64 copy."""
    if tensor.layout != torch.strided:
        tensor = tensor.coalesce().values()
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).square()


class SquareSums:
    """This rank's part of ||g||² of each layer, for each step since the last refresh, in fp64 on the device.

    Nothing here waits for the device: `put` and `close_step` queue small kernels.

    Args:
        slots: number of parameters of each layer.
        device: where the gradients are.
    """

    def __init__(self, slots: Sequence[int], device: torch.device) -> None:
        self._scratch = torch.zeros(len(slots), max(slots), dtype=torch.float64, device=device)
        self._rows: list[torch.Tensor] = []
        self._layers: list[tuple[int, ...]] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    def put(self, layer: int, slot: int, squares: torch.Tensor) -> None:
        """Sets the part of parameter ``slot`` of ``layer`` for the step that is under way."""
        self._scratch[layer, slot] = squares

    def close_step(self, active: tuple[int, ...], scale: torch.Tensor | None = None) -> None:
        """Ends a step: what was put becomes a row of one number for each of the ``active`` layers.

        Args:
            scale: factor of the gradients that were measured, an fp64 scalar on the device, to be taken out.
        """
        totals = self._scratch.sum(dim=1)
        if scale is not None:
            totals /= scale.square()
        self._rows.append(torch.stack([totals[layer] for layer in active]))
        self._layers.append(active)
        self._scratch.zero_()

    def discard(self) -> None:
        """Forgets what was put since the last step ended."""
        self._scratch.zero_()

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
        device = self._scratch.device
        self._rows = [torch.tensor(row, dtype=torch.float64, device=device) for row in state["rows"]]
        self._layers = [tuple(active) for active in state["layers"]]
