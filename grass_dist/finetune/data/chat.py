"""Writes prompt and completion as turns of a chat template: the ids that a model is given, and those that it learns."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from grass_dist.errors import ConfigError, shorten
from grass_dist.finetune.data.first_ids import MARGIN, beginnings, first_ids

_QUESTION, _ANSWER = "A question 4f7c", "An answer 9b2e"
"""Texts that a template is tried with, which no template would write by itself."""

_TAG = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Turn(NamedTuple):
    """The assistant's turn, which follows the ids of the prompt."""

    ids: list[int]
    learnt: list[bool]
    """For each id, whether it is learnt."""


class Chat:
    """The chat template of a tokenizer, tried once with a question and an answer.

    The rendering of both is ``before + answer + after``. The rendering of the question alone, with its generation
    prompt, is what the model is given; it may end with an opening of its own (``<think>``) that is not in ``before``.

    Raises:
        ConfigError: the template writes neither a text nor a list of parts, or drops one of both.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._eos: Any = tokenizer.eos_token_id
        self._in_parts = False
        if (first := self._try()) is not None:
            self._in_parts = True
            if self._try() is not None:
                raise _refused(first)
        given, both = self._given(_QUESTION), self._both(_QUESTION, _ANSWER)
        before, _, self._after = both.rpartition(_ANSWER)
        shared = next((i for i, (a, b) in enumerate(zip(given, before, strict=False)) if a != b), len(before))
        self._opening, self._other_opening = given[shared:], before[shared:]
        self._marks = _GENERATION.search(str(tokenizer.get_chat_template())) is not None

    @property
    def in_parts(self) -> bool:
        """Says whether the template wants the content of a message as a list of parts."""
        return self._in_parts

    @property
    def marks(self) -> bool:
        """Says whether the template marks what the assistant writes."""
        return self._marks

    @property
    def end(self) -> str:
        """Returns what ends an answer, the eos token or another text; "" where the template writes nothing."""
        eos = str(self._tokenizer.eos_token or "")
        if eos and eos in self._after:
            return self._after[: self._after.rindex(eos) + len(eos)]
        return self._after.rstrip()

    def prompt_ids(self, prompt: str, most: int | None = None) -> list[int]:
        """Returns the ids that the model is given; of a very long prompt at least the first ``most``.

        Raises:
            ConfigError: the rendering does not hold the prompt.
        """
        given = self._asked(prompt)
        return self._encode(given) if most is None else first_ids(self._encode, given, most)

    def first_of_turn(self, prompt: str, answer: str, prompt_ids: list[int], most: int) -> Turn:
        """Returns the same as `turn`, but of a very long row, prompt included, only the first ``most`` ids or so.

        The whole rendering is checked, but no more of it is tokenised than is needed.

        Args:
            prompt_ids: from `prompt_ids` with the same ``most``.

        Raises:
            ConfigError: see `turn`.
        """
        count = most - len(prompt_ids)
        pieces = beginnings(answer, max(count, 1))
        if (piece := next(pieces, None)) is None and (count > 0 or next(beginnings(prompt, most), None) is None):
            return self.turn(prompt, answer)
        both = self._checked(prompt, answer)[1]
        if count <= 0:
            return Turn([], [])
        before, margin = Turn([], []), MARGIN + len(self._encode(self._after))
        while piece is not None and both.startswith(self._both(prompt, piece).removesuffix(self._after)):
            ids, learnt = self.turn(prompt, piece)
            here = Turn(ids[:-margin], learnt[:-margin])
            if len(before.ids) >= count and [part[:count] for part in here] == [part[:count] for part in before]:
                return here
            before, piece = here, next(pieces, None)
        return self.turn(prompt, answer)

    def turn(self, prompt: str, answer: str) -> Turn:
        """Returns the ids that follow `prompt_ids`: the answer, what the template writes around it, and its end.

        Where the template has a ``{% generation %}`` block, what stands before it is not learnt. What follows the
        end-of-turn token is left out, and a template that writes no end of a turn gets the tokenizer's eos token.

        Raises:
            ConfigError: the rendering does not hold the prompt, or does not end with the answer and what the template
                writes after every answer, or what is learnt of it does not hold the answer.
        """
        given, both, rest = self._checked(prompt, answer)
        ids, learnt = self._ids(given, both, rest, prompt, answer)
        ends = [index for index, token in enumerate(ids) if token == self._eos]
        if ends and str(self._tokenizer.eos_token) in self._after:
            ids, learnt = ids[: ends[-1] + 1], learnt[: ends[-1] + 1]
        elif self._eos is not None and not self._after.strip() and ids[-1:] != [self._eos]:
            ids, learnt = [*ids, self._eos], [*learnt, True]
        self._check(ids, learnt, answer, given)
        return Turn(ids, learnt)

    def _checked(self, prompt: str, answer: str) -> tuple[str, str, str]:
        """Returns what the model is given, the rendering of both, and what `_rest` gives, which holds the answer."""
        given, both = self._asked(prompt), self._both(prompt, answer)
        rest, wanted = self._rest(given, both, answer), to_come(answer, given)
        # At the end: what the template writes by itself before the answer may hold a short one by chance.
        body = rest.removesuffix(self._after)
        exact = body.rstrip().endswith(wanted)  # else a copy in single words, which is many times as large
        if not exact and not _squeezed(body).endswith(_squeezed(wanted)):
            raise _refused("drops or rewrites the completion", answer)
        return given, both, rest

    def _rest(self, given: str, both: str, answer: str) -> str:
        """Returns what follows, in the rendering of both, what the model is given.

        What the model is given may end with an opening of its own. An answer, or the template, may begin with the same
        opening, which is then given once.
        """
        start = len(given) - len(self._opening)
        if both.startswith(given):
            return both[len(given) :]
        if both.startswith(given[:start]) and given.endswith(self._opening):
            rest = both[start:]
            if not self._other_opening.strip():  # else the model has to write it: a tag that closes the opening
                rest = rest.removeprefix(self._other_opening)
            return rest.removeprefix(self._opening.strip())
        for body in (answer, answer.strip()):  # the user's turn is another one when an answer follows
            if body and both.endswith(body + self._after):
                return body + self._after
        raise _refused("writes the prompt in another way when a completion follows", answer)

    def _ids(self, given: str, both: str, rest: str, prompt: str, answer: str) -> Turn:
        prompt_ids, whole = self._encode(given), self._encode(both)
        mask = self._mask(prompt, answer, len(whole)) if self._marks else None
        size = len(prompt_ids)
        if both.startswith(given) and whole[:size] == prompt_ids:
            last = max((index for index, marked in enumerate(mask or []) if marked), default=-1)
            learnt = [mask is None or mask[i] or i > last for i in range(size, len(whole))]
            return Turn(whole[size:], learnt)
        # Tokens merge across the border, or the model is given another opening: the rest is a text of its own.
        unmarked = self._unmarked(both, mask, len(both) - len(rest))
        head = self._continue(rest[:unmarked], prompt_ids) if unmarked else []
        tail = self._continue(rest[unmarked:], prompt_ids + head)
        return Turn(head + tail, [False] * len(head) + [True] * len(tail))

    def _mask(self, prompt: str, answer: str, size: int) -> list[bool] | None:
        """Says which ids of the rendering the template marks; None if it marks none, or the tokenizer cannot tell."""
        messages = self._messages(prompt, answer)
        try:
            encoded: Any = self._tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception:  # a tokenizer without offsets
            return None
        mask = [bool(marked) for marked in encoded["assistant_masks"]]
        return mask if any(mask) and len(mask) == size else None

    def _unmarked(self, both: str, mask: list[bool] | None, start: int) -> int:
        """Returns the number of characters from ``start`` on that come before the first marked one."""
        if mask is None:
            return 0
        encoded: Any = self._tokenizer(both, add_special_tokens=False, return_offsets_mapping=True)
        return max(0, encoded["offset_mapping"][mask.index(True)][0] - start)

    def _continue(self, text: str, ids: list[int]) -> list[int]:
        """Returns the ids of a text that follows ``ids``, without the space that a tokenizer may put before a text."""
        alone, ids, decode = self._encode(text), ids[-8:], self._tokenizer.decode
        if decode(ids + alone) != str(decode(ids)) + text:
            line = self._encode("\n")
            after_line = self._encode("\n" + text)
            within = after_line[len(line) :]
            if after_line[: len(line)] == line and decode(ids + within) == str(decode(ids)) + text:
                return within
        return alone

    def _check(self, ids: list[int], learnt: list[bool], answer: str, given: str) -> None:
        """Checks that what is learnt, decoded again, holds the answer, whatever was found before."""
        text = self._tokenizer.decode([token for token, is_learnt in zip(ids, learnt, strict=True) if is_learnt])
        wanted = to_come(answer, given)
        # A tokenizer that loses something (capitals, unknown characters) loses it here too.
        if not _holds(str(text), wanted) and not _holds(str(text), str(self._tokenizer.decode(self._encode(wanted)))):
            what = "marks, with its {% generation %} blocks, only a part of" if self._marks else "does not keep"
            raise _refused(f"{what} the completion", answer)

    def _try(self) -> str | None:
        """Says what is wrong with the template in the present form of content, or nothing."""
        try:
            given, both = self._given(_QUESTION), self._both(_QUESTION, _ANSWER)
        except ConfigError as error:
            return error.problem.removeprefix(_TEMPLATE)
        if not (_holds(given, _QUESTION) and _holds(both, _QUESTION)):
            return "drops or rewrites the prompt"
        return None if _ANSWER in both else "drops or rewrites the completion"

    def _asked(self, prompt: str) -> str:
        """Returns what the model is given, if the prompt is in it: a template may cut or replace some prompts."""
        given = self._given(prompt)
        if not _holds(given, prompt):
            raise _refused("drops or rewrites the prompt", prompt)
        return given

    def _given(self, prompt: str) -> str:
        return self._render([self._message("user", prompt)], add_generation_prompt=True)

    def _both(self, prompt: str, answer: str) -> str:
        return self._render(self._messages(prompt, answer))

    def _messages(self, prompt: str, answer: str) -> list[dict[str, Any]]:
        return [self._message("user", prompt), self._message("assistant", answer)]

    def _message(self, role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}] if self._in_parts else text}

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception as error:  # a template may raise anything, also for one row alone
            reason = " ".join(str(error).split()) or type(error).__name__
            named = f"of {self._tokenizer.name_or_path} " if self._tokenizer.name_or_path else ""
            raise _refused(f"{named}cannot be used ({shorten(reason, 200)})") from error

    def _encode(self, text: str) -> list[int]:
        ids: Any = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(ids)


def chat_of(tokenizer: PreTrainedTokenizerBase) -> Chat:
    """Returns the `Chat` of a tokenizer, made once for each template.

    Raises:
        ConfigError: see `Chat`.
    """
    return _chat(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=4)
def _chat(tokenizer: PreTrainedTokenizerBase, _template: str) -> Chat:
    return Chat(tokenizer)


def to_come(answer: str, given: str) -> str:
    """Returns an answer without the tag (``<think>``) that it begins with, where the model is given that already."""
    wanted = answer.strip()
    tag = _TAG.match(wanted)
    if tag is None or not given.rstrip().endswith(tag[0]):
        return wanted
    return wanted[tag.end() :].strip() or wanted


def _holds(text: str, part: str) -> bool:
    """Says whether a text holds another one; a template may strip or add white space."""
    return part.strip() in text or _squeezed(part) in _squeezed(text)


def _squeezed(text: str) -> str:
    return "".join(text.split())


_TEMPLATE = "the tokenizer's chat template "


def _refused(what: str, text: str | None = None) -> ConfigError:
    shown = "" if text is None else f" {shorten(text, 40)!r}"
    fix = "set data.chat_template to false, or give the tokenizer a template that writes both as they are"
    return ConfigError("chat_template", True, f"{_TEMPLATE}{what}{shown}", fix)
