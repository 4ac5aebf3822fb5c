"""Memory: of this process, split into what is its own and what is mapped from files; of this machine."""

from __future__ import annotations

from pathlib import Path

import psutil

MIB = 2**20


def available_mib() -> float:
    """Memory that programs can still have without anything being swapped out."""
    return float(psutil.virtual_memory().available / MIB)


def total_mib() -> float:
    """Memory of this machine."""
    return float(psutil.virtual_memory().total / MIB)


def memory_mib() -> dict[str, float]:
    """``rss_mib``, ``rss_private_mib`` and ``rss_peak_mib`` of this process.

    Private is anonymous memory (Linux: RssAnon): mapped files are left out, because they are shared between
    processes and can be dropped. Elsewhere it is psutil's unique set size, and the peak is at least now's RSS.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = (line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        kib = {key: int(value.split()[0]) for key, value in lines if key in {"VmRSS", "RssAnon", "VmHWM"}}
        names = {"rss_mib": "VmRSS", "rss_private_mib": "RssAnon", "rss_peak_mib": "VmHWM"}
        return {name: round(kib[key] / 1024, 1) for name, key in names.items()}
    info = psutil.Process().memory_full_info()
    peak = getattr(info, "peak_wset", info.rss)
    values = {"rss_mib": info.rss, "rss_private_mib": info.uss, "rss_peak_mib": peak}
    return {name: round(value / MIB, 1) for name, value in values.items()}
