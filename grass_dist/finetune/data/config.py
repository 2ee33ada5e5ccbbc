"""Defines `DataConfig`, the section ``data:`` of the configuration file, and fills its templates."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from string import Formatter
from typing import Any, Literal

from pydantic import Field, model_validator

from grass_dist.config import StrictModel
from grass_dist.errors import ConfigError
from grass_dist.finetune.data.media import media_in

GENERATED = "reasoning-gym:"
"""Prefix of the name of a generated set."""

SPLIT = "split:"
"""Prefix of a `DataConfig.eval` that means another split of the training set's dataset."""


class DataConfig(StrictModel):
    """Which examples to train on, how they are put into words, and which are held out.

    Raises:
        ConfigError: a field that cannot work; the message names the field, the value and the fix.
    """

    name: str = Field(min_length=1)
    """A dataset of the Hub, a local folder, a file (`.json`: a list of objects; `.jsonl` or `.ndjson`: one object a
    line; `.csv` or `.tsv`: with the names of the columns in the first line; all of these also with `.gz`; `.parquet`),
    a FASTA file (`.fasta`, `.fa`, `.faa`: columns `id`, `description`, `sequence`), or `reasoning-gym:<task>` for
    generated examples, e.g. `reasoning-gym:gsm_symbolic`. A `*` in the name of a file
    stands for anything where no file has exactly that name. More on each in docs/configuration.md#data."""

    config_name: str | None = None
    """Configuration (subset) of a Hub dataset. It is refused for files and generated sets."""

    split: str = "train"
    """Split to train on; for a Hub dataset or a file also a slice such as `train[:10%]`."""

    on_bad_line: Literal["stop", "skip"] = "stop"
    """What is done about a line of a file (an element of a JSON list, a row of `.parquet`) that cannot be read, does
    not fill the columns in use, or names a file of audio or of an image that is missing or broken. `stop`: an error
    that names the first one. `skip`: every rank leaves out all such lines, in `eval` too, and says how many; refused
    for anything but a file."""

    prompt: str | None = None
    """What the model is given: a column, or a template such as `"{instruction}\\n{input}"` (double the braces that are
    meant literally). There is no loss on it."""

    completion: str | None = None
    """What the model learns to answer: a column or a template."""

    text: str | None = None
    """Plain text to learn in full: a column or a template. It replaces `prompt` and `completion`."""

    messages: str | None = None
    """Column of conversations, instead of `prompt` and `completion`: lists of `{"role": ..., "content": ...}`, of any
    number of turns, also with `tool_calls` and results of tools. There is loss on the turns of the assistant alone."""

    tools: str | None = None
    """Column with the tools of each conversation, a list of JSON schemas that the chat template shows. `messages`
    only."""

    pair: str | None = None
    """sequence-classification: a second text beside `text`, for a label of the two: a column or a template."""

    label: str | None = None
    """sequence-classification: column with the label of `text`, a name or a number."""

    words: str | None = None
    """token-classification: column with the words of each text, a list."""

    tags: str | None = None
    """token-classification: column with the label of each word, a list as long as that of `words`."""

    audio: str | None = None
    """speech: column with the recording whose transcript is `text`: the path of a file, absolute or from the folder of
    the data file, or the audio itself (`{"bytes": ..., "path": ...}`, `{"array": ..., "sampling_rate": ...}`). A
    template such as `"clips/{id}.wav"` is a path too."""

    image: str | None = None
    """image-text: column with the image of a row, or a list of several: the path of a file, absolute or from the folder
    of the data file, or the image itself (`{"bytes": ..., "path": ...}`). A template is a path too. A row with null
    has no image."""

    language: str | None = None
    """speech: language of the transcripts, e.g. `german`, for a model that is told it (Whisper). null: it is not."""

    max_seconds: float | None = Field(default=None, gt=0)
    """speech: length of a recording; a longer one is left out and counted. null: the 30 s of Whisper, or as many as the
    model's feature extractor takes."""

    labels: list[str] | None = None
    """Names of the labels of `label` or `tags`, in the order of their numbers. null: those that the dataset declares,
    or else those that occur, in the order of the model if it knows all of them, or else sorted. A stream needs them."""

    mask_probability: float | None = Field(default=None, gt=0, lt=1)
    """masked-lm and protein: share of the tokens that the model has to find. null: 0.15."""

    eval: str | None = None
    """Where the held-out examples come from: `split:NAME` for another split of the same dataset, or a name as in
    `name`, read with the same split. null: they are split off the training set by the seed. A set that shares a file
    with what is trained on, such as a file of the folder `name`, is refused."""

    eval_examples: int = Field(default=64, ge=0)
    """Number of held-out examples: the first of `eval`, or split off the training set by the seed (the first ones of a
    stream). 0: no evaluation."""

    max_length: int = Field(default=512, ge=2)
    """Tokens of an example; a longer one is cut on the right. With `packing` the length of a sequence. A model with
    learnt positions (GPT-2, OPT) must have as many. speech and image-text: a longer transcript, or a longer row with
    the tokens that stand for its images, is left out and counted."""

    packing: bool = False
    """Put several whole examples into one sequence. `position_ids` keep them apart, with `flash_attention_2` only at
    `micro_batch_size: 1`."""

    streaming: bool = False
    """Read and tokenize the examples as they are needed, without a copy on disk or in memory. It is refused for
    generated sets."""

    shuffle_buffer: int = Field(default=1000, ge=0)
    """Streaming only: number of rows that the shuffle draws from. 0 keeps the order of the stream."""

    prefetch_steps: int = Field(default=2, ge=0)
    """Number of steps whose micro-batches are read, collated and copied to the device before they are needed, by a
    thread beside the training. What a step trains on does not depend on it. 0: each step waits for its own."""

    group_by_length: bool = False
    """Put examples of about the same length into a global batch, so that less of it is padding. The batches come in a
    random order. Each epoch has every example once. It is refused with `streaming`, and with `packing`, which leaves
    next to no padding."""

    limit: int | None = Field(default=None, ge=1)
    """Use only this many examples, the first ones, counted before any are held out."""

    chat_template: bool = True
    """Write prompt and completion as the turns of a user and an assistant if the tokenizer has a chat template."""

    size: int = Field(default=2000, ge=1)
    """Number of examples that reasoning-gym generates, before those held out are taken."""

    @property
    def parts(self) -> dict[str, str]:
        """Returns the columns or templates in use, e.g. ``{"text": …}`` or ``{"prompt": …, "completion": …}``."""
        return {part: spec for part in PARTS if (spec := getattr(self, part)) is not None}

    @property
    def media(self) -> tuple[str, ...]:
        """Returns the parts in use that are audio or images."""
        return tuple(part for part in MEDIA if part in self.parts)

    @property
    def learnt(self) -> str:
        """Returns the name of the part that is learnt."""
        return next(part for part in ("label", "tags", "messages", "completion", "text") if part in self.parts)

    @model_validator(mode="after")
    def _fields_fit_together(self) -> DataConfig:
        found = set(self.parts)
        form = next((form for form in _FORMS if form in found), "prompt")
        if "text" in found and found & {"prompt", "completion"}:
            fix = "keep either text, or prompt and completion"
            raise ConfigError("text", self.text, "excludes prompt and completion", fix)
        if other := [part for part in PARTS if part in found - set(_FORMS[form])]:
            if form == "prompt":
                needs = next(form for form, parts in _FORMS.items() if other[0] in parts)
                raise ConfigError(other[0], getattr(self, other[0]), f"needs {needs}", f"set {needs}, or leave it out")
            raise ConfigError(form, getattr(self, form), f"excludes {other[0]}", "keep one of them")
        for part in ("prompt", "completion") if form == "prompt" else ():
            if part not in found:
                other_part = "completion" if part == "prompt" else "prompt"
                fix = f"name the column that holds the {part}, or set text for plain text"
                raise ConfigError(part, None, f"{other_part} needs it" if other_part in found else "is not set", fix)
        if "words" in found and "tags" not in found:
            raise ConfigError("tags", None, "words needs it", "name the column with the label of each word")
        if "messages" in found and not self.chat_template:
            fix = "leave chat_template out, or set prompt and completion"
            raise ConfigError("chat_template", False, "messages are written by the chat template", fix)
        self._check_labels(found)
        columns_of(self.parts)
        self._check_source()
        return self

    def _check_labels(self, found: set[str]) -> None:
        if self.labels is None:
            return
        if not found & {"label", "tags"}:
            raise ConfigError("labels", self.labels, "there is no column of labels", "set label or tags too")
        if len(set(self.labels)) < max(2, len(self.labels)):
            raise ConfigError("labels", self.labels, "it must be two or more different names", "name each label once")

    def _check_source(self) -> None:
        for other in ("streaming", "packing"):
            if self.group_by_length and getattr(self, other):
                why = {"streaming": "a stream does not know lengths ahead", "packing": "packed sequences are as long"}
                raise ConfigError("group_by_length", True, f"{why[other]} ({other}: true)", "set it to false")
        generated = self.name.startswith(GENERATED)
        if generated and self.streaming:
            raise ConfigError("streaming", True, f"{self.name} is generated in memory", "set streaming to false")
        if generated and self.split != "train":
            raise ConfigError("split", self.split, "a generated set has no splits", "leave split out")
        if generated and self.eval is not None and self.eval.startswith(SPLIT):
            raise ConfigError("eval", self.eval, "a generated set has no splits", "leave eval out")
        if self.config_name is not None and (generated or is_file(self.name)):
            problem = f"{self.name} has no configurations"
            raise ConfigError("config_name", self.config_name, problem, "leave config_name out")
        if self.on_bad_line == "skip" and self.media and kind_of(self.name) == ".parquet":
            problem = f"a .parquet file with {self.media[0]} is read as a whole"
            raise ConfigError("on_bad_line", "skip", problem, "leave on_bad_line out")
        if self.eval in (SPLIT + self.split, self.name) and not generated:
            fix = "leave eval out to split examples off the training set"
            raise ConfigError("eval", self.eval, "is the training set itself", fix)
        names = [self.name, self.eval or SPLIT]
        if self.on_bad_line == "skip" and (others := [n for n in names if not is_file(n) and not n.startswith(SPLIT)]):
            problem = f"{others[0]} is no local {', '.join(KINDS[:-1])} or {KINDS[-1]} file, and nothing else has lines"
            raise ConfigError("on_bad_line", "skip", problem, "leave on_bad_line out")


