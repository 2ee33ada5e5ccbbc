"""Reads a local JSON file line by line, or a list in it element by element, with what is wrong with each."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO, NamedTuple, cast

from grass_dist.errors import ConfigError
from grass_dist.finetune.data.config import kind_of

Row = dict[str, Any]

LONGEST = 64 * 2**20
"""Most bytes of a line; a longer one is broken, and is not kept in memory."""

DEEPEST = 63
"""Most levels of lists and objects in a row, the row's own included. Arrow takes no more."""


class Number(str):
    """A number, as the text that the file writes: 2.50 stays "2.50"."""

    __slots__ = ()


class Unfit(str):
    """NaN, Infinity, -Infinity, or a number too large for every program; only with ``strict=False``."""

    __slots__ = ()

    @property
    def problem(self) -> str:
        """Says what is wrong with the line that holds it."""
        return "holds a number that is too large" if self[-1].isdigit() else f"holds {self}, which is no JSON"


KINDS = {
    dict: "an object",
    list: "a list",
    str: "text",
    Number: "a number",
    Unfit: "a number",
    bool: "true or false",
    NoneType: "null",
}
"""Name of each kind of value in JSON."""

_BOM, _SPACE, _BREAK = b"\xef\xbb\xbf", b" \t\r\n", "\n"
_NESTED = f"is nested in more than {DEEPEST} levels"
_HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


class Entry(NamedTuple):
    """A line, or an element of a list: its row, or what is wrong with it."""

    unit: str  # "line" or "element"
    number: int  # from 1; blank lines count
    row: Row | None
    problem: str = ""  # what follows in a sentence on "line 3"


@dataclass
class Skipped:
    """Counts what on_bad_line="skip" left out of a file; ``str()`` of it is a sentence."""

    file: str
    count: int = 0

    first_lines: list[int] = field(default_factory=list)
    """Numbers of the first three lines, or elements of a JSON list, counted from 1."""

    problem: str = ""
    """Problem of the first one: ``"line 3 is no JSON (…)"``."""

    def add(self, entry: Entry, problem: str) -> None:
        """Counts one more."""
        self.count += 1
        self.problem = self.problem or f"{entry.unit} {entry.number} {problem}"
        self.first_lines += [entry.number] * (self.count <= 3)

    def __str__(self) -> str:
        numbers = ", ".join(map(str, self.first_lines)) + (", …" if self.count > len(self.first_lines) else "")
        unit = self.problem.split()[0] + ("s" if self.count > 1 else "")
        return f"{self.file}: left out {self.count} broken {unit} ({numbers}); {self.problem}"


def entries(setting: str, file: str, *, strict: bool = True) -> Iterator[Entry]:
    """Reads the lines that are not blank or, if a .json file begins with ``[``, the elements of its list.

    Numbers are `Number`, which loses nothing of them.

    Args:
        strict: whether a line with ``NaN`` or ``1e999`` in any column is broken, and so is a line ``null``. If not,
            such values are `Unfit`, and a line ``null`` is an empty row.

    Raises:
        ConfigError: the file is not a list of elements that are JSON; it is about ``setting``.
        OSError: the file cannot be read.
    """
    with cast(BinaryIO, gzip.open(file) if file.lower().endswith(".gz") else open(file, "rb")) as opened:
        is_list = kind_of(file) == ".json" and opened.read(4096).removeprefix(_BOM).lstrip(_SPACE).startswith(b"[")
        opened.seek(0)
        unit, found = ("element", _elements(setting, file, opened.read())) if is_list else ("line", _lines(opened))
        for number, raw in found:
            row, problem = (None, f"is longer than {LONGEST >> 20} MB") if raw is None else _parse(raw, strict)
            yield Entry(unit, number, row, problem)


