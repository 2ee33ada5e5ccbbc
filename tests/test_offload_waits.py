"""The tests of moving states can fail: every wait in the code is taken out in turn, and each one is missed.

That goes for the waits of copies and updates in `moving`, and for the one of `slots`: a slot's memory may still be in
use by what the compute has queued when the allocator hands it out.
"""

from __future__ import annotations

import ast
import copy
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from grass_dist.errors import GrassError
from grass_dist.offload import moving, slots
from grass_dist.offload.streams import ThreadEvent
from tests.offload_model import drive

MODULES = (moving, slots)
CALLS = {"wait", "synchronize", "settle", "_ended", "allocated"}
WAYS = [(mode, options) for mode in ("interval", "stream") for options in ({}, {"shuffled": True}, {"inline": True})]
SEEDS = 12
MOST = 80
"""Seeds that a missing wait is given to show under."""


def waits(tree: ast.AST) -> Iterator[tuple[str, ast.AST, int | None]]:
    """Each wait: a call of one of `CALLS`, or one event of the list that a job is to run after."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in CALLS:
            yield f"{node.lineno}: {ast.unparse(node)}", node, None
        if name in ("compute", "to_device", "to_host", "_read"):
            lists = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "after")]
            for events in lists:
                for at, event in enumerate(events.elts if isinstance(events, ast.List) else ()):
                    yield f"{node.lineno}: {name} after {ast.unparse(event)}", events, at


def parsed(module: types.ModuleType) -> ast.Module:
    assert module.__file__ is not None
    return ast.parse(Path(module.__file__).read_text())


WAITS = [
    (module, number, f"{module.__name__.rpartition('.')[2]} {name}")
    for module in MODULES
    for number, (name, _, _) in enumerate(waits(parsed(module)))
]


def without(module: types.ModuleType, number: int) -> types.ModuleType:
    """``module`` without one of its waits: an event that is waited for has come already."""
    tree = parsed(module)
    _, node, at = list(waits(tree))[number]
    if isinstance(node, ast.List) and at is not None:
        del node.elts[at]
    else:
        assert isinstance(node, ast.Call)
        asked = copy.deepcopy(node) if ast.unparse(node.func) == "allocated" else ast.Constant(None)  # and not heard
        node.func, node.args, node.keywords = ast.Name("_come", ast.Load()), [asked], []
    mutant = types.ModuleType("grass_dist.offload.mutant")
    sys.modules[mutant.__name__] = mutant  # dataclasses look their module up
    mutant.__dict__["_come"] = lambda _: ThreadEvent(done=True)
    exec(compile(ast.fix_missing_locations(tree), "mutant", "exec"), mutant.__dict__)
    return mutant


def test_the_waits_are_found():
    assert len(WAITS) >= 13
    assert {
        "to_device after slot.free",
        "to_device after place.left",
        "_read after place.updated",
        "allocated(flat)",
    } <= {name.split(": ")[1] for _, _, name in WAITS}


@pytest.mark.parametrize("options", WAYS, ids=lambda way: " ".join([way[0], *way[1]]))
def test_every_state_is_right_with_all_of_them(options):
    for seed in range(SEEDS):
        drive(moving, options[0], seed, **options[1])


@pytest.mark.parametrize(("module", "number"), [wait[:2] for wait in WAITS], ids=[wait[2] for wait in WAITS])
def test_a_state_is_wrong_without(module, number):
    mutant = without(module, number)
    changed = {"module": moving, "make_pool": mutant.SlotPool} if module is slots else {"module": mutant}
    for seed in range(MOST):
        for mode, options in WAYS:
            try:
                drive(mode=mode, seed=seed, **changed, **options)
            except (AssertionError, GrassError):
                return
    pytest.fail(f"nothing missed wait {number} of {module.__name__}")
