"""A pytest plugin for DeepSpeed's own unit tests: in them `deepspeed.initialize` is `grass_dist.initialize`.

`integration_tests.deepspeed_tests` starts pytest with it. ``GRASS_DOOR`` says how an engine is made: "stock",
"plain" (our function without a block), or "block" (all layers train, without a probe). Results are appended to the
file ``GRASS_DOOR_RESULTS``, one line of JSON a test; what it has is not run again, and no test that fails in stock.
"""

from __future__ import annotations

import functools
import inspect
import json
import multiprocessing.pool
import os
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp
from torch import nn
from torch.utils.cpp_extension import get_default_build_root

from grass_dist.backends.zero.ds_config import load_ds_config
from grass_dist.config import ROLES
from grass_dist.deepspeed import config_of, initialize_with
from grass_dist.errors import GrassError
from grass_dist.model.discovery import LayerMap, find_layers

MODE, RESULTS = "GRASS_DOOR", "GRASS_DOOR_RESULTS"
SECONDS = 120
"""After so many a test that DeepSpeed's pool waits for is taken for hung."""
HUNG = f"the test hung for {SECONDS} s"
_UNENDED = {"outcome": "failed", "why": "the process of pytest ended in it", "engines": []}
TRIES = 2
"""On a busy machine a process may be late: what hung gets a second try."""

Results = dict[str, dict[str, dict]]
"""By test and mode, what came of it."""


def read(told: Path) -> Results:
    """The results of a file. A test that began and did not end has ended its process, or was stopped with it."""
    results: Results = {}
    for line in told.read_text().splitlines():
        try:
            result = json.loads(line)
        except ValueError:
            continue  # cut off when its run was stopped
        of_test = results.setdefault(result["test"], {})
        tries = of_test.get(result["mode"], {}).get("tries", 0) + ("outcome" not in result)
        of_test[result["mode"]] = {**_UNENDED, **result, "tries": tries}
    return results


def install(after: Callable[..., None] | None = None, *args: Any) -> None:
    """Replaces `deepspeed.initialize` in this process, as ``GRASS_DOOR`` says."""
    import deepspeed

    # Where there is no ninja, stock would compile an operator for the collectives of a CPU.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    stock = deepspeed.initialize
    if os.environ[MODE] != "stock" and not hasattr(stock, "__wrapped__"):
        deepspeed.initialize = functools.wraps(stock)(functools.partial(_initialize, stock))
    if after is not None:
        after(*args)


def _initialize(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    signature = inspect.signature(stock)
    given = signature.bind(*args, **kwargs).arguments
    if given.get("model_parameters") is not None:
        given["model_parameters"] = list(given["model_parameters"])  # a generator can be read once
    block = _block(given) if os.environ[MODE] == "block" else None
    _note("no block" if block is None else f"{block['active_layers']} layers")
    if block is not None:
        config = load_ds_config(config_of(given))
        given["config"] = {**config, "grass": block}
        given.pop("config_params", None)
        if getattr(given.get("args"), "deepspeed_config", None) is not None:
            given["args"].deepspeed_config = None
    return initialize_with(stock, (), given, ())


def _block(given: dict[str, Any]) -> dict[str, Any] | None:
    """All layers without a probe; None where there is no stack of layers, or nothing to train with."""
    config = config_of(given)
    optimizer = given.get("optimizer")
    if config is None or (optimizer is None and "optimizer" not in load_ds_config(config)):
        return None
    found, named = _layers_of(given["model"])
    if found is None:
        return None
    groups = getattr(optimizer, "param_groups", None) or given.get("model_parameters")
    trained = {id(p) for p in _flat(groups if groups is not None else given["model"].parameters()) if p.requires_grad}
    competing = [unit for unit in found.layers if any(id(p) in trained for _, p in unit.params)]
    if not competing:
        return None
    others = [name for name, p in found.other if id(p) in trained]
    block = {"active_layers": len(competing), "probe_steps": 0, "always_active": [*ROLES, *others]}
    return {**block, "layers": named} if named else block


def _flat(params: Any) -> Iterator[nn.Parameter]:
    for param in list(params):
        if isinstance(param, dict):
            yield from _flat(param["params"])
        else:
            yield param[1] if isinstance(param, tuple) else param


def _layers_of(model: nn.Module) -> tuple[LayerMap | None, str | None]:
    """The layers, and the name of their list if that has to be said."""
    lists = (nn.ModuleList, nn.Sequential)
    names = [None, *(name for name, module in model.named_modules() if name and isinstance(module, lists))]
    for name in names:
        try:
            return find_layers(model, name), name
        except GrassError:
            continue
    return None, None


def _note(line: str) -> None:
    """Says how an engine was made; the processes of a test write to one file."""
    with Path(os.environ[RESULTS] + ".engines").open("a") as file:
        file.write(line + "\n")


def _called(function: Callable[..., Any], *given: Any) -> Any:
    """Calls it; a failure of `pytest.raises` would end the process of a pool, and what waits for it would hang."""
    try:
        return function(*given)
    except pytest.fail.Exception as error:
        raise AssertionError(str(error)) from None


class _Pool:
    """A pool whose processes have our function, and which ends when a test hangs."""

    def __init__(self, processes: int) -> None:
        self._pool = multiprocessing.pool.Pool(processes, initializer=install, context=mp.get_context("forkserver"))

    def starmap_async(self, function: Callable[..., Any], args: Sequence[Any]) -> _Pool:
        # Each call to a process of its own: a process that is ready sooner could take both.
        self._calls = [self._pool.apply_async(_called, (function, *given)) for given in args]
        return self

    def get(self, timeout: float) -> list[Any]:
        del timeout
        try:
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                if failed := [call for call in self._calls if call.ready() and not call.successful()]:
                    failed[0].get()
                if all(call.ready() for call in self._calls):
                    return [call.get() for call in self._calls]
                time.sleep(0.05)
            raise AssertionError(HUNG)
        except BaseException:
            self._pool.terminate()
            self._pool.join()
            _unlock()
            self.starmap = lambda *_: None
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)


