"""Errors of ours on their way out of a worker process."""

from __future__ import annotations

import concurrent.futures
import copy
import importlib
import multiprocessing
import pickle
import pkgutil
from collections.abc import Iterator

import pytest

import grass_dist
from grass_dist.errors import CheckpointError, ConfigError, GrassError, RanksDisagree, UnsupportedModel


def subclasses(cls: type[GrassError]) -> Iterator[type[GrassError]]:
    yield cls
    for sub in cls.__subclasses__():
        yield from subclasses(sub)


def every_class() -> list[type[GrassError]]:
    """All that the package defines: a class that a module hides is found once the module is imported."""
    for module in pkgutil.walk_packages(grass_dist.__path__, "grass_dist."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ImportError:  # of an extra that is not installed
                continue
    return [cls for cls in subclasses(GrassError) if cls.__module__.startswith("grass_dist")]


def made(cls: type[GrassError]) -> GrassError:
    of_a_setting = issubclass(cls, ConfigError)
    arguments = ("active_layers", 0, "is not positive", "use 1 or more") if of_a_setting else ("Layer 3 is away.",)
    error = cls(*arguments)
    error.on_every_rank = True
    error.add_note("while the run started")
    return error


ROUTES = {
    **{f"pickle {n}": lambda e, n=n: pickle.loads(pickle.dumps(e, n)) for n in range(pickle.HIGHEST_PROTOCOL + 1)},
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def test_the_public_errors_are_among_those_that_are_tested():
    assert set(every_class()) >= {GrassError, ConfigError, UnsupportedModel, CheckpointError, RanksDisagree}


@pytest.mark.parametrize("route", ROUTES)
def test_an_error_stays_the_same_on_its_way(route):
    for cls in every_class():
        error = made(cls)
        again = ROUTES[route](error)
        assert type(again) is cls and str(again) == str(error) and again.args == error.args, cls
        assert again.__dict__ == error.__dict__ and again.on_every_rank and again.__notes__ == error.__notes__, cls


def test_a_setting_that_cannot_be_pickled_arrives_as_its_text():
    error = ConfigError("model", lambda: 0, "it is no model", "pass one")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.value == repr(error.value) and again.fix == "pass one"
    assert again.under("grass").field == "grass.model"


def test_an_error_that_was_unpickled_can_go_on():
    again = pickle.loads(pickle.dumps(made(ConfigError))).under("grass")
    assert str(again) == "grass.active_layers=0: is not positive; use 1 or more."


def refuse(value: int) -> None:
    raise ConfigError("active_layers", value, "is not positive", "use 1 or more")


def test_a_pool_tells_what_its_worker_raised():
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool,
        pytest.raises(ConfigError, match="active_layers=-1: is not positive") as caught,
    ):
        pool.submit(refuse, -1).result(timeout=60)
    assert (caught.value.field, caught.value.value) == ("active_layers", -1)
