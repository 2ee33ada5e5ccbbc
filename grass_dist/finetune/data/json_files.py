"""Reads the rows of local files as text, which fills the templates exactly as the files write it."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import datasets

from grass_dist.errors import ConfigError
from grass_dist.finetune.data.config import MEDIA, columns_of, media_value, no_column, read_part
from grass_dist.finetune.data.json_lines import KINDS, Entry, Number, Row, Skipped, Unfit
from grass_dist.finetune.data.media import FOLDER, media_in, problem_of
from grass_dist.finetune.data.table_files import rows_of

TextRow = dict[str, str | None]
"""The columns that the templates use; None where the file has null or no such column."""

HEAD = 1000
"""Number of rows of a stream that are looked at before training starts."""


def files_of(name: str) -> list[str]:
    """Returns the files that a name means: the file of exactly this name or, without one, those that fit its ``*``."""
    if Path(name).is_file():
        return [name]
    pattern = re.sub(r"[\[?]", r"[\g<0>]", name)  # only * is a pattern
    return sorted(file for file in glob.glob(pattern) if Path(file).is_file()) if "*" in name else []


def text_rows(
    field: str,
    files: Sequence[str],
    parts: Mapping[str, str],
    on_bad_line: str,
    fix: str = "repair it",
    skipped: Mapping[str, Skipped] | None = None,
) -> Iterator[TextRow]:
    """Reads the rows of the files in their order: the columns that the templates ``parts`` use, as the file's text.

    A number keeps its digits, a date stays text, true and false are "true" and "false". A file that a row names as its
    audio or image must be there, and have the header of one; such rows have the key `FOLDER` too.

    Args:
        field: the setting that an error is about.
        on_bad_line: "skip" leaves out every broken line. "stop" raises an error for the first one; then a column that a
            row lacks counts as null, and what other columns hold does not matter.
        fix: what an error for a line says to do; ``{unit}`` becomes "line" or "element".
        skipped: counts what is left out, by file.

    Raises:
        ConfigError: while iterating, a line is broken, or an element of a list is no JSON.
        OSError: while iterating, a file cannot be read.
    """
    columns, kinds = columns_of(parts), dict[str, tuple[str, str]]()
    for file in files:
        more = {FOLDER: str(Path(file).parent)} if parts.keys() & MEDIA else {}
        for entry in rows_of(field, file, strict=on_bad_line == "skip", columns=columns):
            if on_bad_line == "skip":
                problem = entry.problem if entry.row is None else unfilled({**entry.row, **more}, parts)
                if problem and skipped is not None:
                    skipped[file].add(entry, problem)
                if problem:
                    continue
            else:
                at = f"{entry.unit} {entry.number} of {Path(file).name}"
                if problem := _why_stop(entry, parts, columns, more):
                    raise ConfigError(field, file, f"{at} {problem}", fix.format(unit=entry.unit))
                if problem := _mixed(entry, columns, kinds, file):
                    raise ConfigError(field, file, f"{at} {problem}", _ALIKE)
            yield {column: _text((entry.row or {}).get(column)) for column in columns} | more


def table(rows: Iterator[TextRow]) -> datasets.Dataset | None:
    """Returns all rows as a table of text in memory, or None if there are none."""
    tables = list[datasets.Dataset]()
    while batch := list(islice(rows, 10_000)):
        features = datasets.Features({column: datasets.Value("large_string") for column in batch[0]})
        columns = {column: [row[column] for row in batch] for column in features}
        tables.append(datasets.Dataset.from_dict(columns, features=features))
    return datasets.concatenate_datasets(tables) if tables else None


def check_columns(field: str, files: Iterable[str], parts: Mapping[str, str], head: int | None) -> None:
    """Checks that each column that the templates use is in one row, at least.

    Args:
        head: number of rows that are looked at; None looks at all.

    Raises:
        ConfigError: a column is in none of them. It is not raised if there are no rows.
    """
    missing, columns = dict.fromkeys(columns_of(parts)), dict[str, None]()
    found = (
        entry.row
        for file in files
        for entry in rows_of(field, file, strict=False, columns=columns_of(parts))
        if entry.row is not None
    )
    for row in islice(found, head):
        columns.update(dict.fromkeys(row))
        missing = {column: None for column in missing if column not in row}
        if not missing:
            return
    for part, spec in parts.items():
        for column in columns_of({part: spec}):
            if columns and column in missing:
                raise no_column(column, spec, columns, part)


def unfilled(row: Row, parts: Mapping[str, str]) -> str:
    """Says why a row does not fill `DataConfig.parts`, or nothing. In a sentence it follows the place of the row."""
    for part, spec in parts.items():
        try:
            read_part(part, spec, row)
            found = media_in(media_value(spec, row, part), spec, part, row[FOLDER]) if part in MEDIA else []
        except ConfigError as error:
            return f"does not fill {part} ({error.problem})"
        if problem := next(filter(None, map(problem_of, found)), ""):
            return f"does not fill {part} ({problem})"
    return ""


_ALIKE = "write both alike, or take each for the text that it is with data.on_bad_line=skip"


def _why_stop(entry: Entry, parts: Mapping[str, str], columns: Sequence[str], more: Row) -> str:
    """Says why on_bad_line="stop" stops at a line, or nothing."""
    if entry.row is None:
        return entry.problem
    row: Row = {column: entry.row.get(column) for column in columns} | more
    for value in row.values():
        if isinstance(value, Unfit):
            return value.problem
    return unfilled(row, parts)


def _mixed(entry: Entry, columns: Sequence[str], kinds: dict[str, tuple[str, str]], file: str) -> str:
    """Says the same of a line whose values are of another kind than those of lines before it, which ``kinds`` notes."""
    for column in columns:
        if (value := (entry.row or {}).get(column)) is None:
            continue
        kind = KINDS[type(value)]
        before, above = kinds.setdefault(column, (kind, f"{entry.unit} {entry.number} of {Path(file).name}"))
        if kind != before:
            above = above.removesuffix(f" of {Path(file).name}")
            return f"holds {kind} in column {column!r}, where {above} holds {before}"
    return ""


def _text(value: object) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | dict):
        return json.dumps(_as_json(value), ensure_ascii=False, default=str)
    return None if value is None else str(value)


def _as_json(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _as_json(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_as_json(entry) for entry in value]
    return json.loads(value) if isinstance(value, Number) else value
