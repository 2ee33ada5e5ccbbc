"""The results as a table: on the terminal, and in docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.gpu.parts import PARTS

COLOURS = {"holds": "green", "measured": "green", "not here": "yellow"}


def show(record: dict[str, Any], names: Sequence[str]) -> None:
    """Prints a row for each part, and below it what does not hold. Without rich the same in plain lines."""
    found = [(name, record["parts"][name]) for name in PARTS if name in names]
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        for name, part in found:
            print(f"{name}: {part['state']} ({part.get('seconds', 0)} s): {summary(part)}")
        return
    table = Table("part", "what it shows", "", "s", "found", title="tiny: on the CPU" if record["tiny"] else None)
    for name, part in found:
        state = Text(part["state"], COLOURS.get(part["state"], "bold red"))
        table.add_row(name, PARTS[name].title, state, f"{part.get('seconds', 0):.0f}", Text(summary(part)))
    Console().print(table)


def summary(part: dict[str, Any]) -> str:
    """A line: what is missing, why it ended, what does not hold, or how much does."""
    checks = part.get("checks", {})
    bad = [name for name, check in checks.items() if not check["holds"]]
    said = []
    if part["state"] == "not here":
        said.append(f"needs {', '.join(part['missing'])}")
    if part["state"] == "died":
        said.append(f"exit status {part['exit']}: {(part['last lines'] or ['no output'])[-1].strip()[:200]}")
    if part["state"] == "late":
        said.append("its time was over")
    if checks:
        said.append(f"{len(checks) - len(bad)} of {len(checks)} hold")
    said += [f"not: {name}{_figures(checks[name])}" for name in bad[:4]]
    if left := part.get("left out"):
        said.append(f"left out: {', '.join(left)}")
    return "; ".join(said)


def _figures(check: dict[str, Any]) -> str:
    shown = ", ".join(f"{key} {value}" for key, value in check.items() if key != "holds")
    return f" ({shown[:160]})" if shown else ""


def markdown(record: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown: a table of the parts, and one of the figures."""
    yield "| part | what it shows | | s | found |"
    yield "|---|---|---|---|---|"
    for name, part in record["parts"].items():
        cells = [name, PARTS[name].title, part["state"], f"{part.get('seconds', 0):.0f}", _cell(summary(part))]
        yield f"| {' | '.join(cells)} |"
    figures = [(name, *row) for name, part in record["parts"].items() for row in flat(part.get("figures", {}))]
    if figures:
        yield ""
        yield "| part | figure | |"
        yield "|---|---|---|"
        for name, figure, value in figures:
            yield f"| {name} | {_cell(figure)} | {_cell(str(value))} |"


def flat(figures: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Figures, which may have figures of their own, as (whole name, value)."""
    for name, value in figures.items():
        whole = f"{above}: {name}" if above else name
        if isinstance(value, dict):
            yield from flat(value, whole)
        else:
            yield whole, value


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
