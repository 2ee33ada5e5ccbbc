"""The tables of docs/models.md, from what the sweep found.

python -m integration_tests.support.model_table RESULT.json
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from grass_dist.config import ROLES
from integration_tests.support.model_trial import (
    BARE,
    INPUT_GRADS,
    NO_BLOCKS,
    NO_WAY,
    NOT_COUNTED,
    SAID,
    SILENT,
    UNBUILT,
    UNTRAINED,
    WITH_WAY,
    WORKS,
    WRONG,
    Outcome,
)
from integration_tests.support.tiny_batches import NO_IMAGE

BEGIN, END = "<!-- sweep: begin -->", "<!-- sweep: end -->"
PAGE = Path(__file__).parents[2] / "docs" / "models.md"

_FAULTS = (NO_BLOCKS, NO_WAY, SAID, SILENT, BARE, WRONG)
_NAMES = {
    UNTRAINED: "do not train in plain PyTorch",
    UNBUILT: "not built",
    WORKS: "work",
    WITH_WAY: "work with a setting",
}


def tables(outcomes: Iterable[Outcome]) -> str:
    """The counts by kind, the stacks by family, and what is not as it should be."""
    import transformers

    done = list(outcomes)
    counted = [o for o in done if o.verdict not in NOT_COUNTED]
    works, ways = (sum(o.verdict == verdict for o in counted) for verdict in (WORKS, WITH_WAY))
    images = [o.batch != NO_IMAGE for o in counted if o.kind == "image-text"]
    began = (
        f"Transformers {transformers.__version__} and torch {torch.__version__.split('+')[0]}: of {len(done)} classes "
        f"{len(counted)} could be built tiny and train in plain PyTorch. Of these {works} work without a setting "
        f"({works / max(len(counted), 1):.1%}), and {ways} with the setting that the refusal names. Of the image-text "
        f"classes {sum(images)} had images in their batches, and {len(images) - sum(images)} text alone."
    )
    return "\n\n".join([began, _counts(done), _stacks(done), *_rest(done)])


def document(outcomes: Iterable[Outcome], page: Path = PAGE) -> None:
    """Writes the tables between the marks of a page."""
    text = page.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{tables(outcomes)}\n\n{END}{after}")


def _counts(done: Sequence[Outcome]) -> str:
    kinds = list(dict.fromkeys(o.kind for o in done))
    columns = [WORKS, WITH_WAY, *(verdict for verdict in _FAULTS if any(o.verdict == verdict for o in done))]
    shown = [*columns, UNTRAINED, UNBUILT]
    rows = [["kind", "classes", *(_NAMES.get(verdict, verdict) for verdict in shown)]]
    for kind in [*kinds, None]:
        of = [o for o in done if kind in (None, o.kind)]
        rows.append([kind or "all", str(len(of)), *(str(sum(o.verdict == v for o in of)) for v in shown)])
    return _table(rows)


def _stacks(done: Sequence[Outcome]) -> str:
    """Families by where their layers are. The number of a stage is shown as N."""
    of: dict[tuple[str, str], list[str]] = defaultdict(list)
    for outcome in done:
        if outcome.verdict == WORKS:
            stacks = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".N", stack) for stack in outcome.stacks)
            of[outcome.kind, ", ".join(f"`{stack}`" for stack in stacks)].append(outcome.family)
    order = {kind: place for place, kind in enumerate(dict.fromkeys(o.kind for o in done))}
    found = sorted(of.items(), key=lambda item: (order[item[0][0]], -len(item[1]), item[0][1]))
    return _table(
        [["kind", "the layers are those of", "families"]]
        + [[kind, stacks, ", ".join(dict.fromkeys(families))] for (kind, stacks), families in found]
    )


def _rest(done: Sequence[Outcome]) -> Iterable[str]:
    if ways := [o for o in done if o.verdict == WITH_WAY]:
        rows = [[o.name, _way(o), _starts(o)] for o in ways]
        yield (
            "These are refused when they are tiny, and train with the setting that the error shows. The last column "
            "says whether a model with the sizes of its default configuration starts without it."
        )
        yield _table([["class", "setting", "starts at its default sizes"], *rows])
    if faults := [o for o in done if o.verdict in _FAULTS]:
        yield "These do not train."
        yield _table(
            [["class", "what happens", "the error says"], *([o.name, o.verdict, _cell(o.detail)] for o in faults)]
        )
    if unbuilt := [o.name for o in done if o.verdict in NOT_COUNTED]:
        yield f"Not counted, because they were not built or do not train in plain PyTorch here: {', '.join(unbuilt)}."


def _starts(outcome: Outcome) -> str:
    if outcome.released.startswith("not built") and INPUT_GRADS not in outcome.way:
        return "not known"
    return "yes" if outcome.released == "starts" and INPUT_GRADS not in outcome.way else "no"


def _way(outcome: Outcome) -> str:
    shown = []
    for name, value in outcome.way.items():
        if name == INPUT_GRADS:
            shown.append(f"`{name}`")
            continue
        given = [entry for entry in value if entry not in ROLES] if name == "always_active" else [value]
        shown.append(f"`{name}`: {', '.join(f'`{entry}`' for entry in given)}")
    return "; ".join(shown)


def _cell(text: str) -> str:
    first = " ".join(text.split()).replace("|", "/")
    return first if len(first) <= 160 else f"{first[:157]}..."


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])


if __name__ == "__main__":
    document(Outcome(**entry) for entry in json.loads(Path(sys.argv[1]).read_text()))
