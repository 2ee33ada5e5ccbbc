"""What tasks of audio and images share: an example keeps where its files are, and they are read for their batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import datasets

from grass_dist.finetune.data.batches import Example
from grass_dist.finetune.data.config import media_value
from grass_dist.finetune.data.json_lines import Row
from grass_dist.finetune.data.media import FOLDER, Medium, media_in
from grass_dist.finetune.data.rows import Rows, RowSource, folder_of, sources
from grass_dist.finetune.tasks.base import Task

HELD = "held"
"""Key of an example of a stream: its recordings or images. In memory, an example has the number of its row."""


class MediaTask(Task):
    """A task whose examples have recordings or images."""

    reads_files = True
    part: str
    """ "audio" or "image"."""
    _rows: Rows | None = None
    _held_out: Sequence[Row] = ()
    _held_out_ids: frozenset[int] = frozenset()

    def begin(self, source: RowSource, rows: Rows, held_out: Sequence[Row]) -> None:
        self._rows, self._held_out = rows, held_out
        self._held_out_ids = frozenset(map(id, held_out))  # which stay, so no other row has such an id

    def media_of(self, row: Row) -> list[Medium]:
        """Returns the recordings or images that a row names.

        Raises:
            ConfigError: see `media_in`.
        """
        if (spec := getattr(self.data, self.part)) is None:
            return []
        return media_in(media_value(spec, row, self.part), spec, self.part, self.folder(row))

    def folder(self, row: Row) -> str:
        """Returns the folder that paths in a row start from."""
        return row.get(FOLDER) or folder_of(sources(self.data)[id(row) in self._held_out_ids].name)

    def stored(self, example: Example, number: int) -> Example:
        return {**{key: values for key, values in example.items() if key != HELD}, "row": [number]}

    def held(self, example: Example) -> list[Medium]:
        """Returns the recordings or images of an example."""
        return example[HELD] if HELD in example else self.media_of(self.row_of(example))

    def row_of(self, example: Example) -> Row:
        """Returns the row that an example in memory was made of."""
        number = example["row"][0]
        if number < 0:
            return self._held_out[-1 - number]
        assert isinstance(self._rows, datasets.Dataset)
        return self._rows[number]


def digest_of(media: Sequence[Medium]) -> list[int]:
    """Returns two integers that tell recordings or images apart by their names and the sizes of their files."""
    total = hashlib.sha256()
    for medium in media:
        total.update(f"{medium.name} {medium.nbytes}\n".encode())
    return [int.from_bytes(total.digest()[at : at + 4], "big", signed=True) for at in (0, 4)]


def packed(text: str) -> list[int]:
    """Returns a text as integers of 4 bytes; the first one is the number of its bytes in UTF-8."""
    raw = text.encode(errors="surrogatepass")
    filled = raw + bytes(-len(raw) % 4)
    words = (filled[at : at + 4] for at in range(0, len(filled), 4))
    return [len(raw), *(int.from_bytes(word, "big", signed=True) for word in words)]


def unpacked(numbers: Sequence[int]) -> str:
    """Returns the text of `packed`."""
    raw = b"".join(number.to_bytes(4, "big", signed=True) for number in numbers[1:])
    return raw[: numbers[0]].decode(errors="surrogatepass")


def kept(rows: Sequence[Example]) -> list[Example]:
    """Returns the examples that have something to learn; of a stream, one that is too long has not."""
    return [example for example in rows if example["labels"]]
