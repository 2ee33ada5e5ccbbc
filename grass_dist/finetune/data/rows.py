"""Loads the rows of a dataset before tokenisation, holds some out, and leaves out those without an answer."""

from __future__ import annotations

import difflib
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from grass_dist.errors import ConfigError, GrassError
from grass_dist.finetune.data.batches import permutation
from grass_dist.finetune.data.config import (
    GENERATED,
    JSON_KINDS,
    KINDS,
    SPLIT,
    DataConfig,
    is_file,
    is_filled,
    kind_of,
    read_part,
)
from grass_dist.finetune.data.conversations import conversation_of, is_learnt
from grass_dist.finetune.data.json_files import HEAD, check_columns, files_of, table, text_rows
from grass_dist.finetune.data.json_lines import Row, Skipped

Rows = datasets.Dataset | datasets.IterableDataset


@dataclass
class Reading:
    """Collects what there is to tell about the files of a dataset once they are read."""

    skipped: dict[str, Skipped] = field(default_factory=dict)
    """The lines that on_bad_line="skip" left out, by file."""

    patterns: dict[str, list[str]] = field(default_factory=dict)
    """The files that each name with a ``*`` stood for."""


class RowSource(NamedTuple):
    """A dataset that a `DataConfig` names, and the setting that an error about it is about."""

    field: str
    name: str
    split: str
    config: DataConfig

    @property
    def learnt(self) -> str:
        """Name of the part that is learnt."""
        return self.config.learnt

    def has_answer(self, row: Row) -> bool:
        """Says whether a row has anything to learn; null, white space and a template around them do not count."""
        if self.learnt == "messages":
            return any(map(is_learnt, conversation_of(row, self.config)))
        return is_filled(self.config.parts[self.learnt], row, self.learnt)

    def nothing_left(self, count: int, *, labels: bool, held_out: bool) -> ConfigError:
        """Makes the error that none of ``count`` rows has an answer or, if any has (``labels``), a label within it."""
        which, more = self._none_of(count, held_out), "hold out more, " * held_out
        if labels:
            seconds = "max_seconds, " * (self.config.audio is not None)
            fix = f"raise max_length, {seconds}{more}or check the {self.learnt} of the data"
            problem = f"{which} has a token of its {self.learnt} left within it"
            return ConfigError("max_length", self.config.max_length, problem, fix)
        answer = {"completion": "answer", "messages": "messages of an assistant"}.get(self.learnt, self.learnt)
        problem = f"{which} has {'an ' * (answer == 'answer')}{answer}"
        fix = f"{more}name the column that holds the {answer}, or repair the data"
        return ConfigError(self.learnt, self.config.parts[self.learnt], problem, fix)

    def _none_of(self, count: int, held_out: bool) -> str:
        if held_out:
            return f"none of the {count} rows of {self.name} that are held out"
        first = "first " if self.config.streaming or self.config.limit is not None else ""
        return f"none of the {first}{count} rows of {self.name}"

    def too_few(self, found: int) -> ConfigError:
        """Makes the error that the held-out examples leave none to train on."""
        problem = f"{self.name} has {found} examples, which leaves none to train on"
        return ConfigError("eval_examples", self.config.eval_examples, problem, "hold out fewer, or set eval")

    def watch(self, rows: Iterable[Any]) -> Iterator[Row]:
        """Passes rows on, all of which must fill the templates.

        Raises:
            ConfigError: a row does not, or cannot be read; for a file it names the line.
        """
        try:
            for row in rows:
                for part, spec in self.config.parts.items():
                    read_part(part, spec, row)
                yield row
        except GrassError:
            raise
        except Exception as error:  # `datasets` raises of all kinds
            raise self.failure(error) from error

    def failure(self, error: Exception) -> ConfigError:
        """Says in short what an exception of `datasets`, or of reading a file, means."""
        cause = error.__cause__ if type(error).__name__.startswith("DatasetGeneration") else error
        reason = str(cause).strip().partition("\n")[0].rstrip(".")
        reason = reason or ("it is empty" if isinstance(cause, StopIteration) else type(cause).__name__)
        problem = f"split {self.split!r} cannot be loaded ({reason})"
        fix = f"give the name of a Hub dataset, a folder or a {', '.join(KINDS)} file, and a split that it has"
        return ConfigError(self.field, self.name, problem, fix)


def sources(config: DataConfig) -> tuple[RowSource, RowSource]:
    """Returns where the rows to train on come from, and where the held-out ones do."""
    train = RowSource("name", config.name, config.split, config)
    if config.eval is not None and config.eval.startswith(SPLIT):
        return train, train._replace(field="eval", split=config.eval[len(SPLIT) :])
    return train, train if config.eval is None else train._replace(field="eval", name=config.eval)


