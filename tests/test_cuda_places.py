"""The list in docs/cuda.md is that of all places which touch CUDA, and names a test for each."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "cuda.md"
WORDS = {"pin_memory", "non_blocking", "record_stream", "set_sync_debug_mode", "set_device", "device_ids"}


def touches(node: ast.AST) -> bool:
    """Whether a node is ``torch.cuda``, a device of that kind, or a word that only matters on a GPU."""
    if isinstance(node, ast.Attribute):
        return node.attr in WORDS or (node.attr == "cuda" and ast.unparse(node.value) == "torch")
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.device":
        return any(isinstance(given, ast.Constant) and str(given.value).startswith("cuda") for given in node.args)
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").startswith("torch.cuda")
    return isinstance(node, ast.keyword) and node.arg in WORDS


def places(tree: ast.AST, inside: str = "") -> Iterator[str]:
    """Names of the functions and classes, outermost first, in which something touches CUDA; annotations aside."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from places(node, f"{inside}.{node.name}".lstrip("."))
        elif isinstance(node, ast.arguments | ast.arg | ast.AnnAssign):
            continue
        elif touches(node):
            yield inside or "(imports)"
        else:
            yield from places(node, inside)


def found() -> set[str]:
    files = list((ROOT / "grass_dist").rglob("*.py"))
    return {
        f"{file.relative_to(ROOT).as_posix()} {place}"
        for file in files
        for place in places(ast.parse(file.read_text()))
    }


def listed() -> dict[str, str]:
    """The last column of each row of the page's table, by the file and function of the first."""
    rows = re.findall(r"^\| `([^`]+)` `([^`]+)` \|.*\| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) == len({(file, place) for file, place, _ in rows}), "a place is listed twice"
    return {f"{file} {place}": tests for file, place, tests in rows}


def test_every_place_is_listed_and_exists():
    ours, theirs = found(), set(listed())
    assert ours - theirs == set(), "missing in docs/cuda.md"
    assert theirs - ours == set(), "in docs/cuda.md and no more in the code"


def test_every_place_names_a_test_that_exists():
    for place, tests in listed().items():
        names = re.findall(r"`([\w/]+\.py)::(\w+)`", tests)
        assert names or "not held" in tests, place
        for file, name in names:
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), (place, name)


if __name__ == "__main__":
    print("\n".join(sorted(found())))
