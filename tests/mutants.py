"""Mutants of the modules that order copies and updates: each lacks one wait, record, allocation or read.

They are found in the code, so that what is new there has a mutant, too.
"""

from __future__ import annotations

import ast
import copy
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from grass_dist.states.streams import ThreadEvent

CHAIN = {
    name.rpartition(".")[2]: name
    for name in (
        "grass_dist.states.streams",
        "grass_dist.states.chaos",
        "grass_dist.states.transfer",
        "grass_dist.states.store",
        "grass_dist.states.slots",
        "grass_dist.states.layer_state",
        "grass_dist.states.place",
        "grass_dist.states.moving",
        "grass_dist.states.weights",
        "grass_dist.backends.host_sums",
        "grass_dist.backends.zero.states",
    )
}
"""Modules in the order in which they import each other."""
MUTATED = ("streams", "transfer", "store", "slots", "layer_state", "moving", "weights", "host_sums", "states")
QUEUES = {"compute", "to_device", "to_host", "_read", "submit", "_copy"}
"""Calls that are given the events to wait for."""
ORDERS = {"wait", "synchronize", "settle", "_settle", "_ended", "allocated", "finalize", *QUEUES}
"""Calls that order something, and whose answer is used."""
Change = Callable[[], None]
"""Makes a mutant of the tree that a node is in."""


def mutations(tree: ast.Module) -> Iterator[tuple[str, Change]]:
    """(where and what, how to change it): in the order of the code; no two are of one name."""
    seen: dict[str, int] = {}
    statements = {id(node.value) for _, node in walk(tree) if isinstance(node, ast.Expr)}
    for place, node in walk(tree):
        for name, change in of_node(node, answered=id(node) not in statements):
            text = f"{place}: {name}"
            seen[text] = seen.get(text, 0) + 1
            yield text if seen[text] == 1 else f"{text} ({seen[text]})", change


def walk(tree: ast.AST, place: str = "") -> Iterator[tuple[str, ast.AST]]:
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, ast.FunctionDef | ast.ClassDef)
        inside = f"{place}.{node.name}".lstrip(".") if named else place
        yield inside, node
        yield from walk(node, inside)


def of_node(node: ast.AST, *, answered: bool) -> Iterator[tuple[str, Change]]:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield f"without {ast.unparse(node)}", lambda: setattr(node, "value", ast.Constant(None))
    if isinstance(node, ast.With):
        for item in node.items:
            if item.optional_vars is None:
                yield f"not within {ast.unparse(item.context_expr)}", lambda item=item: enter_nothing(item)
    if isinstance(node, ast.Call):
        yield from of_call(node, answered=answered)


def of_call(node: ast.Call, *, answered: bool) -> Iterator[tuple[str, Change]]:
    name, text = called(node), ast.unparse(node)
    if name in ORDERS and answered:
        yield f"nothing for {text}", lambda: has_come(node)
    if name == "_then":
        yield f"{ast.unparse(node.args[0])} alone, not {text}", lambda: first_alone(node)
    for given in [*node.args, *(k.value for k in node.keywords if k.arg == "after")] if name in QUEUES else []:
        events = given.elts if isinstance(given, ast.List) else []
        for at, event in enumerate(events):
            yield f"{name} not after {ast.unparse(event)}", lambda events=events, at=at: events.__delitem__(at)
    if name in ("copy_", "to"):
        waits = not any(keyword.arg == "non_blocking" for keyword in node.keywords)
        yield f"{'no wait' if waits else 'a wait'} in {text}", lambda: in_the_other_way(node, waits)


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def has_come(node: ast.Call) -> None:
    """An event is there that has come, in the place of what the call would give."""
    asked = copy.deepcopy(node) if called(node) == "allocated" else ast.Constant(None)  # chaos acts when it is asked
    node.func, node.args, node.keywords = ast.Name("_come", ast.Load()), [asked], []


def first_alone(node: ast.Call) -> None:
    node.func, node.args = ast.Name("_same", ast.Load()), node.args[:1]


def enter_nothing(item: ast.withitem) -> None:
    item.context_expr = ast.Call(ast.Name("_nullcontext", ast.Load()), [], [])


def in_the_other_way(node: ast.Call, waits: bool) -> None:
    node.keywords = [keyword for keyword in node.keywords if keyword.arg != "non_blocking"]
    if waits:
        node.keywords.append(ast.keyword("non_blocking", ast.Constant(True)))


@cache
def source(name: str) -> ast.Module:
    file = importlib.import_module(CHAIN[name]).__file__
    assert file is not None
    return ast.parse(Path(file).read_text())


@cache
def compiled(name: str) -> types.CodeType:
    return compile(source(name), CHAIN[name], "exec")


ALL = [(module, name) for module in MUTATED for name, _ in mutations(source(module))]


def without(module: str, name: str) -> SimpleNamespace:
    """The modules of `CHAIN` by their short names: ``module`` as a mutant, and all that import it over it."""
    tree = copy.deepcopy(source(module))
    dict(mutations(tree))[name]()
    code = compile(ast.fix_missing_locations(tree), "mutant", "exec")
    parts: dict[str, types.ModuleType] = {}
    names = list(CHAIN)
    codes = {short: code if short == module else compiled(short) for short in names[names.index(module) :]}
    for short, code in codes.items():
        made: Any = types.ModuleType(CHAIN[short])
        parts[short] = made
        made._come, made._same, made._nullcontext = lambda _: ThreadEvent(done=True), lambda job: job, nullcontext
        with mock.patch.dict(sys.modules, {CHAIN[own]: part for own, part in parts.items()}):
            exec(code, made.__dict__)
    return whole(parts)


def whole(parts: dict[str, types.ModuleType] | None = None) -> SimpleNamespace:
    """The modules as they are, but for ``parts``."""
    return SimpleNamespace(**{short: importlib.import_module(name) for short, name in CHAIN.items()} | (parts or {}))