def folder_of(name: str) -> str:
    """Returns the folder that paths in the rows of a dataset start from; that of the program for one of the Hub."""
    if Path(name).is_dir():
        return name
    return str(Path(name).parent) if is_file(name) else ""


def load_rows(config: DataConfig, seed: int, reading: Reading | None = None) -> tuple[Rows, list[Row]]:
    """Loads the rows to train on and the held-out rows, before tokenisation.

    Args:
        reading: takes what there is to tell about the files.

    Raises:
        ConfigError: see `grass_dist.finetune.data.loading.load_data`.
    """
    reading = reading or Reading()
    source, other = sources(config)
    rows = _load(source, seed, reading)
    if config.limit is not None:
        short = isinstance(rows, datasets.Dataset) and len(rows) < config.limit
        rows = rows if short else rows.take(config.limit)
    count = config.eval_examples
    if not count:
        return rows, []
    if config.eval is not None:
        held_out = list(islice(other.watch(_load(other, seed, reading, offset=config.size)), count))
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


def files_to_train_on(config: DataConfig) -> dict[str, Path]:
    """Returns the local files that the rows to train on are read from, by name; a dataset of the Hub has none.

    For a folder these are all files in it, a hundred thousand at most.
    """
    if is_file(config.name):
        return {Path(file).name: Path(file) for file in files_of(config.name)}
    folder = Path(config.name)
    found = (Path(at, name) for at, _, names in os.walk(folder) for name in names)
    return {str(file.relative_to(folder)): file for file in islice(found, 100_000) if file.is_file()}


def _load(source: RowSource, seed: int, reading: Reading, offset: int = 0) -> Rows:
    """Loads the rows of one dataset, at least one."""
    field, name, split, config = source
    if name.startswith(GENERATED):
        size = config.size if field == "name" else config.eval_examples
        return _generate(field, name, size, seed, offset)
    try:
        files = _text_files(source, reading)
        rows = _read_typed(source) if files is None else _read_files(source, files, reading)
        first = None if rows is None else next(iter(rows), None)
    except GrassError:
        raise
    except Exception as error:  # a broken file makes parsers raise of all kinds
        raise source.failure(error) from error
    if rows is None or first is None:
        left_out = [str(each) for file, each in reading.skipped.items() if each.count and file in files_of(name)]
        why = f" ({left_out[0]})" if left_out else ""
        raise ConfigError(field, name, f"split {split!r} has no examples{why}", "give a dataset that has some")
    return rows


def _text_files(source: RowSource, reading: Reading) -> dict[str, list[str]] | None:
    """Returns the files of each split of a dataset that is a file, or a folder of JSON files alone; else None."""
    field, name, _, config = source
    if is_file(name):
        files = files_of(name)
        if not files:
            raise ConfigError(field, name, "there is no such file", "give the path of a file")
        if files != [name]:
            reading.patterns[name] = files
        _check_apart(source, {"train": files})
        return None if config.media and kind_of(name) == ".parquet" else {"train": files}
    if Path(name).is_file():
        raise ConfigError(field, name, f"it is no {', '.join(KINDS)} file", "write it as one, or rename it")
    if field == "eval" and name != config.name and Path(name).is_dir() and _shared([name], [config.name]):
        problem = f"it is the folder of name, {config.name!r}"
        raise ConfigError(field, name, problem, "use split:NAME, or another folder")
    if not Path(name).is_dir() or _is_saved(name):
        return None
    if re.search(r"[\[*?]", str(Path(name).resolve())):
        problem = f"its path, {Path(name).resolve()}, has a [, * or ?, which `datasets` takes for a pattern"
        raise ConfigError(field, name, problem, "rename the folder, or give the path of a file")
    splits = _files_by_split(name, config)
    _check_apart(source, splits)
    plain = all(kind_of(f) in JSON_KINDS and Path(f).is_file() for files in splits.values() for f in files)
    return splits if splits and plain else None


def _files_by_split(name: str, config: DataConfig) -> dict[str, list[str]]:
    """Returns the files of each split of a dataset that is one file or several, or a folder; else nothing."""
    if is_file(name):
        return {"train": files_of(name)}
    if not Path(name).is_dir() or _is_saved(name):
        return {}
    builder = datasets.load_dataset_builder(name, config.config_name if name == config.name else None)
    return {str(split): list(map(str, files)) for split, files in (builder.config.data_files or {}).items()}


def _used(splits: Mapping[str, list[str]], split: str) -> dict[str, list[str]]:
    """Returns the files that a split, or a slice of one, is read from."""
    return {name: files for name, files in splits.items() if re.search(rf"\b{re.escape(name)}\b", split)}


