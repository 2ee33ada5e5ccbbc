"""The tests marked gpu, as `pytest -m gpu` runs them; on the CPU those of the stand-ins."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks.gpu.told import Told

ROOT = Path(__file__).parents[2]


def show(told: Told) -> None:
    if told.tiny:
        what = ["tests/test_gpu.py", "tests/test_devices.py"]
    else:
        marked = [file for file in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in file.read_text()]
        what = ["-m", "gpu", *(str(file.relative_to(ROOT)) for file in marked)]
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junit-xml={found}", *what]
        ended = subprocess.run([*command, f"--basetemp={folder}/t"], cwd=ROOT)
        cases = list(ElementTree.parse(found).iter("testcase")) if found.exists() else []
    bad, skipped = ([c.get("name") for c in cases if any(c.find(k) is not None for k in kinds)] for kinds in
                    (("failure", "error"), ("skipped",)))  # fmt: skip
    passed = len(cases) - len(bad) - len(skipped)
    whole = passed > 0 and not bad and (told.tiny or not skipped)
    told.check("all pass", whole and ended.returncode == 0, passed=passed, failed=bad, skipped=len(skipped))
