"""Layers whose matrices are quantised: nothing but their norms would train."""

import pytest
import torch
from torch import nn

from grass_dist import GrassConfig, GrassOptimizer, UnsupportedModel
from tests.tiny import tiny


class InBuffers(nn.Module):
    """A matrix as GPTQ, AWQ and HQQ keep it."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(linear.weight.shape, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.qweight.T.to(x.dtype)


class InParameters(nn.Module):
    def __init__(self, linear: nn.Linear, dtype: torch.dtype, trains: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(linear.weight.shape).to(dtype), requires_grad=trains)


def quantised(kind: type, *args: object) -> nn.Module:
    model = tiny()
    for layer in model.layers:
        layer.up, layer.down = kind(layer.up, *args), kind(layer.down, *args)
    return model


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        (InBuffers, (torch.int8,)),
        (InBuffers, (torch.int32,)),
        (InBuffers, (torch.uint8,)),
        (InParameters, (torch.uint8,)),
        (InParameters, (torch.float8_e4m3fn,)),
    ],
)
def test_layers_of_which_only_norms_would_train_are_refused(kind, args):
    with pytest.raises(UnsupportedModel, match=r"The layers are quantised: layers\.0\.up\.q?weight is of torch"):
        GrassOptimizer(quantised(kind, *args), torch.optim.AdamW, {"lr": 1e-3}, config=GrassConfig())


def test_an_8_bit_float_that_would_train_is_refused():
    model = quantised(InParameters, torch.float8_e4m3fn, True)
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.up\.weight is of torch\.float8_e4m3fn, in which"):
        GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-3}, config=GrassConfig())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_masks_and_tables_of_indexes_are_no_weights(dtype):
    model = tiny()
    for layer in model.layers:
        layer.register_buffer("table", torch.zeros(3, 3, dtype=dtype))
        layer.up.weight.requires_grad_(False)
        layer.down.weight.requires_grad_(False)
    optimizer = GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-3}, config=GrassConfig())
    assert len(optimizer.grass.layers) == len(model.layers)
