"""What each name of ``optim=`` becomes with GRASS, and the table of it in docs/huggingface.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).parent.parent / "docs" / "huggingface.md"
MARKS = ("<!-- optimizers: begin -->", "<!-- optimizers: end -->")


class Case(NamedTuple):
    """``needs``: a package; ``refused``: the sentence; ``note``: what else a user should know; ``broken``: what stock
    fails with on a CPU."""

    name: str
    needs: str = ""
    note: str = ""
    refused: str = ""
    more: dict[str, Any] = {}
    compiles: bool = False
    untried: bool = False
    broken: str = ""


_BITS = "8-bit states stay so"
_RESIDENT = "states stay so, and on the device"
_PAGED = "bitsandbytes pages the states itself, so they stay where it has them"
_LINEAR = {"optim_target_modules": "all-linear"}
_LOW_RANK = "it projects gradients by objects in its state"
_BACKWARD = "it updates parameters in hooks of the backward"


def _bnb(name: str, note: str = "") -> Case:
    return Case(name, "bitsandbytes", note)


CASES = [
    Case("adamw_torch"),
    Case("adamw_torch_fused", note="on a CPU states are not sharded under DDP"),
    Case("adamw_torch_xla", "torch_xla", "adamw_torch", refused="is made for XLA", untried=True),
    Case("adamw_torch_npu_fused", "torch_npu", "not tried", untried=True),
    Case("adafactor", note="whole parameters: not sharded under DDP, refused under ZeRO"),
    Case("adamw_anyprecision", "torchdistx", "not tried", untried=True),
    Case("adamw_torch_4bit", "torchao", _RESIDENT, compiles=True),
    Case("adamw_torch_8bit", "torchao", _RESIDENT, compiles=True),
    _bnb("ademamix"),
    Case("sgd"),
    Case("adagrad", note="each layer's states begin as Adagrad's do"),
    _bnb("adamw_bnb_8bit", _BITS),
    _bnb("adamw_8bit", _BITS),
    _bnb("ademamix_8bit", _BITS),
    _bnb("lion_8bit", _BITS),
    _bnb("lion_32bit"),
    *(_bnb(f"paged_{name}", _PAGED) for name in ("adamw_32bit", "adamw_8bit", "ademamix_32bit", "ademamix_8bit")),
    *(_bnb(f"paged_{name}", _PAGED) for name in ("lion_32bit", "lion_8bit")),
    Case("rmsprop"),
    _bnb("rmsprop_bnb"),
    _bnb("rmsprop_bnb_8bit", _BITS),
    _bnb("rmsprop_bnb_32bit"),
    Case("galore_adamw", "galore_torch", "adamw_torch", _LOW_RANK, _LINEAR),
    Case("galore_adamw_8bit", "galore_torch", "adamw_8bit", _LOW_RANK, _LINEAR),
    Case("galore_adafactor", "galore_torch", "adafactor", _LOW_RANK, _LINEAR),
    Case("galore_adamw_layerwise", "galore_torch", "adamw_torch", _BACKWARD, _LINEAR),
    Case("galore_adamw_8bit_layerwise", "galore_torch", "adamw_torch", _BACKWARD, _LINEAR),
    Case("galore_adafactor_layerwise", "galore_torch", "adamw_torch", _BACKWARD, _LINEAR, broken="Cannot combine"),
    Case("lomo", "lomo_optim", "adamw_torch or adafactor", _BACKWARD),
    Case("adalomo", "lomo_optim", "adamw_torch or adafactor", _BACKWARD, broken="not compiled with CUDA"),
    Case("grokadamw", "grokadamw", "adamw_torch", "its update of a parameter depends on the other parameters"),
    *(
        Case(f"schedule_free_{name}", "schedulefree", "`train()` and `eval()` are forwarded")
        for name in ("radam", "adamw", "sgd")
    ),
    Case("apollo_adamw", "apollo_torch", "adamw_torch", _LOW_RANK, _LINEAR),
    Case("apollo_adamw_layerwise", "apollo_torch", "adamw_torch", _BACKWARD, _LINEAR),
    Case("stable_adamw", "optimi"),
]


def table() -> str:
    """The table of the page, as Markdown."""
    rows = ["| `optim=` | with GRASS | more |", "|---|---|---|"]
    for case in CASES:
        if case.refused:
            rows.append(f"| `{case.name}` | refused: {case.refused} | nearest: `{case.note}` |")
        else:
            outcome = "not tried" if case.untried else "as it is"
            rows.append(f"| `{case.name}` | {outcome} | {'' if case.untried else case.note} |")
    return "\n".join(row.replace("|  |", "| |") for row in rows)
