"""Puts the images of a row into its messages, wherever the data have them: in parts, in a column, or by a mark."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from grass_dist.errors import ConfigError
from grass_dist.finetune.data.config import DataConfig, fill_template
from grass_dist.finetune.data.conversations import Message, conversation_of
from grass_dist.finetune.data.json_lines import Row
from grass_dist.finetune.data.media import Medium, media_in

MARK = "<image>"
"""What data of many models write for an image, whatever the model's own token is."""

_SOURCES = ("image", "path", "url")
"""Keys of a part of a message that name its image."""


class Turns(NamedTuple):
    """The messages of a row, and the images in their order.

    The content of a message is a text or, if it has images and the chat template writes them, a list of parts.
    """

    messages: list[Message]
    images: list[Medium]

    def upto(self, count: int, mark: str) -> Turns:
        """Returns the first messages, with their images."""
        messages = self.messages[:count]
        return Turns(messages, self.images[: sum(_images_in(message, mark) for message in messages)])

    def last_text(self, mark: str) -> str:
        """Returns the text of the last message without its images."""
        content = self.messages[-1].get("content", "")
        if not isinstance(content, str):
            content = "".join(part.get("text", "") for part in content)
        return content.replace(mark, "").strip()


def turns_of(row: Row, config: DataConfig, images: Sequence[Medium], mark: str, folder: str, in_parts: bool) -> Turns:
    """Returns the messages of a row with its images.

    An image stands where a part of a message is one; where its text has the ``mark`` or `MARK`, if there are as many
    as images; or else before the text of the first user.

    Args:
        images: of the column of images.
        mark: what stands for an image in a text of the model.
        folder: folder that the paths of images in messages start from.
        in_parts: whether the chat template writes parts that are images; else the mark is put into the text.

    Raises:
        ConfigError: the messages have other places for images than there are, or parts of another kind.
    """
    if config.messages is not None:
        messages = conversation_of(row, config)
    else:
        prompt = fill_template(config.prompt or "", row, "prompt")
        answer = fill_template(config.completion or "", row, "completion")
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    pieces = [_pieces(message, config, folder) for message in messages]
    if images and not any(isinstance(piece, Medium | None) for each in pieces for piece in each):
        pieces = _placed(messages, pieces, len(images), mark)
    left, found = list(images), list[Medium]()
    for each in pieces:
        for piece in each:
            if isinstance(piece, str):
                continue
            if piece is None and not left:
                problem = f"a row has {len(images)} images, and its messages have more places for one"
                raise ConfigError("data.image", config.image, problem, "give each place an image")
            found.append(left.pop(0) if piece is None else piece)
    if left:
        problem = f"a row has {len(images)} images, and its messages {len(images) - len(left)} places for one"
        raise ConfigError("data.image", config.image, problem, "give each image one place, or none to all of them")
    written = [_content(each, mark, in_parts) for each in pieces]
    kept = [
        {**message, "content": content} if "content" in message else message
        for message, content in zip(messages, written, strict=True)
    ]
    return Turns(kept, found)


Piece = str | Medium | None
"""Text, an image, or the next image of the column."""


def _pieces(message: Message, config: DataConfig, folder: str) -> list[Piece]:
    content = message.get("content", "")
    if isinstance(content, str):
        return [content]
    found = list[Piece]()
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            found.append(str(part.get("text", "")))
        elif kind in ("image", "image_url"):
            found.append(_image(part, folder))
        else:
            what = repr(kind) if kind else type(part).__name__
            problem = f"a message has a part of type {what}"
            raise ConfigError("data.messages", config.messages, problem, "write parts of type text and image alone")
    return found


def _image(part: Mapping[str, Any], folder: str) -> Medium | None:
    value: Any = part.get("image_url") or next((part[key] for key in _SOURCES if part.get(key)), None)
    if value is None and part.get("bytes"):
        value = part
    if isinstance(value, Mapping) and "url" in value:
        value = value["url"]
    return next(iter(media_in(value, "messages", "image", folder)), None)


def _placed(messages: Sequence[Message], pieces: list[list[Piece]], count: int, mark: str) -> list[list[Piece]]:
    """Returns the pieces of messages, all of them texts, with places for the images of the column."""
    marks = re.compile("|".join(map(re.escape, {mark, MARK})))
    asks = [number for number, message in enumerate(messages) if message["role"] != "assistant"]
    if sum(len(marks.findall(str(piece))) for number in asks for piece in pieces[number]) == count:
        split = dict(enumerate(pieces))
        for number in asks:
            texts = marks.split("".join(map(str, pieces[number])))
            split[number] = [piece for text in texts for piece in (None, text)][1:]
        return [split[number] for number in range(len(pieces))]
    first = next((number for number, message in enumerate(messages) if message["role"] == "user"), 0)
    return [[*([None] * count), *each] if number == first else each for number, each in enumerate(pieces)]


def _content(pieces: Sequence[Piece], mark: str, in_parts: bool) -> Any:
    """Returns the content of a message."""
    if not in_parts or all(isinstance(piece, str) for piece in pieces):
        beside = "\n" if any(not isinstance(piece, str) for piece in pieces) else ""
        texts = [piece if isinstance(piece, str) else mark for piece in pieces]
        if beside and isinstance(pieces[-1], str) and all(not isinstance(piece, str) for piece in pieces[:-1]):
            return "".join(texts[:-1]) + beside + texts[-1].lstrip("\n")
        return "".join(texts)
    parts = [{"type": "text", "text": piece} if isinstance(piece, str) else {"type": "image"} for piece in pieces]
    return [part for part in parts if part.get("text") != ""]


def _images_in(message: Message, mark: str) -> int:
    content = message.get("content", "")
    return content.count(mark) if isinstance(content, str) else sum(part["type"] == "image" for part in content)
