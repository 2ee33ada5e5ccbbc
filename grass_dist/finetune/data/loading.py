"""Makes token ids and labels of a dataset's rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol

import datasets
from transformers import PreTrainedTokenizerBase

from grass_dist.errors import ConfigError
from grass_dist.finetune.data.batches import Example, Examples, has_labels, pack_examples
from grass_dist.finetune.data.chat import chat_of
from grass_dist.finetune.data.config import DataConfig, fill_template
from grass_dist.finetune.data.conversations import conversation_of, dialogues_of, tools_of
from grass_dist.finetune.data.first_ids import first_ids
from grass_dist.finetune.data.json_files import HEAD
from grass_dist.finetune.data.json_lines import Row, Skipped
from grass_dist.finetune.data.rows import Reading, Rows, RowSource, load_rows, sources
from grass_dist.finetune.data.stream_identity import stream_identity
from grass_dist.model.loss import IGNORED


class Recipe(Protocol):
    """How a row becomes an example: what a model is given, and what it learns of it."""

    def begin(self, source: RowSource, rows: Rows, held_out: Sequence[Row]) -> None:
        """Looks at the rows before the first example is made, e.g. for the names of the labels."""
        ...

    def example(self, row: Row) -> Example:
        """Makes the example of a row; its ``labels`` are `IGNORED` where nothing is learnt."""
        ...

    def stored(self, example: Example, number: int) -> Example:
        """Returns what is kept in memory of an example: lists of integers.

        Args:
            number: of the row among those to train on, from 0; of a held-out row it is -1, -2, ...
        """
        ...

    left_out: str
    """What is said of examples without a label."""


TOO_LONG = "have no token of their completion within max_length"
"""Why an example of text has no label."""


class TextRecipe:
    """The `Recipe` of a causal language model: see `tokenise`."""

    left_out = TOO_LONG

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
        self._tokenizer, self._config = tokenizer, config

    def begin(self, source: RowSource, rows: Rows, held_out: Sequence[Row]) -> None: ...

    def example(self, row: Row) -> Example:
        return tokenise(row, self._tokenizer, self._config)

    def stored(self, example: Example, number: int) -> Example:
        return example


class Stream:
    """Examples that are read and tokenised as they are needed (`grass_dist.finetune.data.batches.ItemStream`).

    Every rank leaves out the rows without an answer; ``unanswered`` is their number in the longest pass up to now.
    Without packing, an item is a row, and only the rank that trains on it tokenises it. No other rank could tell that
    it has no label left, so such a row stays in its batch without any loss and is counted in ``unlabelled``. With
    packing, every rank tokenises every row, and a row without labels is left out.
    """

    def __init__(self, rows: datasets.IterableDataset, recipe: Recipe, config: DataConfig) -> None:
        self._rows, self._recipe, self._config = rows, recipe, config
        self._source = sources(config)[0]
        self.unlabelled = self.unanswered = 0
        self.check: Callable[[Example], None] = lambda _: None
        """Checks every example that is made, e.g. `grass_dist.finetune.fit.Vocabulary.check`."""

    def epoch(self, seed: int, epoch: int) -> Iterator[Any]:
        """Reads the rows, or packed examples, of one pass, in an order that is a function of (seed, epoch).

        Raises:
            ConfigError: while iterating, a row cannot be read or used; for a file it names the line. With packing, also
                a row that `check` refuses.
        """
        config, rows = self._config, self._rows
        if config.shuffle_buffer:
            rows = rows.shuffle(seed=seed, buffer_size=config.shuffle_buffer)
        rows.set_epoch(epoch)
        if not config.packing:
            return self._answered(rows)
        examples = (self._made(row) for row in self._answered(rows))
        return pack_examples((example for example in examples if has_labels(example)), config.max_length)

    def example(self, item: Any) -> Example:
        """Makes the example of an item of `epoch`.

        Raises:
            ConfigError: `check` refuses it.
        """
        if self._config.packing:
            return item
        example = self._made(item)
        self.unlabelled += not has_labels(example)
        return example

    def identity(self) -> dict[str, str]:
        """Returns what `stream_identity` does.

        Raises:
            ConfigError: a row or a file cannot be read.
        """
        try:
            return stream_identity(self._config, self._source.watch(self._rows))
        except ConfigError as error:
            raise error if error.field.startswith("data.") else error.under("data") from error.__cause__

    def told(self) -> Iterator[str]:
        """Returns sentences about what has been left out up to now."""
        if self.unanswered:
            yield f"{self.unanswered} rows of the stream have no answer: left out"
        if self.unlabelled:
            what = f"examples of the stream {self._recipe.left_out}: no loss on them"
            yield f"of those that this rank has read, {self.unlabelled} {what}"

    def _made(self, row: Row) -> Example:
        example = self._recipe.example(row)
        self.check(example)
        return example

    def _answered(self, rows: Iterable[Any]) -> Iterator[Row]:
        count = 0
        try:
            for row in self._source.watch(rows):
                if self._source.has_answer(row):
                    yield row
                else:
                    count += 1
                    self.unanswered = max(self.unanswered, count)
        except ConfigError as error:
            raise error.under("data") from error.__cause__


@dataclass(frozen=True)
class Data:
    """Holds the examples that `load_data` has loaded."""

    train: Examples | Stream
    """Training examples, packed if ``packing`` is on."""

    held_out: Examples
    """Tokenised held-out rows, never packed; empty with ``eval_examples=0``."""

    held_out_rows: list[Row]
    """The held-out rows with an answer, even without a label left; rows of a file have only the columns in use."""

    reading: Reading
    """The record of the files that were read."""

    first: Example
    """The first training example, unpacked."""

    left_out: str = TOO_LONG
    """Why examples were dropped."""

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Returns what on_bad_line="skip" left out of each file with broken lines."""
        return tuple(each for each in self.reading.skipped.values() if each.count)

    def told(self) -> Iterator[str]:
        """Returns sentences about what was read and left out; those about rows of a stream come from `Stream.told`."""
        for name, files in self.reading.patterns.items():
            yield f"{name} stands for {len(files)} file{'s' * (len(files) > 1)}: {', '.join(files)}"
        if isinstance(self.train, Examples):
            yield from self._left_out(self.train, "")
        yield from self._left_out(self.held_out, " held-out")
        yield from map(str, self.skipped)

    def _left_out(self, examples: Examples, which: str) -> Iterator[str]:
        if examples.dropped:
            yield f"{examples.dropped}{which} examples {self.left_out}: left out"
        if examples.unanswered:
            yield f"{examples.unanswered}{which} rows have no answer: left out"


