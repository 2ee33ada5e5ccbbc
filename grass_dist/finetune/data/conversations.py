"""Writes conversations of many turns by a chat template, and finds in them what the assistant has written.

A template that marks it with ``{% generation %}`` says so itself. Other templates are rendered turn by turn: what the
model is given before a turn, and the conversation up to the end of that turn, tell where the turn is in the whole.
Templates that write a turn in another way once others follow (Qwen3 leaves earlier thinking out) are asked by another
text in the place of the turn: what stays the same is around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from grass_dist.errors import ConfigError, shorten
from grass_dist.finetune.data.batches import Example
from grass_dist.finetune.data.chat import Chat, to_come
from grass_dist.finetune.data.config import DataConfig, list_of
from grass_dist.model.loss import IGNORED

Message = dict[str, Any]

_TEXTS = ("K 4f7c x", "Q 9b2e z")
"""Two texts without a common beginning or end, which no template would write by itself."""
_END_OF_THINKING = "</think>"
_FIX = "give the tokenizer a chat template with {% generation %} blocks around what the assistant writes"


class Span(NamedTuple):
    """Characters ``start`` to ``stop`` of a rendering."""

    start: int
    stop: int


def conversation_of(row: Mapping[str, Any], config: DataConfig) -> list[Message]:
    """Returns the messages of a row, without the keys that are null (a table gives all messages the same keys).

    Raises:
        ConfigError: the column does not hold messages.
    """
    assert config.messages is not None
    messages = [_without_null(message) for message in list_of(config.messages, row, "messages")]
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            keys = f"has {', '.join(message)}" if isinstance(message, dict) else f"is {shorten(message, 40)!r}"
            problem = f"message {number} of a row has no role, but {keys}"
            raise ConfigError("messages", config.messages, problem, 'write {"role": "user", "content": "..."}')
    return messages


def is_learnt(message: Message) -> bool:
    """Says whether it is a turn of the assistant that says, or calls, something."""
    content = message.get("content")
    said = bool(content.strip()) if isinstance(content, str) else bool(content)
    return message["role"] == "assistant" and (said or bool(message.get("tool_calls")))


def tools_of(row: Mapping[str, Any], config: DataConfig) -> list[Any] | None:
    """Returns the tools that the assistant of a row may call; None if there are none."""
    if config.tools is None:
        return None
    return [_without_null(tool) for tool in list_of(config.tools, row, "tools")] or None


class Dialogues:
    """Conversations by the chat template of a tokenizer.

    Raises:
        ConfigError: the tokenizer has no template that writes a question and an answer, or it is a slow one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        if not tokenizer.chat_template:
            fix = "set chat_template in its tokenizer_config.json, or train a model that was made for chat"
            raise ConfigError("messages", None, "the tokenizer has no chat template", fix)
        if not tokenizer.is_fast:
            raise ConfigError("messages", None, "the tokenizer does not tell where its tokens are", "use a fast one")
        chat = Chat(tokenizer)
        self._in_parts, self._end, self._marks = chat.in_parts, chat.end, chat.marks
        self._eos: Any = tokenizer.eos_token_id

    def example(self, messages: Sequence[Message], tools: list[Any] | None, max_length: int) -> Example:
        """Makes the ids of a conversation, with labels on what the assistant writes and on the ends of its turns.

        What follows the last label is left out, and then what is beyond max_length.

        Raises:
            ConfigError: the template cannot write it, or it cannot be told what of it the assistant has written.
        """
        ids, learnt = self._marked(messages, tools) if self._marks else self._found(messages, tools)
        if self._eos is not None and not self._end and messages and is_learnt(messages[-1]) and ids[-1] != self._eos:
            ids, learnt = [*ids, self._eos], [*learnt, True]
        size = min(max((i + 1 for i, is_ in enumerate(learnt) if is_), default=1), max_length)
        labels = [token if is_ else IGNORED for token, is_ in zip(ids, learnt, strict=True)]
        return {"input_ids": ids[:size], "labels": [IGNORED, *labels[1:size]]}

    def spans(self, messages: Sequence[Message], tools: list[Any] | None) -> tuple[str, list[Span]]:
        """Returns the whole rendering, and the characters of it that are learnt: see `example`.

        Raises:
            ConfigError: see `example`.
        """
        ids, learnt = self._marked(messages, tools) if self._marks else self._found(messages, tools)
        whole = self._render(messages, tools)
        spans, before = list[Span](), False
        for (start, stop), is_ in zip(self._encode(whole)[1], learnt, strict=True):
            if is_:
                spans[-1:] = [Span(spans[-1].start, stop)] if before else [*spans[-1:], Span(start, stop)]
            before = is_
        if self._eos is not None and not self._end and messages and is_learnt(messages[-1]) and ids[-1] != self._eos:
            end = str(self._tokenizer.eos_token)
            spans.append(Span(len(whole), len(whole) + len(end)))
            whole += end
        return whole, spans

    def given(self, messages: Sequence[Message], tools: list[Any] | None) -> str:
        """Returns the text that the assistant's next turn follows."""
        return self._render(messages, tools, add_generation_prompt=True)

    def given_ids(self, messages: Sequence[Message], tools: list[Any] | None) -> list[int]:
        """Returns the ids that the assistant's next turn follows."""
        return self._encode(self.given(messages, tools))[0]

    def _marked(self, messages: Sequence[Message], tools: list[Any] | None) -> tuple[list[int], list[bool]]:
        """Returns the ids, and for each whether the template marks it or the end of a turn that it marks."""
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        encoded = self._apply(messages, tools, **options)
        ids, learnt = list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]
        end = self._encode(self._end)[0] if self._end else []
        if not any(learnt):
            raise _refused("marks nothing of a conversation as the assistant's", _FIX)
        for last in [i for i, (is_, then) in enumerate(zip(learnt, [*learnt[1:], False], strict=True)) if is_ > then]:
            if end and ids[last + 1 : last + 1 + len(end)] == end:
                learnt[last + 1 : last + 1 + len(end)] = [True] * len(end)
        text = str(self._tokenizer.decode([token for token, is_ in zip(ids, learnt, strict=True) if is_]))
        turns = list(filter(is_learnt, messages))
        for turn in turns:
            self._check("", text, turn, last=turn is turns[-1])
        return ids, learnt

    def _found(self, messages: Sequence[Message], tools: list[Any] | None) -> tuple[list[int], list[bool]]:
        whole = self._render(messages, tools)
        ids, places = self._encode(whole)
        spans = list[Span]()
        turns = [number for number, message in enumerate(messages) if is_learnt(message)]
        for number in turns:
            span = self._span(whole, messages, tools, number)
            if spans and span.start < spans[-1].stop:
                raise _refused(f"does not tell where turn {number} begins", _FIX)
            self._check(whole[: span.start], whole[slice(*span)], messages[number], last=number == turns[-1])
            spans.append(span)
        learnt = [any(span.start <= start < span.stop for span in spans) and stop > start for start, stop in places]
        return ids, learnt

    def _span(self, whole: str, messages: Sequence[Message], tools: list[Any] | None, number: int) -> Span:
        """Finds the assistant's turn of this number, with its end, in the rendering of all turns."""
        given = self._tried(messages[:number], tools, add_generation_prompt=True)
        if given is None or not whole.startswith(given):
            given = None
        upto = self._ended(self._tried(messages[: number + 1], tools) or "")
        if given is not None and len(upto) > len(given) and whole.startswith(upto):
            return self._with_end(Span(len(given), len(upto)), whole)
        said = [[*messages[:number], _said(text), *messages[number + 1 :]] for text in _TEXTS]
        one, other = (self._tried(turns, tools) for turns in said)
        if one is not None and other is not None:
            before, after = _shared(one, other), _shared(one[::-1], other[::-1])[::-1]
            start, stop = len(before), len(whole) - len(after)
            if start < stop and whole.startswith(before) and whole.endswith(after):
                start = start if given is None else min(start, len(given))
                return self._with_end(Span(start, stop), whole)
        if given is not None and self._end and (found := whole.find(self._end, len(given))) >= 0:
            return Span(len(given), found + len(self._end))
        raise _refused(f"writes turn {number} of a conversation in another way once others follow", _FIX)

    def _with_end(self, span: Span, whole: str) -> Span:
        """Returns a turn with its end: what ends every answer or, where the next turn begins with it, the eos token."""
        text = whole[slice(*span)]
        for end in filter(None, (self._end, str(self._tokenizer.eos_token or ""))):
            if not text.rstrip().endswith(end) and whole.startswith(end, span.stop):
                return Span(span.start, span.stop + len(end))
        return span

    def _ended(self, text: str) -> str:
        """Returns a rendering without what follows the end of its last turn."""
        at = text.rfind(self._end) if self._end else -1
        return text[: at + len(self._end)] if at >= 0 and not text[at + len(self._end) :].strip() else text

    def _check(self, given: str, text: str, message: Message, *, last: bool) -> None:
        """Checks that what is learnt of a turn, ``text``, holds it.

        The tag that opens it may be given to the model, and of an earlier turn a template may leave the thinking out.
        """
        content = message.get("content")
        content = content if isinstance(content, str) else ""
        if not last and _END_OF_THINKING in content:
            content = content.rpartition(_END_OF_THINKING)[2]
        if _squeezed(to_come(content, given)) not in _squeezed(text):
            fix = f"{_FIX}, or leave out of the data what it does not write"
            raise _refused(f"drops or rewrites what the assistant says, {shorten(content, 40)!r}", fix)
        for call in message.get("tool_calls") or ():
            call = call.get("function", call) if isinstance(call, dict) else {}
            if str(call.get("name", "")) not in text:
                raise _refused(f"drops the call of {call.get('name')!r}", "use a template that writes tool calls")

    def _tried(self, messages: Sequence[Message], tools: list[Any] | None, **options: Any) -> str | None:
        """Returns the rendering, or None where the template refuses these messages."""
        try:
            return self._render(messages, tools, **options) if messages else None
        except ConfigError:
            return None

    def _render(self, messages: Sequence[Message], tools: list[Any] | None, **options: Any) -> str:
        return str(self._apply(messages, tools, tokenize=False, **options))

    def _apply(self, messages: Sequence[Message], tools: list[Any] | None, **options: Any) -> Any:
        given = [self._in_its_form(message) for message in messages]
        try:
            return self._tokenizer.apply_chat_template(given, tools=tools, **options)
        except Exception as error:  # a template may raise anything, also for one row alone
            reason = " ".join(str(error).split()) or type(error).__name__
            fix = "repair that conversation, or use a model whose template takes it"
            raise _refused(f"refuses a conversation ({shorten(reason, 200)})", fix) from error

    def _in_its_form(self, message: Message) -> Message:
        content = message.get("content")
        if not self._in_parts or not isinstance(content, str):
            return message
        return {**message, "content": [{"type": "text", "text": content}]}

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the ids of a text, and the characters of each."""
        encoded: Any = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), list(encoded["offset_mapping"])


def dialogues_of(tokenizer: PreTrainedTokenizerBase) -> Dialogues:
    """Returns the `Dialogues` of a tokenizer, made once for each template.

    Raises:
        ConfigError: see `Dialogues`.
    """
    return _dialogues(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=4)
def _dialogues(tokenizer: PreTrainedTokenizerBase, _template: str) -> Dialogues:
    return Dialogues(tokenizer)


def _without_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_null(entry) for key, entry in value.items() if entry is not None}
    return [_without_null(entry) for entry in value] if isinstance(value, list) else value


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _shared(one: str, other: str) -> str:
    """Returns the beginning that both have."""
    return one[: next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _refused(what: str, fix: str) -> ConfigError:
    return ConfigError("messages", None, f"the tokenizer's chat template {what}", fix)
