"""Counts what the blocks of a folding trunk compute and keep: a state for each residue, and one for each pair.

The pair states grow with the square of the length, and the scores of triangle attention with its cube. For a chain of L
residues, a block of ESMFold with p entries a pair, s a residue, h heads of triangle attention and g of the residues
keeps from its forward for its backward, with weights of w bytes:

    pairs              w L² (42 p + g), and w L² 11 p if the block trains: the inputs of its matrices
    scores             w L³ 2 h, after the softmax, of the attention around the starting and the ending node
    residues           w L 17 s
    norms and mask     72 L²: a mean and a deviation of each of eight norms, and the mask

Activation checkpointing keeps only the inputs, w (L² p + L s), and makes the rest again, of a block at a time. Chunks
(``chunk_size`` of the trunk) cut the scores before the softmax, and their gradients, which exist one attention at a
time; what is kept for the backward is the same with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grass_dist.terminal import size

BINS = 64
"""Bins of the distogram."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Sizes of a folding trunk."""

    blocks: int
    single: int
    """Entries of the state of a residue."""
    pair: int
    """Entries of the state of a pair."""
    single_heads: int
    heads: int
    """Heads of triangle attention."""
    chunk: int | None
    """Rows of triangle attention that are computed at a time; None: all."""
    folding_blocks: int
    """Blocks of the structure module, which share their weights."""
    folding_heads: int
    folding_points: int
    """Query points of a head of the structure module."""
    folding_pair: int
    """Entries of the state of a pair there."""

    def kept(self, length: int, width: int, *, trained: bool) -> float:
        """Bytes that a block keeps of one chain, for a backward without checkpointing."""
        pairs = (53 if trained else 42) * self.pair + self.single_heads
        scores = 2 * self.heads * length**3
        return width * (length**2 * pairs + scores + 17 * self.single * length) + 72 * length**2

    def scores(self, length: int, width: int) -> float:
        """Bytes of the scores in `kept`."""
        return width * 2 * self.heads * length**3

    def inputs(self, length: int, width: int) -> float:
        """Bytes that a block keeps of one chain under activation checkpointing."""
        return width * (length**2 * self.pair + length * self.single)

    def flow(self, length: int, width: int) -> float:
        """Bytes of the gradients within a block while it goes backward, beyond what its `kept` gives free by then.

        They are largest at the softmax of the attention around the ending node, or in the transition before it.
        """
        rows = min(self.chunk or length, length)
        return width * length**2 * max(5 * self.pair, 2 * self.heads * rows - 4 * self.pair)

    def sentences(self, length: int, width: int) -> list[str]:
        """What a length costs, and what checkpointing and chunks bring, of one chain with all blocks trained."""
        block, scores = self.kept(length, width, trained=True), self.scores(length, width)
        rows = min(self.chunk or length, length)
        running, whole = (2 * self.heads * length**2 * n * width for n in (rows, length))
        chunks = f"in chunks of {rows} rows {size(running)}" if rows < length else "without chunks"
        told = f"{chunks}{' instead of' if rows < length else ''} {size(whole)}"
        return [
            f"Pair activations of a chain of {length} residues: a block keeps {size(block)} for its backward, and "
            f"{size(scores)} of that are the scores of triangle attention, which grow with the cube of the length as "
            f"the rest does with its square; {self.blocks} blocks keep {size(self.blocks * block)}.",
            f"With activation checkpointing {self.blocks} blocks keep "
            f"{size(self.blocks * self.inputs(length, width))}, and one block at a time {size(block)}. Chunks change "
            f"nothing of that: they cut what an attention computes on the way, {told}.",
        ]

    def structure(self, length: int, width: int) -> float:
        """Bytes of pairs that the structure module keeps of one chain. Its points, and what it adds to them, are fp32.

        Each of its blocks keeps the differences of the query points and their squares' sums, the scores twice, and of
        16-bit states of pairs a copy in fp32.
        """
        points = 4 * self.folding_heads * (4 * self.folding_points + 2) + (4 * self.folding_pair if width < 4 else 0)
        return length**2 * (width * (self.pair + 2 * self.folding_pair) + self.folding_blocks * points)

    def distogram(self, length: int, width: int) -> tuple[float, float]:
        """Bytes of the logits of one chain, and of what the loss makes of them."""
        # As for words: log-probabilities and their gradient in fp32, and a copy in fp32 of 16-bit logits.
        return length**2 * width * BINS, length**2 * BINS * (8 if width == 4 else 12)

    def multiplied(self, length: int, of_single: int, of_pair: int) -> tuple[float, float]:
        """Multiply-adds of a block for one chain: with its matrices, and of pairs with pairs.

        Args:
            of_single, of_pair: elements of the matrices that every residue and every pair is multiplied by.
        """
        return of_single * length + of_pair * length**2, 6 * self.pair * length**3


def pairs_of(config: Any) -> Pairs:
    """Reads the sizes from the configuration of ESMFold."""
    trunk = config.esmfold_config.trunk
    folding = trunk.structure_module
    return Pairs(
        blocks=trunk.num_blocks,
        single=trunk.sequence_state_dim,
        pair=trunk.pairwise_state_dim,
        single_heads=trunk.sequence_state_dim // trunk.sequence_head_width,
        heads=trunk.pairwise_state_dim // trunk.pairwise_head_width,
        chunk=trunk.chunk_size,
        folding_blocks=folding.num_blocks,
        folding_heads=folding.num_heads_ipa,
        folding_points=folding.num_qk_points,
        folding_pair=folding.pairwise_dim,
    )