def _lines(opened: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Reads the lines that are not blank; None stands for one that is too long."""
    for number in count(1):
        pieces, size = list[bytes](), 0
        while piece := opened.readline(2**20):
            size += len(piece)
            pieces = [*pieces, piece] if size <= LONGEST else []
            if piece.endswith(b"\n"):
                break
        if not size:
            return
        raw = b"".join(pieces).removeprefix(_BOM if number == 1 else b"").rstrip(_SPACE)
        if size > LONGEST or raw:
            yield number, raw if size <= LONGEST else None


def _elements(setting: str, file: str, data: bytes) -> Iterator[tuple[int, bytes]]:
    """The elements of a list, each of which is JSON of some kind.

    Raises:
        ConfigError: one is no JSON, so it is not known where the next one begins; or the list does not end the file.
    """
    text = data.decode(errors="surrogateescape")  # what is no UTF-8 spoils its own element only
    number, end, sign = 0, text.index("["), "["
    if text.startswith("]", first := _after_space(text, end + 1)):
        end, sign = first, "]"
    while sign != "]":
        number, begin = number + 1, _after_space(text, end + 1)
        try:
            end = _ANY.raw_decode(text, begin)[1]
            raw, end = text[begin:end], _after_space(text, end)
            if (sign := text[end : end + 1]) not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        except (json.JSONDecodeError, RecursionError) as error:
            nested = isinstance(error, RecursionError)
            problem = _NESTED if nested else _no_json(error, begin, f", in line {error.lineno}")
            at, fix = f"element {number} of {Path(file).name}", "repair it, or write one object a line (.jsonl)"
            raise ConfigError(setting, file, f"{at} {problem}", fix) from None
        yield number, raw.encode(errors="surrogateescape")
    if text[end + 1 :].strip():
        problem = f"more follows after the end of the list in line {text.count(_BREAK, 0, end) + 1}"
        raise ConfigError(setting, file, problem, "make it one list, or write one object a line (.jsonl)")


def _after_space(text: str, at: int) -> int:
    while text.startswith((" ", "\t", "\r", "\n"), at):
        at += 1
    return at


def _no_json(error: json.JSONDecodeError, begin: int = 0, line: str = "") -> str:
    return f"is no JSON ({error.msg.removesuffix(' at')} at character {error.pos - begin + 1} of it{line})"


def _parse(raw: bytes, strict: bool) -> tuple[Row | None, str]:
    """Returns the row of a line or element, or what is wrong with it."""
    try:
        text = raw.decode()
        row = (_STRICT if strict else _TOLERANT).decode(text)
        if row is None and not strict:
            return {}, ""
        if not isinstance(row, dict):
            return None, f"is {KINDS[type(row)]}, not an object"
        if text.count("[") + text.count("{") > DEEPEST and _is_nested(row):
            return None, _NESTED
        if _HALF_A_PAIR.search(text):
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        return None, f"is no valid UTF-8 (byte {error.start + 1} of it)"
    except UnicodeEncodeError:
        return None, "holds half a surrogate pair"
    except json.JSONDecodeError as error:
        return None, _no_json(error)
    except _Refused as error:
        return None, str(error)
    except RecursionError:
        return None, _NESTED
    return row, ""


def _is_nested(row: Row) -> bool:
    level: list[Any] = [row]
    for _ in range(DEEPEST):
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
        level = [each for each in level if isinstance(each, dict | list)]
    return bool(level)


class _Refused(Exception):
    """JSON that the module `json` reads, but that not every program reads alike."""


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise _Refused("names a column twice")
    return row


def _float(text: str) -> Number | Unfit:
    return Unfit(text) if math.isinf(float(text)) else Number(text)


def _strictly(text: str) -> Number:
    if isinstance(number := _float(text), Unfit):
        raise _Refused(number.problem)
    return number


def _constant(name: str) -> None:
    raise _Refused(Unfit(name).problem)


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_int=Number, parse_float=_strictly, parse_constant=_constant)
_ANY = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)
_TOLERANT = json.JSONDecoder(object_pairs_hook=_object, parse_int=Number, parse_float=_float, parse_constant=Unfit)