def _check_apart(source: RowSource, splits: Mapping[str, list[str]]) -> None:
    """Checks that no file of another dataset, whose rows are to be held out, is one to train on.

    Raises:
        ConfigError: one is.
    """
    field, name, split, config = source
    if field != "eval" or name == config.name:
        return
    held_out, trained = (
        [file for files in _used(each, its).values() for file in files]
        for each, its in ((splits, split), (_files_by_split(config.name, config), config.split))
    )
    if both := _shared(held_out, trained):
        problem = f"{both[0]} is one of the files of name, {config.name!r}"
        raise ConfigError(field, name, problem, "hold out a file that name does not stand for")


def _shared(paths: list[str], others: list[str]) -> list[str]:
    """Returns the paths that are the same file or folder as one of the others, however they are written."""
    known = {(found.st_dev, found.st_ino) for found in (Path(other).stat() for other in others if Path(other).exists())}
    found = ((path, Path(path).stat()) for path in paths if Path(path).exists())
    return [path for path, its in found if (its.st_dev, its.st_ino) in known]


def _read_files(source: RowSource, splits: dict[str, list[str]], reading: Reading) -> Rows | None:
    """Reads the rows of files; None if there are none."""
    split, config = source.split, source.config
    if config.streaming and split not in splits:
        names = " or ".join(map(repr, splits))
        raise ValueError(f"a stream of a file has the split {names}, and no slices of it")
    wanted = datasets.ReadInstruction.from_spec(split)
    wanted.to_absolute(dict.fromkeys(splits, 2**62))  # a split that there is not: say so before a file is read
    used = _used(splits, split)
    found = dict[str, datasets.Dataset]()
    for name, files in used.items():
        rows = _rows_of(source, tuple(files), reading, whole=split not in splits)
        if isinstance(rows, datasets.IterableDataset):
            return rows
        if rows is not None:
            found[name] = rows
    if split in splits or not found:
        return found.get(split)
    parts = wanted.to_absolute({name: len(found[name]) if name in found else 0 for name in splits})
    chosen = [found[each.splitname].select(range(each.from_, each.to)) for each in parts if each.splitname in found]
    return datasets.concatenate_datasets(chosen)


def _rows_of(source: RowSource, files: tuple[str, ...], reading: Reading, *, whole: bool) -> Rows | None:
    """Reads the rows of a split, only as many as are needed unless ``whole``."""
    field, name, _, config = source
    skip = config.on_bad_line == "skip"
    if not skip:
        check_columns(field, files, config.parts, HEAD if config.streaming else None)
    reading.skipped.update({file: Skipped(file) for file in files if skip})
    needed = config.limit if field == "name" else config.eval_examples
    fix = "repair it, or leave such {unit}s out with data.on_bad_line=skip" if is_file(name) else "repair it"
    # As a tuple: `datasets` would shuffle a list.
    options = {"field": field, "files": files, "parts": config.parts, "on_bad_line": config.on_bad_line, "fix": fix}
    rows = islice(text_rows(**options, skipped=reading.skipped), None if whole else needed)
    if not config.streaming:
        return table(rows)
    if skip or any(kind_of(file) == ".json" for file in files):  # which is in memory as a whole anyway
        deque(rows, maxlen=0)  # to count, and to fail now
    return datasets.IterableDataset.from_generator(text_rows, gen_kwargs=options)


def _is_saved(name: str) -> bool:
    return any((Path(name) / marker).is_file() for marker in ("dataset_dict.json", "state.json"))


def _read_typed(source: RowSource) -> Rows:
    """Reads the rows of a dataset of the Hub or of a folder, with the types that `datasets` gives to their columns."""
    rows = _read_decoded(source)
    for column, feature in (rows.features or {}).items():
        inner = getattr(feature, "feature", feature)  # of a list
        if isinstance(inner, datasets.Audio | datasets.Image):  # both are read when they are needed
            kept = type(inner)(decode=False)
            rows = rows.cast_column(column, kept if inner is feature else datasets.List(kept))
    return rows


def _read_decoded(source: RowSource) -> Rows:
    _, name, split, config = source
    if is_file(name):  # of embedded audio or images, which stay on the disk
        return datasets.load_dataset("parquet", data_files=files_of(name), split=split, streaming=config.streaming)
    if not _is_saved(name):
        subset = config.config_name if name == config.name else None
        return datasets.load_dataset(name, subset, split=split, streaming=config.streaming)
    saved = datasets.load_from_disk(name)
    if isinstance(saved, datasets.Dataset):
        saved = datasets.DatasetDict({str(saved.split or "train"): saved})
    if split not in saved:
        raise ValueError(f"the folder's splits are {', '.join(map(str, saved))}")
    return saved[split].to_iterable_dataset() if config.streaming else saved[split]


def _generate(field: str, name: str, size: int, seed: int, offset: int) -> datasets.Dataset:
    """Generates rows with question, answer and, if the task has one, the worked answer (which ends with the answer)."""
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