def load_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, recipe: Recipe | None = None) -> Data:
    """Loads and tokenises the training set (a stream: as it is used) and the held-out examples.

    Args:
        recipe: makes the examples; None makes those of a causal language model.
        seed: seed of the split into training and held-out examples, and of generated examples; 0 or more.

    Raises:
        ConfigError: a dataset, file, column or task does not exist or cannot be read; a row cannot be used (see
            `DataConfig.on_bad_line`); there are no examples, none with an answer or none with a label within
            max_length; or a chat template does not write prompt and completion.
        GrassError: reasoning-gym is not installed.
    """
    datasets.disable_progress_bars()
    reading = Reading()
    rows, held_out_rows = load_rows(config, seed, reading)
    source, other = sources(config)
    recipe = recipe or TextRecipe(tokenizer, config)
    recipe.begin(source, rows, held_out_rows)
    held_out = _tokenise_all(other, held_out_rows, recipe, held_out=True) if held_out_rows else Examples()
    held_out_rows = list(filter(other.has_answer, held_out_rows))
    if isinstance(rows, datasets.IterableDataset):
        head = _tokenise_all(source, islice(rows, HEAD), recipe, enough=1)
        return Data(Stream(rows, recipe, config), held_out, held_out_rows, reading, head[0], recipe.left_out)
    train = _tokenise_all(source, rows, recipe)
    first = train[0]
    if config.packing:
        train = Examples(pack_examples(train, config.max_length), train.dropped, train.unanswered)
    # A run goes on tomorrow, too, and hosts may be in two time zones.
    train.dated = config.chat_template and "strftime_now" in str(tokenizer.chat_template)
    return Data(train, held_out, held_out_rows, reading, first, recipe.left_out)


def first_example(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, recipe: Recipe | None = None
) -> Example:
    """Returns the same as `Data.first`, without tokenising the rest.

    Raises:
        ConfigError: see `load_data`.
    """
    datasets.disable_progress_bars()
    rows, held_out = load_rows(config, seed)
    recipe, source = recipe or TextRecipe(tokenizer, config), sources(config)[0]
    recipe.begin(source, rows, held_out)
    return _tokenise_all(source, rows, recipe, enough=1)[0]