def _unlock() -> None:
    """Removes the file that a process leaves which ends while torch loads an operator that is built: others wait."""
    for lock in Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()).glob("**/lock"):
        if any(lock.parent.glob("*.so")):
            lock.unlink(missing_ok=True)


def pytest_configure(config: pytest.Config) -> None:
    mp.get_context("forkserver").set_forkserver_preload(["torch", "deepspeed", __name__])
    Path(os.environ[RESULTS] + ".engines").write_text("")
    _unlock()
    install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    results, mode = read(Path(os.environ[RESULTS])), os.environ[MODE]
    left = [item for item in items if _is_left(results.get(item.nodeid, {}), mode)]
    config.hook.pytest_deselected(items=[item for item in items if item not in left])
    items[:] = left


def _is_left(told: dict[str, dict], mode: str) -> bool:
    """Whether a test has to run in a mode, given what came of it so far."""
    if mode != "stock" and told.get("stock", {}).get("outcome") != "passed":
        return False
    again = mode in told and any(why in told[mode]["why"] for why in (HUNG, _UNENDED["why"]))
    return mode not in told or (again and told[mode]["tries"] < TRIES)


def pytest_collection_finish(session: pytest.Session) -> None:
    import_module("unit.common").mp.Pool = _Pool  # of the checkout, in whose folder pytest runs


def pytest_runtest_logstart(nodeid: str) -> None:
    _tell(nodeid)


def pytest_unconfigure() -> None:
    Path(os.environ[RESULTS] + ".engines").unlink(missing_ok=True)


def _tell(test: str, **result: Any) -> None:
    with Path(os.environ[RESULTS]).open("a") as file:
        file.write(json.dumps({"test": test, "mode": os.environ[MODE], **result}) + "\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    report = yield
    if report.when == "call" or report.outcome != "passed":
        engines = Path(os.environ[RESULTS] + ".engines")
        made = sorted(set(engines.read_text().splitlines()))
        engines.write_text("")
        _tell(item.nodeid, outcome=report.outcome, why=_why(report), engines=made)
    return report


def _why(report: Any) -> str:
    """The first line of the error, or what a skip says."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr[2] if report.skipped else report.longrepr or "")
    first = text.strip().splitlines()[0][:400] if text.strip() else ""
    if first == "AssertionError":  # raised in another process: what it asserted is in that one's traceback
        asserted = [line.strip() for line in str(report.longrepr).splitlines() if line.strip().startswith("assert ")]
        first = f"AssertionError: {asserted[0]}" if asserted else first
    return first
