"""What a benchmark ran on."""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "badam", "galore-torch", "torchao")


def describe() -> dict[str, Any]:
    """Date, hardware and versions; without names of hosts."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "python": platform.python_version(),
        "versions": versions,
    }


def remember(results: Path, part: str, device: str) -> None:
    """Adds this machine to the record of a part's run."""
    file = results / "machines.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    known[f"{part}_{device}"] = describe()
    file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
