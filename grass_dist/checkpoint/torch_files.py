"""Checks a file of `torch.save` before `torch.load` reads it, so that reading cannot fill the memory.

`torch.load(weights_only=True)` executes nothing, but a small file can make it fill any memory: by a deflated archive,
a size that an archive only claims, or a pickle that copies one large thing again and again. So an archive is read only
if it is as `torch.save` writes it, and its pickle only if reading it takes memory in proportion to its bytes.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from grass_dist.regular_files import open_regular

LARGEST_PICKLE = 32 * 2**20
"""The most bytes of the pickle, which describes the tensors in some 200 bytes each."""
MOST_OPCODES = 4_000_000
"""The most instructions of the pickle. A tensor takes about 25, and each can take some hundred bytes of memory."""
_MOST_RECORDS = 2**20

_END, _END64, _LOCATOR = 22, 56, 20
_HARMLESS = {
    "collections OrderedDict",
    "builtins set",
    "__builtin__ set",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
}
_STORAGES_AND_TYPES = re.compile(
    r"torch ((B?Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool|ComplexFloat|ComplexDouble)Storage"
    r"|Size|device|bfloat16|bool|u?int(8|16|32|64)|float(16|32|64|8_\w{1,10})|complex(64|128))"
)


class Unreadable(Exception):
    """The file is not read; the text is a reason without a full stop."""


def check_file(file: Path, allowed: Iterable[str]) -> None:
    """Reads the archive's directory and its pickle without building anything.

    Args:
        allowed: full names of classes that the file may mention besides tensors.

    Raises:
        Unreadable: it is not an archive as `torch.save` writes it, or takes too much to read.
        pickle.UnpicklingError: it mentions an object that is not allowed; the text has ``GLOBAL`` and its name.
        OSError: it cannot be read, or is not a regular file.
    """
    with open_regular(file) as stream:
        _check_end(stream)
        try:
            with zipfile.ZipFile(stream) as archive:
                record = _check_records(archive, os.fstat(stream.fileno()).st_size)
                with archive.open(record) as part:
                    content = part.read(LARGEST_PICKLE + 1)
        except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, struct.error, EOFError) as error:
            raise Unreadable(f"it is no archive of torch's ({type(error).__name__}: {error})") from None
    if len(content) > LARGEST_PICKLE:
        raise Unreadable(f"its description has more than {LARGEST_PICKLE} bytes")
    check_pickle(content, allowed)


def _check_end(stream: BinaryIO) -> None:
    """Checks that the archive's directory lies right before its end, so that all readers find the same one."""
    size = stream.seek(0, os.SEEK_END)
    if size < _END:
        raise Unreadable("it is no archive of torch's")
    stream.seek(max(0, size - _END - _LOCATOR - _END64))
    tail = stream.read()
    end = tail[-_END:]
    signature, *_, length, start, comment = struct.unpack("<4s4H2LH", end)
    behind = size - _END
    if signature == b"PK\x05\x06" and tail[-_END - _LOCATOR : -_END][:4] == b"PK\x06\x07":
        behind -= _LOCATOR + _END64
        whole = tail[: _END64 + _LOCATOR]
        claimed = struct.unpack("<Q", whole[_END64 + 8 : _END64 + 16])[0]
        if len(tail) < _END + _LOCATOR + _END64 or whole[:4] != b"PK\x06\x06" or claimed != behind:
            raise Unreadable("it is no archive of torch's")
        length, start = struct.unpack("<QQ", whole[40:56])
    stream.seek(0)
    if signature != b"PK\x05\x06" or comment or start + length != behind or stream.read(4) != b"PK\x03\x04":
        raise Unreadable("it is no archive of torch's")
    stream.seek(0)


