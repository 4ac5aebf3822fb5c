"""Which CPU this is: kernels, packed weights and 8-bit results depend on it."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cpu() -> tuple[str, frozenset[str]]:
    """Model name, and the flags Linux gives it (none elsewhere)."""
    model, flags = platform.processor() or platform.machine(), frozenset[str]()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        model = fields.get("model name", model)
        flags = frozenset((fields.get("flags") or fields.get("Features") or "").split())
    return model, flags


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
