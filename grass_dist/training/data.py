"""From a dataset's name to token ids and labels: load, hold out, tokenise."""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from grass_dist.errors import ConfigError, GrassError
from grass_dist.training.batches import IGNORED, Example, Examples, has_labels, pack, permutation
from grass_dist.training.data_config import GENERATED, DataConfig, Source, fill, good_rows, is_file, sources
from grass_dist.training.json_lines import Row, Skipped, deeply_nested

Rows = datasets.Dataset | datasets.IterableDataset


class Stream:
    """Examples read, and tokenised, as they are needed (`grass_dist.training.batches.ItemStream`).

    Unpacked, an item is a row and only the rank that trains on it tokenises it; nobody else could tell that it
    has no label left, so such a row stays in its batch without any loss and is counted in ``unlabelled``.
    Packed, every rank tokenises every row, and a row without labels is left out.
    """

    def __init__(self, rows: datasets.IterableDataset, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
        self._rows, self._tokenizer, self._config = rows, tokenizer, config
        self._source = sources(config)[0]._replace(field="data.name")
        self.unlabelled = 0

    def epoch(self, seed: int, epoch: int) -> Iterator[Any]:
        """The rows, or packed examples, of one pass; the order is a function of (seed, epoch).

        Raises:
            ConfigError: while iterating, a row that cannot be read or used; of a file it names the line.
        """
        config, rows = self._config, self._rows
        if config.shuffle_buffer:
            rows = rows.shuffle(seed=seed, buffer_size=config.shuffle_buffer)
        rows.set_epoch(epoch)
        if not config.packing:
            return self._source.watch(rows)
        examples = (tokenise(row, self._tokenizer, config) for row in self._source.watch(rows))
        return pack((example for example in examples if has_labels(example)), config.max_length)

    def example(self, item: Any) -> Example:
        """The example of an item of `epoch`."""
        if self._config.packing:
            return item
        example = tokenise(item, self._tokenizer, self._config)
        self.unlabelled += not has_labels(example)
        return example


@dataclass(frozen=True)
class Data:
    """What `load_data` returns."""

    train: Examples | Stream
    """Packed with ``packing``."""

    held_out: Examples
    """Tokenised held-out rows, never packed; empty with ``eval_examples=0``."""

    held_out_rows: list[Row]
    """The held-out rows with all their columns (those without a label left too)."""

    skipped: tuple[Skipped, ...] = ()
    """What on_bad_line="skip" left out, for each file with broken lines."""


def load_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> Data:
    """Loads and tokenises the training set (a stream: as it is used) and the held-out examples.

    Args:
        seed: of the split into training and held-out examples and of generated examples, 0 or more.

    Raises:
        ConfigError: a dataset, file, column or task that does not exist or cannot be read, a row that cannot be used
            (see `DataConfig.on_bad_line`), no examples, or none with a label within max_length.
        GrassError: reasoning-gym is not installed.
    """
    datasets.disable_progress_bars()
    skipped: dict[str, Skipped] = {}
    rows, held_out_rows = load_rows(config, seed, skipped)
    left_out = tuple(each for each in skipped.values() if each.count)
    source, other = sources(config)
    held_out = _tokenise_all(other.watch(held_out_rows), tokenizer, config)
    if held_out_rows and not len(held_out):
        raise other.no_labels()
    if isinstance(rows, datasets.IterableDataset):
        if not any(has_labels(tokenise(row, tokenizer, config)) for row in islice(source.watch(rows), 1000)):
            raise source.no_labels()
        return Data(Stream(rows, tokenizer, config), held_out, held_out_rows, left_out)
    train = _tokenise_all(source.watch(rows), tokenizer, config)
    if not len(train):
        raise source.no_labels()
    if config.packing:
        train = Examples(pack(train, config.max_length), train.dropped)
    return Data(train, held_out, held_out_rows, left_out)


def _tokenise_all(rows: Iterable[Any], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Examples:
    examples = Examples()
    for row in rows:
        example = tokenise(row, tokenizer, config)
        if has_labels(example):
            examples.append(example)
        else:
            examples.dropped += 1
    return examples


def load_rows(config: DataConfig, seed: int, skipped: dict[str, Skipped] | None = None) -> tuple[Rows, list[Row]]:
    """The rows to train on and the held-out rows, before tokenisation.

    Args:
        skipped: gets what on_bad_line="skip" left out of each file.

    Raises: as `load_data`.
    """
    skipped = {} if skipped is None else skipped
    source, other = sources(config)
    rows = _load(source, seed, skipped)
    if config.limit is not None:
        short = isinstance(rows, datasets.Dataset) and len(rows) < config.limit
        rows = rows if short else rows.take(config.limit)
    count = config.eval_examples
    if not count:
        return rows, []
    if config.eval is not None:
        held_out = list(islice(other.watch(_load(other, seed, skipped, offset=config.size)), count))
    elif isinstance(rows, datasets.IterableDataset):
        held_out, rows = list(islice(source.watch(rows), count)), rows.skip(count)
        if next(source.watch(rows), None) is None:
            raise source.too_few(len(held_out))
    elif len(rows) <= count:
        raise source.too_few(len(rows))
    else:
        order = permutation(len(rows), seed, 2**64 - 1)
        held_out = list(islice(source.watch(rows.select(sorted(order[:count]))), count))
        rows = rows.select(sorted(order[count:]))
    if config.name.startswith(GENERATED) and isinstance(rows, datasets.Dataset):
        asked = {row.get("question") for row in held_out}  # a generator may repeat itself
        rows = rows.select([index for index, question in enumerate(rows["question"]) if question not in asked])
    return rows, held_out


def _load(source: Source, seed: int, skipped: dict[str, Skipped], offset: int = 0) -> Rows:
    """The rows of one dataset, at least one."""
    field, name, split, config = source
    if name.startswith(GENERATED):
        size = config.size if field == "name" else config.eval_examples
        return _generate(field, name, size, seed, offset)
    if is_file(name) and not Path(name).is_file():
        raise ConfigError(field, name, "there is no such file", "give the path of a .json or .jsonl file")
    try:
        rows = _read_good(source, skipped) if config.on_bad_line == "skip" else _read(name, split, config)
        first = next(iter(rows), None)
    except GrassError:
        raise
    except Exception as error:  # a broken file makes parsers raise of all kinds
        raise source.failure(error) from error
    if first is None:
        why = f" ({skipped[name]})" if name in skipped and skipped[name].count else ""
        raise ConfigError(field, name, f"split {split!r} has no examples{why}", "give a dataset that has some")
    return rows


def _read_good(source: Source, skipped: dict[str, Skipped]) -> Rows:
    """The rows of a file that can be used, as many as are needed; counts the others up to there."""
    field, name, split, config = source
    skipped[name] = Skipped(name)
    needed = config.limit if field == "name" else config.eval_examples
    rows = islice(good_rows(field, name, config.parts, skipped[name]), needed if split == "train" else None)
    if not config.streaming:
        table = _dataset(list(rows))
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(table)})
        return table.select(list(chain.from_iterable(range(part.from_, part.to) for part in parts)))
    if split != "train":
        raise ValueError("a stream of a file has the split 'train', and no slices of it")
    deque(rows, maxlen=0)  # to count, and to fail now
    options = {"field": field, "file": name, "parts": config.parts}
    return datasets.IterableDataset.from_generator(good_rows, gen_kwargs=options)


