"""Decides which examples make up which step, and packs and collates them.

Global batches do not depend on the number of ranks.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch

from grass_dist.errors import ConfigError
from grass_dist.model.loss import IGNORED

T = TypeVar("T")
Example = dict[str, list[Any]]
"""Lists of integers by name. An example that is not kept in memory may have other things of its row, too."""


class Examples:
    """Tokenised examples, like a list of ``{"input_ids": …, "labels": …}`` (packed: and ``"position_ids"``).

    The lists of an example may differ in length: the label of a whole text is a list of one. They take 4 bytes for each
    token and key, whatever their number. ``dropped`` counts the examples that had no label
    left and were not kept, ``unanswered`` the rows that had no answer. ``dated`` says that their prompts differ from
    day to day, which some chat templates cause.
    """

    dated = False

    def __init__(self, examples: Iterable[Example] = (), dropped: int = 0, unanswered: int = 0) -> None:
        self.dropped, self.unanswered = dropped, unanswered
        self._ends: dict[str, array[int]] = {}
        self._tokens: dict[str, array[int]] = {}
        for example in examples:
            self.append(example)

    def append(self, example: Example) -> None:
        """Adds an example; all examples have the same keys."""
        for key, values in example.items():
            self._tokens.setdefault(key, array("i")).extend(values)
            self._ends.setdefault(key, array("q", [0])).append(len(self._tokens[key]))

    def __len__(self) -> int:
        return len(self._ends.get("input_ids", [0])) - 1

    def __getitem__(self, index: int) -> Example:
        at = range(len(self))[index]
        return {key: values[slice(*self._ends[key][at : at + 2])].tolist() for key, values in self._tokens.items()}

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def largest(self, key: str) -> int:
        """Returns the largest value of a key, e.g. of the "input_ids"; -1 without examples."""
        values = self._tokens.get(key)
        return int(np.frombuffer(values, dtype=np.intc).max()) if values else -1

    def lengths(self) -> np.ndarray:
        """Returns the number of input ids of each example: int64 array of shape (examples,)."""
        return np.diff(np.frombuffer(self._ends.get("input_ids", array("q", [0])), dtype=np.int64))

    def digest(self) -> str:
        """Returns the SHA-256 of all examples in their order, in hexadecimal; for ``dated`` ones of what is learnt."""
        if self.dated:
            labels = np.frombuffer(self._tokens.get("labels", array("i")), dtype=np.intc)
            return hashlib.sha256(labels[labels != IGNORED].tobytes()).hexdigest()
        ends = self._ends.get("input_ids", array("q", [0]))
        total = hashlib.sha256(ends)
        for key in sorted(self._tokens):
            total.update(key.encode())
            total.update(self._tokens[key])
            if self._ends[key] != ends:
                total.update(self._ends[key])
        return total.hexdigest()


def has_labels(example: Example) -> bool:
    """Says whether an example has a token with loss."""
    return any(label != IGNORED for label in example["labels"])


def pack_examples(examples: Iterable[Example], max_length: int) -> Iterator[Example]:
    """Puts whole examples one after the other, in their order, into sequences of at most max_length tokens.

    ``position_ids`` restart at 0 with each example, which is how transformers keeps them apart; see
    `grass_dist.finetune.data.config.check_packing`.

    Args:
        examples: each of at most max_length tokens, its first label `IGNORED`.
    """
    packed: Example = {"input_ids": [], "labels": [], "position_ids": []}
    for example in examples:
        length = len(example["input_ids"])
        if packed["input_ids"] and len(packed["input_ids"]) + length > max_length:
            yield packed
            packed = {key: [] for key in packed}
        for key, values in {**example, "position_ids": range(length)}.items():
            packed[key].extend(values)
    if packed["input_ids"]:
        yield packed


def collate(examples: Sequence[Example], pad_token_id: int, pad_to_multiple_of: int = 1) -> dict[str, torch.Tensor]:
    """Makes tensors of a micro-batch, padded on the right to its longest example.

    Returns:
        torch.long tensors of shape (examples, tokens): input_ids, labels (padding -100), and attention_mask (0 on
        padding) or, of packed examples, position_ids (the padding counts from 0 again, as a segment of its own).
        For packed examples, call the model with ``use_cache=False`` and without an attention mask; otherwise the
        examples see each other.
    """
    longest = max(len(example["input_ids"]) for example in examples)
    width = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    missing = [width - len(example["input_ids"]) for example in examples]
    columns = {
        "input_ids": [example["input_ids"] + [pad_token_id] * n for example, n in zip(examples, missing, strict=True)],
        "labels": [example["labels"] + [IGNORED] * n for example, n in zip(examples, missing, strict=True)],
    }
    if "position_ids" in examples[0]:
        columns["position_ids"] = [
            example["position_ids"] + list(range(n)) for example, n in zip(examples, missing, strict=True)
        ]
    else:
        columns["attention_mask"] = [[1] * (width - n) + [0] * n for n in missing]
    return {name: torch.tensor(rows, dtype=torch.long) for name, rows in columns.items()}


@runtime_checkable
class ItemStream(Protocol):
    """Examples one after the other, each of which only the rank that trains on it makes."""

    def epoch(self, seed: int, epoch: int) -> Iterator[Any]:
        """Returns the items of one pass, in an order that depends on (seed, epoch) alone."""
        ...

    def example(self, item: Any) -> Example:
        """Returns the example that an item stands for."""
        ...


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """Returns a random order of n things, which is a function of (seed, epoch) alone.

    Args:
        seed, epoch: 0 to 2**64 - 1.

    Returns:
        int64 array of shape (n,).
    """
    key = np.array([seed, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(n)


GROUPED = 50
"""Global batches whose examples are sorted by their length among each other."""


def grouped(order: np.ndarray, lengths: np.ndarray, size: int, first: int, seed: int, epoch: int) -> np.ndarray:
    """Changes a random order so that examples of about the same length are in the same batch.

    The order is cut into batches. Of each `GROUPED` of them the examples are sorted by length, so that padding is
    short, and the batches are put into a random order again. It is a function of its arguments alone.

    Args:
        order: of an epoch: int64 array of shape (n,).
        lengths: of the examples: int64 array of shape (n,).
        size: of a batch.
        first: number of examples at the start that complete a batch of the epoch before; they stay.
    """
    pieces = [order[:first]]
    key = np.array([seed ^ 2**63, epoch], dtype=np.uint64)  # other numbers than those of `permutation`
    generator = np.random.Generator(np.random.Philox(key=key))
    for start in range(first, len(order), size * GROUPED):
        part = order[start : start + size * GROUPED]
        part = part[np.argsort(lengths[part], kind="stable")]
        whole = len(part) // size
        batches = [part[at * size : (at + 1) * size] for at in range(whole)]
        pieces += [batches[at] for at in generator.permutation(whole)]
        pieces.append(part[whole * size :])  # the rest goes on into the next epoch
    return np.concatenate(pieces)


class GlobalBatches:
    """Global batch k is the k-th run of B entries in the endless sequence of shuffled epochs.

    No example is left out at the end of an epoch: the batch goes on into the next one, and an epoch may be
    shorter than a batch. It holds the order of one epoch, O(n).

    Args:
        lengths: of the examples, to have examples of about the same length in a batch: see `grouped`.

    Raises:
        ConfigError: there are no examples.
    """

    def __init__(self, n: int, global_batch_size: int, seed: int, lengths: np.ndarray | None = None) -> None:
        if n < 1:
            raise ConfigError("data.name", n, "there are no examples to train on", "give a dataset that has some")
        self.n, self.global_batch_size, self.seed = n, global_batch_size, seed
        self._lengths = lengths
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def indices(self, k: int) -> list[int]:
        """Returns the B indices of global batch k, each from 0 to n - 1."""
        found: list[int] = []
        while len(found) < self.global_batch_size:
            epoch, offset = divmod(k * self.global_batch_size + len(found), self.n)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, self._order_of(epoch)
            missing = self.global_batch_size - len(found)
            found += self._order[offset : offset + missing].tolist()
        return found

    def _order_of(self, epoch: int) -> np.ndarray:
        order = permutation(self.n, self.seed, epoch)
        if self._lengths is None:
            return order
        size = self.global_batch_size
        first = min(-epoch * self.n % size, self.n)
        return grouped(order, self._lengths, size, first, self.seed, epoch)


def check_divides(global_batch_size: int, world_size: int, micro_batch_size: int) -> None:
    """Checks that every rank gets the same number of full micro-batches.

    Raises:
        ConfigError: ``train.global_batch_size`` is not a multiple of world_size * micro_batch_size.
    """
    unit = world_size * micro_batch_size
    if global_batch_size < 1 or global_batch_size % unit:
        below = global_batch_size // unit * unit
        product = f"world size {world_size} times micro_batch_size {micro_batch_size}"
        problem = f"{product} is {unit}, which does not divide it"
        fix = f"use {below} or {below + unit}" if below else f"use {unit}, or a smaller micro_batch_size"
        raise ConfigError("train.global_batch_size", global_batch_size, problem, fix)


def share(batch: Sequence[T], rank: int, world_size: int, micro_batch_size: int) -> list[list[T]]:
    """Returns one rank's part of a global batch of B items.

    Returns:
        B / (world_size * micro_batch_size) lists of micro_batch_size items; the i-th starts at item
        (i * world_size + rank) * micro_batch_size.

    Raises:
        ConfigError: B is not a multiple of world_size * micro_batch_size.
    """
    check_divides(len(batch), world_size, micro_batch_size)
    starts = range(rank * micro_batch_size, len(batch), world_size * micro_batch_size)
    return [list(batch[start : start + micro_batch_size]) for start in starts]


class MicroBatches:
    """Micro-batches of one rank without end: item n is its list of them (lists of examples) for step start_step + n.

    The global batches depend on the seed and global_batch_size alone: over the ranks, the micro-batches of a step
    are the same examples whatever world_size and micro_batch_size are. Examples in memory come in another random order
    each epoch. Every rank walks the whole of a stream, and makes the examples of its part only.

    Args:
        start_step: step at which a resumed run begins; what follows equals the tail of a run from 0. (A stream is
            walked up to there.)
        by_length: examples of a global batch are of about the same length. Of examples in memory alone.

    Raises:
        ConfigError: global_batch_size is not a multiple of world_size * micro_batch_size, or there are no
            examples (of a stream: while iterating).
    """

    def __init__(
        self,
        train: Examples | Sequence[Example] | ItemStream,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        start_step: int = 0,
        by_length: bool = False,
    ) -> None:
        check_divides(global_batch_size, world_size, micro_batch_size)
        self._train, self._seed, self._batch_size, self._start_step = train, seed, global_batch_size, start_step
        self._share = (rank, world_size, micro_batch_size)
        if not isinstance(train, ItemStream):
            lengths = train.lengths() if by_length and isinstance(train, Examples) else None
            self._batches = GlobalBatches(len(train), global_batch_size, seed, lengths)

    def __iter__(self) -> Iterator[list[list[Example]]]:
        train = self._train
        if isinstance(train, ItemStream):
            items = islice(_endless(train, self._seed), self._start_step * self._batch_size, None)
            while True:
                parts = share(list(islice(items, self._batch_size)), *self._share)
                yield [[train.example(item) for item in part] for part in parts]
        for step in count(self._start_step):
            parts = share(self._batches.indices(step), *self._share)
            yield [[train[index] for index in part] for part in parts]


def _endless(stream: ItemStream, seed: int) -> Iterator[Any]:
    for epoch in count():
        empty = True
        for item in stream.epoch(seed, epoch):
            empty = False
            yield item
        if empty:
            problem = f"the stream has no examples in epoch {epoch}"
            raise ConfigError("data.streaming", True, problem, "give a dataset that has some")