_FORMS = {
    "messages": ("messages", "tools", "image"),
    "words": ("words", "tags"),
    "text": ("text", "pair", "label", "audio"),
    "prompt": ("prompt", "completion", "image"),
}
"""The forms that examples can have, by the part that shows it, and the parts of each."""

PARTS = tuple(dict.fromkeys(part for parts in _FORMS.values() for part in parts))
LISTS = ("messages", "tools", "words", "tags")
"""Parts that are a column of lists."""
MEDIA = ("audio", "image")
"""Parts that are audio or images. All that are neither these nor `LISTS` are text: a column, or a template."""

JSON_KINDS = (".json", ".jsonl", ".ndjson")
FASTA_KINDS = (".fasta", ".fa", ".faa")
KINDS = (*JSON_KINDS, *FASTA_KINDS, ".csv", ".tsv", ".parquet")
"""Suffixes of files that are read by their path."""


def kind_of(name: str) -> str:
    """Returns the one of `KINDS` that a file's name ends with, in any case, with or without .gz; "" for no file."""
    name = name.lower()
    kind = next((kind for kind in KINDS if name.removesuffix(".gz").endswith(kind)), "")
    return "" if kind == ".parquet" and name.endswith(".gz") else kind


def is_file(name: str) -> bool:
    """Says whether a dataset's name is the name of a file."""
    return kind_of(name) != ""


