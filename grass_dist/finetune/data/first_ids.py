"""Finds the first ids of a text of any length: a very long one, tokenised as a whole, may fill the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

LONG = 64
"""Characters for each token that is kept of a text; a longer text is not tokenised as a whole."""

MARGIN = 64
"""Tokens at the end of a piece that may differ from those of the whole text."""


def first_ids(encode: Callable[[str], list[int]], text: str, count: int) -> list[int]:
    """Returns all ids of a text or, of a very long one, at least the first ``count``.

    The beginning of a long text is tokenised, and then twice as much of it. Where both have the same first ids, far
    enough from the ends, these are taken for the ids of the whole text. Otherwise the pieces grow, up to the whole.
    """
    before = list[int]()
    for piece in beginnings(text, count):
        ids = encode(piece)[:-MARGIN]
        if len(before) >= count and ids[:count] == before[:count]:
            return ids
        before = ids
    return encode(text)


def beginnings(text: str, count: int) -> Iterator[str]:
    """Gives pieces of a long text, each twice as long as the one before, that may hold its first ``count`` ids.

    They end before white space where there is some in their second half. A text that is not long has no pieces.
    """
    size = LONG * (count + MARGIN)
    while 2 * size < len(text):
        end = next((at for at in range(size, size // 2, -1) if text[at].isspace()), size)
        yield text[:end]
        size *= 2
