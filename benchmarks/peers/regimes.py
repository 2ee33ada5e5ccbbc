"""How long a comparison trains, how often layers are drawn, and who takes part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Regime:
    """What is the same for all methods of one comparison."""

    folder: str
    """Of the results, in `RESULTS`."""
    steps: int
    batch: int
    """Problems in a global batch."""
    warm_up: int
    """Steps in which the learning rate rises; then a cosine takes it to zero."""
    interval: int
    """Steps between two draws [T_s], and between two refreshes of the probabilities [T_u]."""
    probe: int
    """Steps of the probe, which count as any other."""
    questions: int
    """The first problems of each test set, whose answers are judged; 0 judges none."""
    methods: tuple[str, ...]
    device: str = "cpu"
    seeds: tuple[int, ...] = (0, 1, 2)
    search: bool = True
    """Whether three rates are tried; else the middle one is taken."""

    def rate(self, step: int) -> float:
        """Factor of the learning rate."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - self.warm_up) / max(1, self.steps - self.warm_up)))

    @property
    def results(self) -> Path:
        return RESULTS / self.folder


SHORT_METHODS = ("full", "lisa", "grass", "grass-layers", "grass-static", "cyclic", "badam", "lora16", "lora128")
BESIDE = ("grass-adapters16", "grass-adapters64", "lisa-adapters16", "lisa-adapters64")
REGIMES = {
    "short": Regime(
        "peers", 60, 4, 4, 5, 5, 48, (*SHORT_METHODS, "dora16", "galore", "lora64", "grass-third", *BESIDE)
    ),
    "long": Regime(
        "peers_long",
        400,
        4,
        12,
        25,
        12,
        200,
        ("full", "lora16", "lora64", "lisa", "badam", "random-cyclic", "grass-third", *BESIDE),
    ),
    "gpu": Regime(
        "peers_gpu",
        1000,
        16,
        30,
        25,
        30,
        0,
        ("full", "lora16", "lora64", "lisa", "grass-third", "grass-adapters64"),
        device="cuda",
        seeds=(0,),
        search=False,
    ),
}