def fields_of(spec: str, part: str) -> list[tuple[str, str | None]]:
    """Cuts a template into (literal text, column that follows it or None); of a plain column name no columns.

    Raises:
        ConfigError: braces do not match, or a field is not just a column's name. It is about ``part``.
    """
    try:
        pieces = list(Formatter().parse(spec))
    except ValueError as error:
        raise ConfigError(part, spec, f"is no template ({error})", "double the braces that are literal") from None
    for _, column, format_spec, conversion in pieces:
        if column is not None and (not column or format_spec or conversion):
            fix = "write {column}, and literal braces doubled"
            raise ConfigError(part, spec, "has a field that is not a column's name", fix)
    return [(literal, column) for literal, column, _, _ in pieces]


def fill_template(spec: str, row: Mapping[str, Any], part: str) -> str:
    """Returns the text of a row: its column ``spec``, or the template ``spec`` filled in. None counts as empty.

    Raises:
        ConfigError: the row does not have a column, or it holds neither text nor a number. It is about ``part``.
    """
    if spec in row:
        return _text(row, spec, spec, part)
    pieces = fields_of(spec, part)
    if all(column is None for _, column in pieces):
        raise no_column(spec, spec, row, part)
    return "".join(literal + ("" if column is None else _text(row, column, spec, part)) for literal, column in pieces)


