"""The table of options: it has every key of DeepSpeed's own configuration, and says what the code does with each."""

from __future__ import annotations

import os
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from docs import generate
from grass_dist.backends.zero.ds_config import split_ds_config
from grass_dist.backends.zero.options import CONDITIONS, IDLE, REFUSED, REMOVED, UNUSED, rows

os.environ.setdefault("DS_ACCELERATOR", "cpu")
pytest.importorskip("deepspeed")

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import DeepSpeedMonitorConfig
from deepspeed.runtime import config as runtime
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "compile": CompileConfig,
    "tensor_parallel": TPTrainingConfig,
    "hybrid_engine": runtime.HybridEngineConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
    "comms_logger": CommsLoggerConfig,
    "": DeepSpeedMonitorConfig,
}
"""DeepSpeed's models of sections, by the path of the section."""
PATHS = {row.path for row in rows()}


class Asked(dict):
    """A section that notes the paths of all keys that DeepSpeed asks it for."""

    def __init__(self, path: str, content: dict[str, Any], seen: set[str]) -> None:
        super().__init__(content)
        self.path, self.seen = path, seen

    def note(self, key: Any) -> None:
        self.seen.add(f"{self.path}.{key}".lstrip("."))

    def __getitem__(self, key: Any) -> Any:
        self.note(key)
        return super().__getitem__(key)

    def __contains__(self, key: Any) -> bool:
        self.note(key)
        return super().__contains__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self.note(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> Asked:
        return Asked(self.path, self, self.seen)


def asked_by_deepspeed() -> set[str]:
    """Every key that DeepSpeed reads of a configuration, and of each section that it does not read by a model."""
    seen: set[str] = set()
    runtime.DeepSpeedConfig(Asked("", {"train_batch_size": 1}, seen))
    sections = sorted(seen)
    for section in sections:
        for content in ({}, {"enabled": True}):
            given = {"train_batch_size": 1, section: Asked(section, content, seen)}
            try:
                runtime.DeepSpeedConfig(Asked("", given, seen))
            except (runtime.DeepSpeedConfigError, AttributeError, TypeError, ValueError, AssertionError):
                continue  # it is no section, or one that is not asked but refused
    return seen - {path for path in seen if any(other.startswith(f"{path}.") for other in seen)}


def fields_of(model: type[BaseModel], path: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        here = f"{path}.{field.alias or name}".lstrip(".")
        inner = [kind for kind in (field.annotation, *typing.get_args(field.annotation)) if isinstance(kind, type)]
        models = [kind for kind in inner if issubclass(kind, BaseModel)]
        yield from (key for kind in models for key in fields_of(kind, here)) if models else [here]


def covered(path: str) -> bool:
    """Whether the table has a key, a section above it as a whole, or keys of the section that it is."""
    if any(known.startswith(f"{path}.") for known in PATHS):
        return True
    parts = path.split(".")
    above = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    return bool(above & PATHS or {f"{section}.*" for section in above} & PATHS)


SCHEMA = {path for section, model in MODELS.items() for path in fields_of(model, section)} | asked_by_deepspeed()


def test_no_key_of_deepspeeds_configuration_is_missing():
    assert len(SCHEMA) > 200
    assert not sorted(path for path in SCHEMA if not covered(path)), "say in options.py what becomes of it"


def test_a_missing_key_is_seen():
    assert not covered("zero_optimization.new_option") and not covered("new_section.enabled")


def test_no_option_stands_twice():
    paths = [row.path for row in rows()]
    assert sorted(paths) == sorted(set(paths))


@pytest.mark.parametrize("path", [row.path for row in rows() if row.verdict == "runs" and "*" not in row.path])
def test_what_runs_is_no_key_that_is_refused_or_idle(path):
    assert path not in {row[0] for row in REFUSED} and path not in IDLE


def test_the_table_says_of_a_condition_what_the_error_says():
    notes = {row.path: row.note for row in rows()}
    for name, (when, problem, fix) in CONDITIONS.items():
        assert f"refused {when}: {problem}; {fix}" in notes[name.partition(" ")[0]]


@pytest.mark.parametrize("path", IDLE)
def test_what_has_no_effect_is_said_at_the_start(path):
    config: dict[str, Any] = {"train_batch_size": 1, "zero_optimization": {"stage": 2}, "grass": {}}
    section, _, key = path.rpartition(".")
    if section:
        config.setdefault(section, {})[key] = False if path == UNUSED else 5
    else:
        config[path] = {"block_size": 5}
    (sentence,) = split_ds_config(config).said
    assert sentence == f"{path} has no effect under GRASS: {IDLE[path]}."


def test_each_removed_option_has_a_row():
    assert all(covered(path) or covered(f"{path}.enabled") for path in REMOVED)


def test_the_page_has_the_table_as_it_is():
    page = generate.OPTIONS_PAGE.read_text()
    assert generate.with_options(page) == page, "run make docs"