def _tokenise_all(
    source: RowSource,
    rows: Iterable[Any],
    recipe: Recipe,
    enough: int | None = None,
    *,
    held_out: bool = False,
) -> Examples:
    """Makes the examples of rows with something to learn, at least one; of a stream's head as many as are enough."""
    examples = Examples()
    for number, row in enumerate(source.watch(rows)):
        if not source.has_answer(row):
            examples.unanswered += 1
            continue
        example = recipe.example(row)
        if has_labels(example):
            examples.append(recipe.stored(example, -1 - number if held_out else number))
            if len(examples) == enough:
                break
        else:
            examples.dropped += 1
    if not len(examples):
        count = examples.dropped + examples.unanswered
        raise source.nothing_left(count, labels=examples.dropped > 0, held_out=held_out)
    return examples


def tokenise(row: Row, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Example:
    """Makes token ids and labels of one row.

    The labels are the ids, and `IGNORED` (-100) on the prompt and on the first token, which nothing predicts; of a
    conversation they are the ids of what the assistant writes (see `Dialogues`). The
    end-of-turn or eos token has a label; what a chat template writes after it is left out. The row is cut to
    max_length on the right.

    Returns:
        ``{"input_ids": …, "labels": …}``, two lists of equal length, at most max_length. It may be that no label is
        left.

    Raises:
        ConfigError: the row does not have a column, or it holds neither text nor a number; or the rendering of the
            chat template does not hold the completion.
    """
    if config.messages is not None:
        try:
            messages, tools = conversation_of(row, config), tools_of(row, config)
            return dialogues_of(tokenizer).example(messages, tools, config.max_length)
        except ConfigError as error:
            raise ConfigError(error.field, config.messages, error.problem, error.fix) from error.__cause__
    if config.text is not None:
        prompt_ids: list[int] = []
        ids = _first_ids(tokenizer, fill_template(config.text, row, "text"), config.max_length, special=True)
        ids = _with_eos(ids, tokenizer)
    else:
        prompt = fill_template(config.prompt or "", row, "prompt")
        completion = fill_template(config.completion or "", row, "completion")
        prompt_ids = render_prompt(tokenizer, prompt, config.chat_template, config.max_length)
        if config.chat_template and tokenizer.chat_template:
            turn = chat_of(tokenizer).first_of_turn(prompt, completion, prompt_ids, config.max_length)
            ids = prompt_ids + turn.ids
            learnt = [False] * len(prompt_ids) + turn.learnt
            labels = [token if is_learnt else IGNORED for token, is_learnt in zip(ids, learnt, strict=True)]
            return _cut(ids, labels, config)
        ids = prompt_ids + _with_eos(_first_ids(tokenizer, completion, config.max_length), tokenizer)
    return _cut(ids, [IGNORED] * len(prompt_ids) + ids[len(prompt_ids) :], config)


def _cut(ids: list[int], labels: list[int], config: DataConfig) -> Example:
    size = config.max_length
    return {"input_ids": ids[:size], "labels": [IGNORED, *labels[1:size]] if ids else []}


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, chat_template: bool = True, most: int | None = None
) -> list[int]:
    """Returns the token ids that a completion follows, as in training.

    Args:
        chat_template: whether to write the prompt as a user's turn, if the tokenizer has a chat template.
        most: number of ids that are enough; None returns all.
    """
    if chat_template and tokenizer.chat_template:
        return chat_of(tokenizer).prompt_ids(prompt, most)
    special = partial(_encode, tokenizer, special=True)
    ids = special(prompt) if most is None else first_ids(special, prompt, most)
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    """Returns the ids of a text; ``special`` adds what the tokenizer puts around it, but no second BOS."""
    ids: Any = tokenizer(text, add_special_tokens=special)["input_ids"]
    bos: Any = tokenizer.bos_token_id
    if special and bos is not None and ids[:2] == [bos, bos] and len(ids) > len(_encode(tokenizer, text)):
        ids = ids[1:]
    return list(ids)


def _first_ids(tokenizer: PreTrainedTokenizerBase, text: str, count: int, special: bool = False) -> list[int]:
    return first_ids(partial(_encode, tokenizer, special=special), text, count)


def _with_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    eos: Any = tokenizer.eos_token_id
    return ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos]