def list_of(spec: str, row: Mapping[str, Any], part: str) -> list[Any]:
    """Returns the list in a row's column, which may stand there as JSON text. None counts as empty.

    Raises:
        ConfigError: the row does not have the column, or it holds no list. It is about ``part``.
    """
    if spec not in row:
        raise no_column(spec, spec, row, part)
    value = row[spec]
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ConfigError(part, spec, f"column {spec!r} holds text that is no JSON", _LISTED) from None
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        raise ConfigError(part, spec, f"column {spec!r} holds a {type(value).__name__}, not a list", _LISTED)
    return value


_LISTED = "choose a column of lists"


def read_part(part: str, spec: str, row: Mapping[str, Any]) -> str | list[Any]:
    """Returns what a row holds for a part of `DataConfig.parts`: a list for those of `LISTS`, else a text.

    Of audio and images it returns the list of their names; no file is opened.

    Raises:
        ConfigError: see `list_of`, `fill_template` and `grass_dist.finetune.data.media.media_in`.
    """
    if part in MEDIA:
        return [medium.name for medium in media_in(media_value(spec, row, part), spec, part)]
    return list_of(spec, row, part) if part in LISTS else fill_template(spec, row, part)


def media_value(spec: str, row: Mapping[str, Any], part: str) -> Any:
    """Returns what a row's column holds of audio or images, or the path that a template makes of the row.

    Raises:
        ConfigError: see `fill_template`.
    """
    return row[spec] if spec in row else fill_template(spec, row, part)


def is_filled(spec: str, row: Mapping[str, Any], part: str) -> bool:
    """Says whether any column that ``spec``, a column or template, names holds more than white space.

    Raises:
        ConfigError: see `read_part`.
    """
    if part in LISTS:
        return bool(list_of(spec, row, part))
    columns = [spec] if spec in row else columns_of({part: spec})
    texts = [_text(row, column, spec, part) for column in columns]  # all of them, for what is raised
    return any(map(str.strip, texts))


def _text(row: Mapping[str, Any], column: str, spec: str, part: str) -> str:
    if column not in row:
        raise no_column(column, spec, row, part)
    value = row[column]
    if value is not None and not isinstance(value, str | int | float):
        problem = f"column {column!r} holds a {type(value).__name__}"
        raise ConfigError(part, spec, problem, "choose columns of text or numbers")
    return "" if value is None else str(value)


def no_column(column: str, spec: str, row: Iterable[str], part: str) -> ConfigError:
    """Makes the error that ``part``, a column or template, uses a column that a row with these columns lacks."""
    return ConfigError(part, spec, f"there is no column {column!r}", f"the columns are {', '.join(row)}")


def columns_of(parts: Mapping[str, str]) -> list[str]:
    """Returns the columns that the templates of `DataConfig.parts` name.

    Raises:
        ConfigError: see `fields_of`.
    """
    fields = [
        [column for _, column in ([] if part in LISTS else fields_of(spec, part)) if column is not None]
        for part, spec in parts.items()
    ]
    return [column for spec, columns in zip(parts.values(), fields, strict=True) for column in columns or [spec]]


def check_packing(attn_implementation: str, micro_batch_size: int) -> None:
    """Checks that the model's attention keeps packed examples apart (``model.config._attn_implementation``).

    eager, sdpa and flex_attention do, through position_ids; flash attention reads them with one row at a time only.

    Raises:
        ConfigError: the examples of a packed sequence would see each other.
    """
    if attn_implementation in ("eager", "sdpa", "flex_attention"):
        return
    if "flash" not in attn_implementation:
        problem = f"{attn_implementation} attention is not known to keep packed examples apart"
        raise ConfigError("packing", True, problem, "set packing to false, or the model's attention to sdpa")
    if micro_batch_size != 1:
        problem = f"{attn_implementation} keeps packed examples apart with micro_batch_size 1 only"
        raise ConfigError("packing", True, problem, "set micro_batch_size to 1, or the attention to sdpa")