def _check_records(archive: zipfile.ZipFile, size: int) -> zipfile.ZipInfo:
    """The record of the pickle. All records must be stored uncompressed, and within the bytes of the file."""
    records = archive.infolist()
    if len(records) > _MOST_RECORDS:
        raise Unreadable(f"it has {len(records)} records")
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise Unreadable(f"its record {record.filename!r:.80} is compressed, which torch.save never does")
        if record.flag_bits & 1 or record.header_offset + record.file_size > size:
            raise Unreadable(f"its record {record.filename!r:.80} does not lie in it")
    if sum(record.file_size for record in records) > size:
        raise Unreadable("its records overlap")
    names = [record.filename.lower() for record in records]  # torch does not tell large letters from small ones
    if len(set(names)) != len(names) or len({name.split("/")[0] for name in names}) != 1:
        raise Unreadable("it has a record twice, or two archives in it")
    pickles = [record for record in records if record.filename.lower().endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Unreadable("it has no data.pkl")
    return pickles[0]


_ATOM, _FLAT, _NEW, _FETCHED, _HOLDS = range(5)
"""What lies on the stack of a pickle: a number or text; a short tuple of these; something larger that was just made;
something larger that was made before; something new that holds such a thing."""
_SHORT = 64
_ATOMS = {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1"}
_ATOMS |= {"BINUNICODE", "SHORT_BINSTRING", "EMPTY_TUPLE", "GLOBAL"}
_EMPTY = {"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"}


def check_pickle(content: bytes, allowed: Iterable[str]) -> None:
    """Follows a pickle by the sizes of the objects that it would make.

    Copying or hashing one large thing again and again, by calls or as a key, takes more memory than the pickle's bytes.
    A file of `torch.save` does neither: it writes out the arguments of each call.

    Raises:
        Unreadable: it does, it is cut, it has an instruction that `torch.save` does not write, or too many of them.
        pickle.UnpicklingError: it mentions an object that is not allowed; the text has ``GLOBAL`` and its name.
    """
    known = {" ".join(name.rsplit(".", 1)) for name in allowed} | _HARMLESS
    try:
        _follow(content, known)
    except (ValueError, IndexError, KeyError, UnicodeError) as error:
        raise Unreadable(f"its description is damaged ({type(error).__name__}: {error})") from None


def _follow(content: bytes, known: set[str]) -> None:
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    for count, (op, arg, _) in enumerate(pickletools.genops(content)):
        name = op.name
        if count > MOST_OPCODES:
            raise Unreadable(f"its description has more than {MOST_OPCODES} instructions")
        if name in _ATOMS:
            if name == "GLOBAL" and arg not in known and not _STORAGES_AND_TYPES.fullmatch(str(arg)):
                raise pickle.UnpicklingError(f"GLOBAL {'.'.join(str(arg).split(' '))}")
            stack.append(_ATOM)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[int(arg or 0)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(kind if (kind := memo[int(arg or 0)]) <= _FLAT else _FETCHED)
        elif name == "MARK":
            marks.append(len(stack))
        elif name in _EMPTY:
            stack.append(_NEW)
        elif name == "BINPERSID":
            stack[-1] = _ATOM
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            at = marks.pop() if name == "TUPLE" else len(stack) - int(name[-1])
            items = _taken(stack, at)
            small = len(items) <= _SHORT and not any(items)
            stack.append(_FLAT if small else _HOLDS if _holds(items) else _NEW)
        elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
            at = marks.pop() if name.endswith("S") else len(stack) - (1 if name == "APPEND" else 2)
            items = _taken(stack, at)
            if name.startswith("SET") and _holds(items[::2]):
                raise Unreadable("its description has something large as a key")
            if _holds(items):
                stack[-1] = max(stack[-1], _HOLDS)
        elif name in ("REDUCE", "NEWOBJ"):
            if stack.pop() >= _FETCHED:
                raise Unreadable("its description copies something large that it has already")
            stack[-1] = _NEW
        elif name == "BUILD":
            if stack.pop() == _FETCHED:
                raise Unreadable("its description copies something large that it has already")
        elif name not in ("PROTO", "STOP"):
            raise Unreadable(f"its description has the instruction {name}, which torch.save does not write")


def _taken(stack: list[int], at: int) -> list[int]:
    if not 0 <= at <= len(stack):
        raise IndexError("the stack is empty")
    items = stack[at:]
    del stack[at:]
    return items


def _holds(items: list[int]) -> bool:
    return any(item >= _FETCHED for item in items)
