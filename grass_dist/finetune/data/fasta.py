"""Reads the records of a FASTA file: a line ``>id description``, then the lines of the sequence."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from typing import TextIO, cast

from grass_dist.finetune.data.json_lines import Entry


def fasta_rows(file: str) -> Iterator[Entry]:
    """Reads the records, with what is wrong with each: rows of ``id``, ``description`` and ``sequence``.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: it is no text.
    """
    with cast(TextIO, gzip.open(file, "rt") if file.lower().endswith(".gz") else open(file)) as opened:
        number, head, lines = 0, None, list[str]()
        for line in map(str.strip, opened):
            if line.startswith(">"):
                if number:
                    yield _record(number, head, lines)
                number, head, lines = number + 1, line[1:], []
            elif line and not line.startswith(";"):  # a comment
                number = number or 1
                lines.append(line)
        if number:
            yield _record(number, head, lines)


def _record(number: int, head: str | None, lines: list[str]) -> Entry:
    if head is None:
        return Entry("record", number, None, "has no line that begins with >")
    if not lines:
        return Entry("record", number, None, f"has no sequence ({head[:40]!r})")
    name, _, description = head.strip().partition(" ")
    return Entry("record", number, {"id": name, "description": description.strip(), "sequence": "".join(lines)})
