"""Memory of a process from /proc (Linux): no package, so that it runs in every environment."""

from __future__ import annotations

from pathlib import Path


def memory_mib(process: int | str) -> dict[str, float]:
    """rss, private (anonymous) and peak RSS in MiB; zeros when the process is gone."""
    kib = {"VmRSS": 0, "RssAnon": 0, "VmHWM": 0}
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in kib:
                kib[key] = int(value.split()[0])
    except (FileNotFoundError, ProcessLookupError):
        pass
    names = {"rss_mib": "VmRSS", "rss_private_mib": "RssAnon", "rss_peak_mib": "VmHWM"}
    return {name: round(kib[key] / 1024, 1) for name, key in names.items()}
