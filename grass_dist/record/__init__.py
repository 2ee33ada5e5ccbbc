"""The record of a run, which a report is made of: run.json, and the events of metrics.jsonl."""

import os

REPORT_VARIABLE = "GRASS_DIST_REPORT"
"""Names the environment variable that is 1 where each Trainer is to record its run."""


def report_wanted() -> bool:
    """Whether the environment asks for the record of each Trainer's run."""
    return os.environ.get(REPORT_VARIABLE, "") not in ("", "0")
