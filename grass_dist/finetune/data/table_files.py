"""Reads the rows of .csv, .tsv, .parquet and FASTA files, in the same form as the lines of a JSON file."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any, BinaryIO, cast

import numpy as np

from grass_dist.errors import ConfigError
from grass_dist.finetune.data.config import FASTA_KINDS, kind_of
from grass_dist.finetune.data.fasta import fasta_rows
from grass_dist.finetune.data.json_lines import LONGEST, Entry, Number, Row, entries

_BATCH = 256
"""Number of rows of a .parquet file that are in memory as Python's values at a time."""

_MOST_HIDDEN = 3
"""Most lines that a broken row of CSV may take with it; one with more cannot be left out."""


def rows_of(setting: str, file: str, *, strict: bool = True, columns: Sequence[str] | None = None) -> Iterator[Entry]:
    """Reads the rows of a data file of any kind that `kind_of` knows, with what is wrong with each.

    Rows of JSON are those of `entries`. Every value of CSV is the text of the file, from ``18`` to ``NA``; a value of a
    .parquet file is text, a number in as many digits as its type tells apart, true or false, or null.

    Args:
        strict: see `entries`.
        columns: the columns that are needed; in a .parquet file the others are null in every row.

    Raises:
        ConfigError: the file as a whole cannot be used; it is about ``setting``.
        Exception: it cannot be read, also by pyarrow.
    """
    kind = kind_of(file)
    if kind in FASTA_KINDS:
        return fasta_rows(file)
    if kind == ".parquet":
        return _parquet_rows(file, columns)
    return _csv_rows(setting, file, kind) if kind in (".csv", ".tsv") else entries(setting, file, strict=strict)


def _csv_rows(setting: str, file: str, kind: str) -> Iterator[Entry]:
    """Reads rows by the names in the first line.

    A row is broken if it has another number of fields, a quote that does not end, or what is no UTF-8.
    """
    csv.field_size_limit(LONGEST)
    with cast(BinaryIO, gzip.open(file) if file.lower().endswith(".gz") else open(file, "rb")) as opened:
        reader = csv.reader(_texts(opened), delimiter="\t" if kind == ".tsv" else ",", strict=True)
        names: list[str] | None = None
        while True:
            number = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if reader.line_num - number > _MOST_HIDDEN:
                    problem = f"a quote in line {number} does not end, which hides the next {reader.line_num - number}"
                    raise ConfigError(setting, file, problem, "repair that line") from None
                yield Entry("line", number, None, f"is no CSV ({error})")
                continue
            if not fields:  # a blank line
                continue
            problem = _why_no_row(fields, names)
            if names is None:
                if problem or len(set(fields)) < len(fields):
                    problem = f"its first line {problem or 'names a column twice'}"
                    raise ConfigError(setting, file, problem, "give it a line with the name of each column")
                names = fields
            else:
                yield Entry("line", number, None if problem else dict(zip(names, fields, strict=True)), problem)


def _texts(opened: BinaryIO) -> Iterator[str]:
    """Reads the lines, with what is no UTF-8 as half surrogate pairs. One that is far too long is cut into several."""
    first = True
    while line := opened.readline(LONGEST):
        yield line.decode("utf-8-sig" if first else "utf-8", errors="surrogateescape")
        first = False


def _why_no_row(fields: list[str], names: list[str] | None) -> str:
    if any(not field.isascii() and any("\ud800" <= c <= "\udfff" for c in field) for field in fields):
        return "is no valid UTF-8"
    if names is not None and len(fields) != len(names):
        return f"has {len(fields)} fields, and the first line names {len(names)}"
    return ""


def _parquet_rows(file: str, columns: Sequence[str] | None) -> Iterator[Entry]:
    from pyarrow import types
    from pyarrow.parquet import ParquetFile

    number = 0
    with ParquetFile(file) as opened:
        schema = opened.schema_arrow
        wanted = [name for name in schema.names if columns is None or name in columns]
        single = {f.name for f in schema if types.is_float32(f.type) or types.is_float16(f.type)}
        for batch in opened.iter_batches(batch_size=_BATCH, columns=wanted):
            for values in batch.to_pylist():
                number += 1
                row: Row = dict.fromkeys(schema.names)
                row.update({name: _written(value, name in single) for name, value in values.items()})
                odd = next((n for n, v in values.items() if isinstance(v, float) and not np.isfinite(v)), None)
                problem = "" if odd is None else f"holds {values[odd]} in column {odd!r}"
                yield Entry("row", number, None if problem else row, problem)


def _written(value: Any, single: bool) -> Any:
    """Writes a number as text; one of single precision without the digits that only its double has."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return value
    if isinstance(value, Decimal):
        return Number(f"{value:f}")
    return Number(str(np.float32(value)) if single else str(value))
