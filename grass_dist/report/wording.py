"""Writes numbers as the page of a run shows them."""

from __future__ import annotations

from grass_dist.report.drawing import byte_unit


def loss_text(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}%" if share < 0.0995 else f"{100 * share:.0f}%"


def bytes_text(count: float) -> str:
    scale, unit = byte_unit(count)
    return f"{count / scale:.3g} {unit}"


def count_text(count: float) -> str:
    for scale, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M")):
        if count >= scale:
            return f"{count / scale:.4g}{unit}"
    return f"{count:,.0f}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    if minutes:
        return f"{minutes} min {rest:02d} s"
    return f"{seconds:.1f} s" if seconds >= 0.1 or not seconds else f"{1000 * seconds:.2g} ms"
