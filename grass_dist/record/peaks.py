"""FLOP/s that GPUs reach at most, as their vendors state them: dense products of bfloat16 with sums in fp32."""

from __future__ import annotations

import re

PEAKS = {
    "A10": 125e12,
    "A10G": 70e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A100": 312e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "L4": 121e12,
    "L40S": 362e12,
    "MI210": 181e12,
    "MI250X": 191.5e12,
    "MI300X": 1307e12,
    "MI325X": 1307e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "RTX 5090": 209e12,
    "RTX 6000 Ada": 364e12,
}
"""By words of the name that `torch.cuda.get_device_name` gives. Where a vendor states it with sparsity, it is half of
that. An MI250X is two devices."""
OTHER = {"D", "Laptop", "Max", "MIG", "Mobile", "Ti", "SUPER"}
"""Words of a part, or of a slower or faster relative, of a GPU."""


def peak_of(name: str) -> float | None:
    """Returns the FLOP/s of the GPU of this name; None if it is not in the table."""
    words = set(re.findall(r"[A-Za-z0-9]+", name))
    known = [key for key in PEAKS if words.issuperset(key.split())]
    if not known or words & OTHER:
        return None
    return PEAKS[max(known, key=lambda key: len(key.split()))]