def _dataset(rows: list[Row]) -> datasets.Dataset:
    """The rows, with the columns of the first one. If a column mixes kinds: all as text, without lists and objects."""
    kinds = {(name, type(value)) for row in rows for name, value in row.items() if value is not None}
    with suppress(Exception):  # what Arrow refuses: a mixture further down, an integer beyond 64 bits
        if len(kinds) == len(dict(kinds)):
            return datasets.Dataset.from_list(rows)
    plain = [{name: v for name, v in row.items() if not isinstance(v, dict | list)} for row in rows]
    return datasets.Dataset.from_list([{k: None if v is None else str(v) for k, v in row.items()} for row in plain])


def _read(name: str, split: str, config: DataConfig) -> Rows:
    if is_file(name):
        if Path(name).stat().st_size < 2**30 and deeply_nested(name):  # a larger file is not worth a second reading
            raise ValueError("a line is nested too deeply")
        return datasets.load_dataset("json", data_files={"train": name}, split=split, streaming=config.streaming)
    if not any((Path(name) / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        subset = config.config_name if name == config.name else None
        return datasets.load_dataset(name, subset, split=split, streaming=config.streaming)
    saved = datasets.load_from_disk(name)
    if isinstance(saved, datasets.Dataset):
        saved = datasets.DatasetDict({str(saved.split or "train"): saved})
    if split not in saved:
        raise ValueError(f"the folder's splits are {', '.join(map(str, saved))}")
    return saved[split].to_iterable_dataset() if config.streaming else saved[split]


def _generate(field: str, name: str, size: int, seed: int, offset: int) -> datasets.Dataset:
    """Rows with question, answer and, where the task has one, the worked answer (which ends with the answer)."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError:
        raise GrassError(f"{field}={name!r} needs reasoning-gym: pip install 'grass-dist[demo]'.") from None
    task = name[len(GENERATED) :]
    near = difflib.get_close_matches(task, DATASETS, n=3) or sorted(DATASETS)[:3]
    if task not in DATASETS:
        raise ConfigError(field, name, "reasoning-gym has no such task", f"its {len(DATASETS)} tasks include {near}")
    # example i of a task is drawn from its seed + i: spread the seeds, or neighbours share their examples
    start = int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1) + offset
    try:
        entries = list(reasoning_gym.create_dataset(task, seed=start, size=size))
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(field, name, f"the task needs settings ({error})", "choose another task") from error
    return datasets.Dataset.from_list([_generated_row(entry) for entry in entries])


def _generated_row(entry: Row) -> Row:
    answer, worked = entry["answer"], entry["metadata"].get("answer_cot")
    row = {"question": str(entry["question"]), "answer": answer if answer is None else str(answer)}
    if worked is None:
        return row
    steps, mark, _ = str(worked).rpartition("#### ")  # what follows may write the answer in another way: 9.0 for 9
    return {**row, "worked": f"{steps}{mark}{answer}" if mark else str(worked)}


def tokenise(row: Row, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Example:
    """One row as token ids and labels.

    The labels are the ids, and `IGNORED` (-100) on the prompt and on the first token, which nothing predicts. The
    end-of-turn or eos token has a label; what a chat template writes after it is left out. Cut to max_length on
    the right.

    Returns:
        ``{"input_ids": …, "labels": …}``, two lists of equal length, at most max_length. No label may be left.

    Raises:
        ConfigError: a column that the row does not have, or that holds neither text nor a number.
    """
    if config.text is not None:
        prompt_ids: list[int] = []
        ids = _with_eos(_encode(tokenizer, fill(config.text, row, "text"), special=True), tokenizer)
    else:
        prompt = fill(config.prompt or "", row, "prompt")
        completion = fill(config.completion or "", row, "completion")
        prompt_ids = render_prompt(tokenizer, prompt, config.chat_template)
        if config.chat_template and tokenizer.chat_template:
            ids = prompt_ids + _assistant_turn(tokenizer, prompt, completion, prompt_ids)
        else:
            ids = prompt_ids + _with_eos(_encode(tokenizer, completion), tokenizer)
    ids = ids[: config.max_length]
    start = min(max(1, len(prompt_ids)), len(ids))
    return {"input_ids": ids, "labels": [IGNORED] * start + ids[start:]}


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, chat_template: bool = True) -> list[int]:
    """The token ids that a completion follows, as in training.

    Args:
        chat_template: write the prompt as a user's turn, if the tokenizer has a chat template.
    """
    if chat_template and tokenizer.chat_template:
        return _apply(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    ids = _encode(tokenizer, prompt, special=True)
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> list[int]:
    ids: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    return list(ids)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    ids: Any = tokenizer(text, add_special_tokens=special)["input_ids"]
    return list(ids)


def _with_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    eos: Any = tokenizer.eos_token_id
    return ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos]


def _assistant_turn(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, prompt_ids: list[int]) -> list[int]:
    """The ids of the assistant's turn up to its end-of-turn token."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    turn = _apply(tokenizer, messages)
    if turn[: len(prompt_ids)] == prompt_ids:
        turn = turn[len(prompt_ids) :]
    else:  # tokens merge across the border, or the template opens the turn in another way
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        body = answer if answer in text else answer.strip()
        _, found, end = text.rpartition(body or "\0")
        turn = _encode(tokenizer, body + (end if found else str(tokenizer.eos_token or "")))
    eos = tokenizer.eos_token_id  # looked up once: it is slow
    ends = [index for index, token in enumerate(turn) if token == eos]
    return turn[: ends[-1] + 1] if ends else turn
