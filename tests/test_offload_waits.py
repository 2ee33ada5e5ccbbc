"""The tests of moving states can fail: every wait in the code is taken out in turn, and each one is missed."""

from __future__ import annotations

import ast
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from grass_dist.errors import GrassError
from grass_dist.offload import moving
from tests.offload_model import drive

SOURCE = Path(moving.__file__).read_text()
CALLS = {"wait", "synchronize", "settle", "_ended"}
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
        if name in ("compute", "to_device", "to_host"):
            lists = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "after")]
            for events in lists:
                for at, event in enumerate(events.elts if isinstance(events, ast.List) else ()):
                    yield f"{node.lineno}: {name} after {ast.unparse(event)}", events, at


NAMES = [name for name, _, _ in waits(ast.parse(SOURCE))]


def without(number: int) -> types.ModuleType:
    """`grass_dist.offload.moving` without one of its waits."""
    tree = ast.parse(SOURCE)
    _, node, at = list(waits(tree))[number]
    if isinstance(node, ast.List) and at is not None:
        del node.elts[at]
    else:
        assert isinstance(node, ast.Call)
        node.func, node.args, node.keywords = ast.Name("bool", ast.Load()), [ast.Constant(1)], []
    module = types.ModuleType("grass_dist.offload.mutant")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(ast.fix_missing_locations(tree), "mutant", "exec"), module.__dict__)
    return module


def test_the_waits_are_found():
    assert len(NAMES) >= 9
    assert {"to_device after slot.free", "to_device after place.left", "to_host after place.updated"} <= {
        name.split(": ")[1] for name in NAMES
    }


@pytest.mark.parametrize("options", WAYS, ids=lambda way: " ".join([way[0], *way[1]]))
def test_every_state_is_right_with_all_of_them(options):
    for seed in range(SEEDS):
        drive(moving, options[0], seed, **options[1])


@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_a_state_is_wrong_without(number):
    mutant = without(number)
    for seed in range(MOST):
        for mode, options in WAYS:
            try:
                drive(mutant, mode, seed, **options)
            except (AssertionError, GrassError):
                return
    pytest.fail(f"nothing missed {NAMES[number]}")
