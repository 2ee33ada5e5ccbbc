"""Holds a training example as it is in run.json; `grass_dist.finetune.data.shown` makes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExamplePiece:
    """A part of an example: a special token, or text between two."""

    text: str
    learnt: bool
    special: bool


@dataclass(frozen=True, slots=True)
class ShownExample:
    """A training example as the model sees it; ``tokens`` and ``learnt`` are numbers of tokens."""

    tokens: int
    learnt: int
    pieces: tuple[ExamplePiece, ...]
