"""The page: a template in which every figure comes from a result, and the plots beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2

from benchmarks import throughput
from benchmarks.document import plots, tables
from benchmarks.gpu import table as gpu
from benchmarks.peers import __main__ as peers
from benchmarks.peers.regimes import REGIMES

RESULTS = Path(__file__).parents[1] / "results"
DOCS = Path(__file__).parents[2] / "docs"


def write_page(docs: Path = DOCS) -> None:
    """Writes benchmarks.md and its plots."""
    results = {file.stem: json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))}
    trainings, tried, ranks = (peers.read(RESULTS / name) for name in ("peers", "peers_tried", "peers_ranks"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"lines": "\n".join, "percent": "{:.1%}".format, "mb": lambda count: f"{count / 1e6:.0f}"}
    page = environment.get_template("benchmarks.md.j2").render(
        results=results,
        tables=tables,
        throughput=throughput,
        peers=peers,
        trainings=trainings,
        long_runs=peers.read(REGIMES["long"].results),
        longer=REGIMES["long"],
        tried=tried,
        ranks=ranks,
        on_gpu=on_gpu(results),
        proofs=proofs(results),
    )
    (docs / "benchmarks.md").write_text(page)
    images = docs / "images"
    plots.draw_throughput(results["throughput_cpu"], images / "bench_throughput.svg")
    plots.draw_peers(trainings, images / "bench_peers.svg")


def proofs(results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What `make gpu` has found, of each file gpu*.json: the machine, and tables. A trial on the CPU is no result."""
    for name, record in results.items():
        if name.startswith("gpu") and not record["tiny"]:
            yield tables.machine(record["machine"]), "\n".join(gpu.markdown(record))


def on_gpu(results: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What was measured on GPUs: part, machine, and its table."""
    for name, record in results.items():
        part, _, device = name.rpartition("_")
        if device == "gpu" and part in tables.OF_PART:
            yield part, tables.machine(results["machines"][name]), "\n".join(tables.OF_PART[part](record))
