"""Which CPU this is: kernels, packed weights and 8-bit results depend on it."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cpu() -> tuple[str, frozenset[str]]:
    """Model name, and the flags Linux gives it (none elsewhere)."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        flags = (fields.get("flags") or fields.get("Features") or "").split()
        return fields.get("model name") or platform.machine(), frozenset(flags)
    return platform.processor() or platform.machine(), frozenset()


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
