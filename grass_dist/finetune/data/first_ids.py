"""The first ids of a text of any length: the whole of a very long one, tokenised, may fill the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

LONG = 64
"""Characters of a text for each token that is kept of it, beyond which it is not tokenised whole."""

MARGIN = 64
"""Tokens at the end of a piece that may be others than in the whole text."""


def first_ids(encode: Callable[[str], list[int]], text: str, count: int) -> list[int]:
    """The ids of a text, all or, of a very long one, at least the first ``count``.

    Of a long text the beginning is tokenised, and twice as much of it: where both have the same first ids, far enough
    from the ends, these are taken for those of the whole text. Otherwise pieces grow, up to the whole.
    """
    before = list[int]()
    for piece in beginnings(text, count):
        ids = encode(piece)[:-MARGIN]
        if len(before) >= count and ids[:count] == before[:count]:
            return ids
        before = ids
    return encode(text)


def beginnings(text: str, count: int) -> Iterator[str]:
    """Pieces of a long text, each twice as long as the one before, that may hold its first ``count`` ids.

    They end before white space where there is some in their second half. Of a text that is not long there are none.
    """
    size = LONG * (count + MARGIN)
    while 2 * size < len(text):
        end = next((at for at in range(size, size // 2, -1) if text[at].isspace()), size)
        yield text[:end]
        size *= 2
